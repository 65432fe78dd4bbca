from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from imager import command
from imager.capture.usage import with_usage
from imager.device import inventory
from imager.device.identity import identify
from imager.device.inventory import Device
from imager.device.loop import LoopDevice, attach
from imager.units import format_size

MIB = 1 << 20

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="needs loop devices"),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[LoopDevice]:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(32 * MIB)
    script = b"label: gpt\nsize=16MiB\nsize=8MiB\n"
    command.run(["sfdisk", "-q", str(image)], stdin=script)
    with attach(image) as device:
        device.add_partitions()
        command.run(["mkfs.ext4", "-q", "-F", "-L", "my root", f"{device.path}p1"])
        yield device


def find(name: str) -> Device:
    return next(d for d in inventory.devices() if d.name == name)


def test_the_tree(disk: LoopDevice, tmp_path: Path) -> None:
    found = find(disk.name)
    assert (found.kind, found.table, found.size) == ("loop", "gpt", 32 * MIB)
    assert found.backing == disk.backing and found.writable and not found.reasons
    first, second = found.children
    assert (first.filesystem, first.label, first.number) == ("ext4", "my root", 1)
    assert (second.filesystem, second.number, second.kind) == (None, 2, "partition")
    assert first.partuuid and found.ptuuid


def test_mounts_and_why_it_may_not_be_written(disk: LoopDevice, tmp_path: Path) -> None:
    folder = tmp_path / "mnt"
    folder.mkdir()
    command.run(["mount", f"{disk.path}p1", str(folder)])
    try:
        found = find(disk.name)
    finally:
        command.run(["umount", str(folder)])
    assert not found.writable
    assert found.reasons == (f"{disk.path}p1 is mounted on {folder}",)
    assert found.children[0].mounts == (str(folder),)
    assert found.children[1].writable


def test_what_stands_on_it(disk: LoopDevice) -> None:
    with attach(f"{disk.path}p2") as over:
        found = find(disk.name)
        assert found.children[1].holders == (over.path,)
        assert [d.name for d in found.children[1].children] == [over.name]
        assert over.name not in {d.name for d in inventory.devices()}, "listed once, where it stands"


def test_it_is_plain_data(disk: LoopDevice) -> None:
    plain = msgspec.to_builtins(inventory.devices())
    assert msgspec.json.decode(msgspec.json.encode(plain)) == msgspec.json.decode(msgspec.json.encode(plain))
    assert any(d["name"] == disk.name and d["children"][0]["label"] == "my root" for d in plain)


def test_holdings(disk: LoopDevice) -> None:
    lines = inventory.holdings(identify(disk.path))
    assert "gpt partition table" in lines[0]
    assert "ext4 'my root'" in lines[1]
    assert len(lines) == 3


def test_the_system_disk_is_never_writable() -> None:
    for device in inventory.devices():
        if "/" in device.mounts:
            assert not device.writable
            assert any("running system" in reason for reason in device.reasons)


def test_used_space(disk: LoopDevice) -> None:
    """By the maps of what stands there: of the partition without any, all counts as used."""
    [found] = [d for d in with_usage(inventory.devices()) if d.name == disk.name]
    first, second = found.children
    assert found.used is None and found.used_why == ""
    assert first.used is not None and 0 < first.used < 8 * MIB
    assert second.used is None and "no filesystem" in second.used_why
    argv = [sys.executable, "-m", "imager", "devices", "--used", disk.path]
    said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    assert "IN USE" in said and format_size(first.used) in said
