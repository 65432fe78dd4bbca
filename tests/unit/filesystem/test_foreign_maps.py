"""Swap, LUKS and RAID, and maps of changed FAT, exFAT and NTFS."""

from __future__ import annotations

import os
import random
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager import command
from imager.extents import Extents
from imager.filesystem import maps
from imager.filesystem.used import Unknown, Used
from tests import foreign, structures
from tests.workbench import MEMORY

MIB = 1 << 20


def used(raw: bytes, start: int = 0) -> Used | Unknown:
    fd = os.memfd_create("image")
    try:
        os.write(fd, raw)
        return maps.used_blocks(fd, start, len(raw) - start)
    finally:
        os.close(fd)


def reason(raw: bytes) -> str:
    answer = used(raw)
    assert isinstance(answer, Unknown)
    return answer.reason


@pytest.fixture
def swap(tmp_path: Path) -> bytearray:
    image = tmp_path / "swap"
    with image.open("wb") as file:
        file.truncate(8 * MIB)
    command.run(["mkswap", str(image)])
    return bytearray(image.read_bytes())


def test_swap(swap: bytearray) -> None:
    """Of all its pages one; and what stands behind it, which may be something else."""
    one = Used(Extents(((0, 4096),)), "of swap space, only the header", "swap")
    assert used(bytes(swap)) == one
    assert used(bytes(512 * 3) + bytes(swap), 512 * 3) == one
    more = used(bytes(swap) + bytes(4 * MIB))
    assert isinstance(more, Used) and list(more.extents) == [(0, 4096), (11 * MIB, 12 * MIB)]


def test_a_hibernated_system(swap: bytearray) -> None:
    for signature in (b"S1SUSPEND\0", b"LINHIB0001", b"ULSUSPEND\0"):
        swap[4086:4096] = signature
        assert "hibernated" in reason(swap)


def test_swap_that_makes_no_sense(swap: bytearray) -> None:
    swap[1028:1032] = struct.pack("<I", 1 << 20)
    assert "size" in reason(swap)
    swap[1024:1028] = struct.pack(">I", 1)
    assert "byte order" in reason(swap)


def test_encrypted() -> None:
    assert "encrypted" in reason(structures.luks2({}).ljust(MIB, b"\0"))


@pytest.mark.parametrize("version", ["0.90", "1.0", "1.2"])
def test_a_raid_member(tmp_path: Path, version: str) -> None:
    """Even where the filesystem in it looks as if it stood alone: its RAID would be lost."""
    image = tmp_path / "image"
    foreign.make("fat", image, 16 * MIB, "-F 16")
    raw = bytearray(image.read_bytes())
    at, block = structures.md_0(len(raw)) if version == "0.90" else structures.md_1(len(raw), version)
    raw[at : at + len(block)] = block
    answer = used(raw)
    assert isinstance(answer, Unknown) and "linux_raid_member" in answer.reason + answer.kind


OPTIONS = [
    ("fat", 3, "-F 12"),
    ("fat", 9, "-F 16 -s 1"),
    ("fat", 36, "-F 32 -s 1"),
    ("exfat", 4, "-c 4K"),
    ("ntfs", 3, "-c 1024"),
]


@pytest.fixture(scope="module")
def samples() -> Iterator[list[tuple[bytes, list[int]]]]:
    """Filesystems, and where their structures are: where bytes that are not zero stand."""
    missing = [argv[0] for argv in foreign.MAKE.values() if command.find(argv[0]) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    out = []
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        for kind, size, options in OPTIONS:
            image = Path(name) / "image"
            foreign.make(kind, image, size * MIB, options)
            raw = image.read_bytes()
            places = [at for at in range(0, len(raw), 16) if any(raw[at : at + 16])]
            # A log of all ones and a table of capital letters would be most of them.
            chance = random.Random(1)
            out.append((raw, sorted({*places[:400], *chance.sample(places, min(400, len(places)))})))
    yield out


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_no_bytes_make_it_fail(samples: list[tuple[bytes, list[int]]], data: st.DataObject) -> None:
    raw, places = data.draw(st.sampled_from(samples))
    changed = bytearray(raw)
    changes = st.tuples(
        st.sampled_from(places), st.integers(0, 15), st.sampled_from([0, 1, 2, 127, 128, 255])
    )
    for place, offset, value in data.draw(st.lists(changes, min_size=1, max_size=6)):
        changed[place + offset] = value
    if data.draw(st.booleans()):
        changed = changed[: data.draw(st.integers(1, len(changed) // 512)) * 512]
    answer = used(changed)
    if isinstance(answer, Used):
        assert answer.extents == answer.extents.clip(len(changed)) and 0 in answer.extents
