"""Backups of real block devices: all is read and compared, or what a map names; read past the page cache."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from imager.device.loop import attach
from imager.errors import SourceError
from imager.events import Silent
from tests.workbench import Workbench, json_map, state_in

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="needs loop devices"),
]

MIB = 1 << 20
SECTOR = 512


def write(path: str, at: int, data: bytes) -> tuple[int, int]:
    """Through the device, as a filesystem would."""
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.pwrite(fd, data, at) == len(data)
        os.fsync(fd)
    finally:
        os.close(fd)
    return at, len(data)


@pytest.mark.parametrize("block_size", [4096, 65536, MIB])
@pytest.mark.parametrize("sector", [512, 4096])
def test_a_device_that_changes(tmp_path: Path, block_size: int, sector: int) -> None:
    """Scans and maps in turn; a size that is no multiple of the block; nothing to warn of."""
    with state_in(tmp_path / "state"):
        place = Workbench(tmp_path, encryption="keyfile", block_size=block_size)
        chance = random.Random(block_size)
        image = tmp_path / "disk"
        size = 24 * MIB + (9 * SECTOR if sector == 512 else 4096)
        image.write_bytes(chance.randbytes(6 * MIB))
        os.truncate(image, size)
        kept: dict[str, bytes] = {}
        with attach(image, sector_size=sector) as device:
            disk = os.path.basename(device.path)
            for number in range(6):
                edits = [
                    write(
                        device.path,
                        chance.randrange(size - 9000) // SECTOR * SECTOR,
                        chance.randbytes(length),
                    )
                    for length in (512, 4096, 9000)
                ]
                edits.append(write(device.path, size - SECTOR, bytes([number]) * SECTOR))
                edits.append(write(device.path, number * MIB, bytes(MIB)))
                reporter = Silent()
                mapped = number in (2, 4)
                changed = str(json_map(tmp_path / "map", edits, size=size)) if mapped else None
                one = place.backup(device.path, name="d", changed=changed, reporter=reporter)
                assert not reporter.warnings
                found = one.images[0]
                assert found.change_source == ("given:json" if mapped else "scan")
                assert found.bytes_read == size if not mapped else found.bytes_read < size
                kept[one.set] = image.read_bytes()
            again = place.backup(device.path, name="d")
            assert again.images[0].blocks_changed == 0
            assert place.manifest(again.set).images[0].root == place.manifest(one.set).images[0].root
        for set_, content in kept.items():
            place.gives(set_, {disk: content})
        place.is_whole(kept)


def test_one_source_that_fails_ends_them_all(tmp_path: Path) -> None:
    """The error is that of the source that failed, wherever it stands; no set is made."""
    with state_in(tmp_path / "state"):
        place = Workbench(tmp_path, block_size=4096)
        good, bad = tmp_path / "good", tmp_path / "bad"
        data = random.Random(1).randbytes(8 * MIB)
        good.write_bytes(data * 64)
        bad.write_bytes(data)
        place.backup(bad, name="before")
        with attach(bad, direct_io=True) as device:
            os.truncate(bad, 4 * MIB)
            for sources in ((good, device.path), (device.path, good)):
                with pytest.raises(SourceError, match="cannot be read at byte|ended early"):
                    place.backup(*sources, name="d")
                with place.open() as repository:
                    assert len(repository.storage.list_names("sets/")) == 1
        place.is_whole()
