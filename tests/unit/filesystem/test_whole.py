"""A disk's used blocks: partitions by their maps, all else by doubt."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.extents import Extents
from imager.filesystem import maps, whole
from imager.filesystem.used import Unknown, Used
from imager.lab import rig
from imager.lab.mounting import mounted
from tests.samples import Sample

MIB = 1 << 20
SIZE = 640 * MIB
STARTS = {1: ("ext4", MIB), 2: ("xfs5", 100 * MIB), 3: ("btrfs", 420 * MIB + 512 * 3)}
WITHOUT = rig.without_devices()


def disk(path: Path, label: str = "gpt", sizes: dict[int, int] | None = None) -> None:
    """A disk with the samples of `STARTS`, and a partition of noise at its end."""
    lines = [f"label: {label}"]
    for number, (name, start) in STARTS.items():
        length = (sizes or {}).get(number, Sample(name).size)
        lines.append(f"start={start // 512}, size={length // 512}, type={'L' if label == 'gpt' else '83'}")
    lines.append(f"start={600 * 2048}, size={20 * 2048}")
    with open(path, "wb") as file:
        file.truncate(SIZE)
    subprocess.run(["sfdisk", "-q", str(path)], input="\n".join(lines), text=True, check=True)
    fd = os.open(path, os.O_RDWR)
    for name, start in STARTS.values():
        for number, page in Sample(name).pages.items():
            os.pwrite(fd, page, start + number * 4096)
    os.close(fd)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "disk"
    disk(path)
    fd = os.open(path, os.O_RDWR)
    yield path, fd
    os.close(fd)


def test_each_partition_by_its_map(opened: tuple[Path, int]) -> None:
    _, fd = opened
    found = whole.used_blocks(fd, SIZE)
    assert [part.number for part in found.parts] == [1, 2, 3, 4]
    for part, (name, start) in zip(found.parts, STARTS.values(), strict=False):
        alone = maps.used_blocks(fd, start, Sample(name).size)
        assert isinstance(alone, Used) and part.answer == alone
        assert (part.start, part.size, part.used) == (start, Sample(name).size, alone.extents.total)
        inside = found.used & Extents.of([(start, start + part.size)])
        assert inside == Extents.of((start + low, start + high) for low, high in alone.extents)
    assert found.parts[3].answer == Unknown("no filesystem that is known here")
    assert found.parts[3].used == 20 * MIB
    outside = Extents.whole(SIZE) - Extents.of((p.start, p.start + p.size) for p in found.parts)
    assert outside and not outside - found.used


def test_the_same_of_an_mbr(tmp_path: Path, opened: tuple[Path, int]) -> None:
    disk(tmp_path / "dos", "dos")
    fd = os.open(tmp_path / "dos", os.O_RDONLY)
    try:
        found = whole.used_blocks(fd, SIZE)
    finally:
        os.close(fd)
    ours = [part.used for part in found.parts]
    assert ours == [part.used for part in whole.used_blocks(opened[1], SIZE).parts]


def test_what_is_written_meanwhile_is_used(opened: tuple[Path, int]) -> None:
    found = whole.used_blocks(opened[1], SIZE, written={2})
    assert [isinstance(part.answer, Used) for part in found.parts] == [True, False, True, False]
    assert not Extents.of([(100 * MIB, 400 * MIB)]) - found.used
    all_ = whole.used_blocks(opened[1], SIZE, written={None})
    assert all_.used == Extents.whole(SIZE)


def test_what_is_at_rest_has_a_map_for_whoever_looks_again(opened: tuple[Path, int]) -> None:
    """Where a log tells of work that is under way; a btrfs never tells."""
    alone = whole.used_blocks(opened[1], SIZE)
    found = whole.used_blocks(opened[1], SIZE, written={1, 2, 3, 4}, again=True)
    for part, other in zip(found.parts[:2], alone.parts, strict=False):
        assert isinstance(part.answer, Used) and isinstance(other.answer, Used)
        assert part.answer == Used(other.answer.extents, whole.AT_REST, other.answer.kind)
    assert [part.answer for part in found.parts[2:]] == [
        Unknown("it is mounted for writing, and changes while it is read", kind) for kind in ("btrfs", "")
    ]
    os.pwrite(opened[1], b"\0\0", MIB + 1024 + 0x3A)  # as a mounted ext4 is
    [busy, *_] = whole.used_blocks(opened[1], SIZE, written={1}, again=True).parts
    assert isinstance(busy.answer, Unknown) and "mounted for writing" in busy.answer.reason


def test_partitions_that_make_no_sense(tmp_path: Path) -> None:
    """Those that overlap, and those that end behind the disk, have no map."""
    path = tmp_path / "disk"
    disk(path)
    fd = os.open(path, os.O_RDWR)
    try:
        assert isinstance(whole.used_blocks(fd, SIZE).parts[2].answer, Used)
        os.ftruncate(fd, 500 * MIB)
        short = whole.used_blocks(fd, 500 * MIB)
        assert short.parts[2].answer == Unknown("it reaches beyond the end of the disk")
        assert not Extents.of([(420 * MIB, 500 * MIB)]) - short.used
        os.ftruncate(fd, SIZE)
    finally:
        os.close(fd)
    subprocess.run(["sfdisk", "-q", "--delete", str(path), "1", "2", "4"], check=True)
    # sfdisk makes no overlapping partitions: an MBR by hand.
    with open(path, "r+b") as file:
        file.seek(446)
        for start, size in ((MIB, 64 * MIB), (2 * MIB, 8 * MIB), (100 * MIB, 300 * MIB), (0, 0)):
            entry = bytes(4) + (b"\x83" if size else b"\0") + bytes(3)
            file.write(entry + (start // 512).to_bytes(4, "little") + (size // 512).to_bytes(4, "little"))
    fd = os.open(path, os.O_RDONLY)
    try:
        found = whole.used_blocks(fd, SIZE)
        reasons = [part.answer.reason for part in found.parts if isinstance(part.answer, Unknown)]
        assert reasons == ["it overlaps another partition"] * 2
    finally:
        os.close(fd)


def test_a_source_without_a_table(tmp_path: Path) -> None:
    path = tmp_path / "image"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        sample = Sample("xfs5")
        sample.write(fd)
        found = whole.used_blocks(fd, sample.size)
        [part] = found.parts
        assert isinstance(part.answer, Used) and part.number is None
        assert found.used == part.answer.extents
        os.ftruncate(fd, 0)
        os.ftruncate(fd, MIB)
        assert whole.used_blocks(fd, MIB).used == Extents.whole(MIB)
    finally:
        os.close(fd)


@pytest.mark.root
@pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT))
def test_mounted_for_writing(opened: tuple[Path, int], tmp_path: Path) -> None:
    """By the disk's device, by the file behind it, and not where it is mounted read-only."""
    from imager.device.loop import attach

    path, fd = opened
    assert whole.mounted_for_writing(fd) == frozenset()
    with attach(path) as device:
        parts = device.add_partitions()
        own = os.open(device.path, os.O_RDONLY)
        try:
            with mounted(parts[2], "xfs", tmp_path / "a", read_only=True):
                assert whole.mounted_for_writing(own) == frozenset()
                with mounted(parts[1], "ext4", tmp_path / "b"):
                    assert whole.mounted_for_writing(own) == {1}
                    assert whole.mounted_for_writing(fd) == {1}
                    part = os.open(parts[1], os.O_RDONLY)
                    assert whole.mounted_for_writing(part) == {None}
                    os.close(part)
        finally:
            os.close(own)
