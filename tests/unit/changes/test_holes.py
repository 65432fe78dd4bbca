"""Holes and samples: never too little, and quick on huge files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager.changes import holes, sample
from imager.changes.provider import ZERO, Request
from imager.device.identity import identify
from imager.extents import Extents

KEEP = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@KEEP
@given(
    st.lists(st.tuples(st.integers(0, 400_000), st.integers(1, 60_000)), max_size=6),
    st.integers(1, 500_000),
    st.sampled_from([1, 4096, 65536]),
)
def test_nothing_outside_is_data(
    tmp_path: Path, writes: list[tuple[int, int]], size: int, grain: int
) -> None:
    path = tmp_path / "f"
    with open(path, "w+b") as file:
        file.truncate(size)
        for at, length in writes:
            file.seek(at)
            file.write(b"x" * max(0, min(length, size - at)))
        file.flush()
        found = holes.data_extents(file.fileno(), size, grain)
        content = path.read_bytes()
        assert found == Extents.of(found.ranges)
        assert all(start % grain == 0 and (end % grain == 0 or end == size) for start, end in found)
        assert not any(content[start:end].strip(b"\0") for start, end in found.complement(size))
        middle = size // 2 // grain * grain
        window = Extents.of(
            [*holes.walk(file.fileno(), 0, middle, grain), *holes.walk(file.fileno(), middle, size, grain)]
        )
        assert window == found


def test_a_sparse_tebibyte_is_asked_about_few_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    with open(path, "w+b") as file:
        file.truncate(1 << 40)
        file.seek(777 << 30)
        file.write(b"x")
        file.flush()
        seek, calls = os.lseek, []

        def counted(fd: int, position: int, whence: int) -> int:
            calls.append(position)
            return seek(fd, position, whence)

        monkeypatch.setattr(os, "lseek", counted)
        changes = holes.Holes().changes(Request(file.fileno(), 1 << 40, identify(path), None))
        assert len(calls) <= 3
        assert changes.elsewhere == ZERO
        assert (777 << 30) in changes.extents
        assert changes.extents.total <= 1 << 20
        assert holes.is_hole(file.fileno(), 0, 777 << 30)
        assert not holes.is_hole(file.fileno(), 0, (777 << 30) + 1)


def test_where_nobody_can_tell_all_is_data() -> None:
    reader, writer = os.pipe()
    try:
        assert holes.data_extents(reader, 100).ranges == ((0, 100),)
    finally:
        os.close(reader)
        os.close(writer)


def test_past_the_end(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    fd = os.open(path, os.O_RDONLY)
    try:
        assert holes.data_extents(fd, 1 << 30).ranges == ((0, 3),)
        assert holes.data_extents(fd, 0).ranges == ()
    finally:
        os.close(fd)


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 5000)), max_size=8), st.integers(1, 5000))
def test_sample_is_of_unnamed_blocks(pairs: list[tuple[int, int]], blocks: int) -> None:
    named = Extents.of((min(p), max(p)) for p in pairs).clip(blocks)
    chosen = sample.choose(named, blocks)
    assert chosen == sorted(set(chosen))
    assert not any(block in named or block >= blocks for block in chosen)
    unnamed = blocks - named.total
    assert len(chosen) == sample.count(named.total, unnamed)
    assert len(chosen) >= min(unnamed, 16)
    assert len(chosen) <= max(16, named.total * 0.05)


@pytest.mark.parametrize(
    ("named", "unnamed", "expected"), [(0, 5, 5), (0, 10**6, 16), (10**6, 10**6, 1000), (1000, 10**6, 50)]
)
def test_sample_size(named: int, unnamed: int, expected: int) -> None:
    assert sample.count(named, unnamed) == expected


def test_sample_reaches_every_unnamed_block() -> None:
    named = Extents.of([(10, 90)])
    seen = {block for _ in range(200) for block in sample.choose(named, 200)}
    assert seen == {*range(10), *range(90, 200)}
