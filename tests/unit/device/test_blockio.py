from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.device import blockio


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(b"\xff" * (1 << 20))
    opened = os.open(path, os.O_RDWR)
    yield opened
    os.close(opened)


def test_a_file(fd: int) -> None:
    assert blockio.size(fd) == 1 << 20
    assert blockio.sector_sizes(fd) == (512, 512)
    assert not blockio.is_block(fd) and not blockio.read_only(fd)
    assert blockio.zero_capability(fd).punch
    blockio.drop_cache(fd)


def test_alignment_is_a_power_of_two(fd: int) -> None:
    found = blockio.alignment(fd)
    assert all(n >= 1 and n & (n - 1) == 0 for n in (found.memory, found.offset))


def test_zeroes_become_a_hole(fd: int) -> None:
    blockio.zero_range(fd, 65536, 131072)
    raw = os.pread(fd, 1 << 20, 0)
    assert raw == b"\xff" * 65536 + bytes(131072) + b"\xff" * ((1 << 20) - 65536 - 131072)


def test_zeroes_past_the_end_make_the_file_grow(fd: int) -> None:
    blockio.zero_range(fd, (1 << 20) - 5, 100)
    assert blockio.size(fd) == (1 << 20) + 95
    assert os.pread(fd, 200, (1 << 20) - 6) == b"\xff" + bytes(100)
    blockio.zero_range(fd, 0, 0)


def test_where_holes_are_not_to_be_had_zeroes_are_written(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(blockio, "fallocate", refuse)
    blockio.zero_range(fd, 10, 3 << 20)
    assert os.pread(fd, 4 << 20, 0) == b"\xff" * 10 + bytes(3 << 20)


def test_a_file_takes_no_discard(fd: int) -> None:
    assert not blockio.discard(fd, 0, 4096)
