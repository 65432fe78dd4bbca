from __future__ import annotations

import os
import random
from pathlib import Path

from imager.extents import Extents
from imager.lab import raw

MIB = 1 << 20


def sparse(path: Path, size: int, pieces: dict[int, bytes]) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for at, data in pieces.items():
            os.pwrite(file.fileno(), data, at)
    return path


def test_what_reads_the_same_has_the_same_digest(tmp_path: Path) -> None:
    noise = random.Random(1).randbytes(70_000)
    a = sparse(tmp_path / "a", 5 * MIB + 7, {MIB - 300: noise, 4 * MIB: b"x"})
    content = a.read_bytes()
    b = tmp_path / "b"
    b.write_bytes(content)
    assert raw.data_bytes(a) < raw.data_bytes(b)
    assert raw.digest(a) == raw.digest(b)
    assert raw.digest(sparse(tmp_path / "c", 5 * MIB + 8, {MIB - 300: noise, 4 * MIB: b"x"})) != raw.digest(a)
    assert raw.digest(sparse(tmp_path / "d", 5 * MIB + 7, {MIB: noise, 4 * MIB: b"x"})) != raw.digest(a)


def test_differences_are_found_wherever_one_side_has_data(tmp_path: Path) -> None:
    size = 6 * MIB + 100
    a = sparse(tmp_path / "a", size, {0: b"same", 3 * MIB + 5000: b"!", size - 1: b"e"})
    b = sparse(tmp_path / "b", size, {0: b"same", 5 * MIB: bytes(4096) + b"?"})
    assert raw.differences(a, a, size) == Extents()
    assert raw.differences(a, b, size) == Extents.of(
        [
            (3 * MIB + 4096, 3 * MIB + 8192),
            (5 * MIB + 4096, 5 * MIB + 8192),
            (6 * MIB, size),
        ]
    )


def test_a_copied_range_keeps_its_holes(tmp_path: Path) -> None:
    a = sparse(tmp_path / "a", 4 * MIB, {10_000: b"abc", 3 * MIB: bytes(MIB)})
    b = sparse(tmp_path / "b", 8 * MIB, {})
    with a.open("rb") as source, b.open("r+b") as target:
        raw.copy(source.fileno(), 0, 4 * MIB, target.fileno(), 2 * MIB)
    assert b.read_bytes() == bytes(2 * MIB) + a.read_bytes() + bytes(2 * MIB)
    assert raw.data_bytes(b) < MIB
