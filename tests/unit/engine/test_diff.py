"""Diff: everything outside the extents is equal, by brute force."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from imager.changes import formats, given
from imager.cli.shell import encode
from imager.engine import diff
from imager.errors import IntegrityError, SourceError, UsageError
from imager.events import Silent
from imager.extents import Extents
from imager.repository.repository import Repository
from tests.unit.engine.conftest import Writer, content
from tests.unit.engine.test_restore import damage

MIB = 1 << 20


def changed(data: bytes, seed: int, size: int | None = None) -> bytes:
    out = bytearray(data)
    chance = random.Random(seed)
    for _ in range(12):
        out[chance.randrange(len(out))] ^= 0x55
    start = chance.randrange(len(out)) // 4096 * 4096
    out[start : start + 20000] = bytes(len(out[start : start + 20000]))
    return bytes(out[:size]) if size is None or size <= len(out) else bytes(out) + os.urandom(size - len(out))


def truth(a: bytes, b: bytes, grain: int) -> Extents:
    """Grains that differ, and what only one side has."""
    end = min(len(a), len(b))
    found = []
    for at in range(0, end, grain):
        stop = min(at + grain, end)
        if a[at:stop] != b[at:stop]:
            found.append((at, stop))
    return Extents.of([*found, (end, max(len(a), len(b)))])


SIZES = [None, 3 * MIB, 5 * MIB + 100, 4 * MIB - 1000]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("other", [4096, 65536])
def test_sets(plain: Repository, plain_writer: Writer, size: int | None, other: int) -> None:
    a = content(4 * MIB)
    b = changed(a, 5, size)
    one = plain_writer.store({"sda": a}, name="a")
    two = plain_writer.store({"sda": b}, name="b", block_size=other)
    summary = diff.diff(plain, "a", "b", Silent())
    assert summary.differs
    exact = truth(a, b, 4096)
    assert not exact - summary.extents
    if size is None:
        assert summary.extents == exact
    assert summary.differing_bytes <= exact.total + 4096
    assert summary.base == one.id and summary.b.set == two.id
    assert diff.diff(plain, "b", "a", Silent()).extents == summary.extents
    assert not diff.diff(plain, "a", one.id, Silent()).differs


@pytest.mark.parametrize("size", SIZES)
def test_set_and_file(repository: Repository, writer: Writer, tmp_path: Path, size: int | None) -> None:
    a = content(4 * MIB)
    b = changed(a, 6, size)
    writer.store({"sda": a})
    path = tmp_path / "b.img"
    path.write_bytes(b)
    summary = diff.diff(repository, "disk", str(path), Silent())
    exact = truth(a, b, 4096)
    assert not exact - summary.extents
    assert summary.differing_bytes <= exact.total + 2 * 4096
    assert summary.size == max(len(a), len(b))
    assert diff.diff(repository, str(path), "disk", Silent()).extents == summary.extents
    path.write_bytes(a)
    assert not diff.diff(repository, "disk", str(path), Silent()).differs


def test_holes_of_the_file_are_compared(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    a = bytearray(content(4 * MIB))
    a[MIB : 2 * MIB] = os.urandom(MIB)
    a[2 * MIB : 3 * MIB] = bytes(MIB)
    plain_writer.store({"sda": bytes(a)})
    path = tmp_path / "b.img"
    path.write_bytes(a)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * MIB)
        from imager.device import blockio

        blockio.fallocate(file.fileno(), 3, MIB + 8192, 16384)
        file.seek(2 * MIB + 12288)
        file.write(b"x")
    summary = diff.diff(plain, "disk", str(path), Silent())
    assert summary.extents.ranges == ((MIB + 8192, MIB + 24576), (2 * MIB + 12288, 2 * MIB + 16384))


@pytest.mark.parametrize("size", SIZES)
def test_files(tmp_path: Path, size: int | None) -> None:
    a = content(4 * MIB)
    b = changed(a, 7, size)
    (tmp_path / "a").write_bytes(a)
    (tmp_path / "b").write_bytes(b)
    summary = diff.diff(None, f"{tmp_path}/a", f"{tmp_path}/b", Silent())
    assert summary.extents == truth(a, b, 4096)
    assert not diff.diff(None, f"{tmp_path}/a", f"{tmp_path}/a", Silent()).differs


def test_the_forms_can_be_read_back(plain: Repository, plain_writer: Writer) -> None:
    a = content(4 * MIB)
    one = plain_writer.store({"sda": a}, name="a")
    plain_writer.store({"sda": changed(a, 8)}, name="b")
    summary = diff.diff(plain, "a", "b", Silent())
    for form in ("bmap", "ddrescue"):
        assert given.parse(formats.write(summary, form).encode()).extents == summary.extents
    back = given.parse(encode(summary).encode())
    assert (back.extents, back.size, back.base) == (summary.extents, 4 * MIB, one.id)
    assert formats.write(summary, "text").count("\n") == len(summary.extents)


def test_errors(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    manifest = plain_writer.store({"sda": os.urandom(MIB)})
    other = plain_writer.store({"sda": os.urandom(MIB)}, block_size=65536)
    with pytest.raises(UsageError, match="no repository"):
        diff.diff(None, "disk", f"{tmp_path}/x", Silent())
    with pytest.raises(SourceError, match="No such file"):
        diff.diff(plain, manifest.id, f"{tmp_path}/x", Silent())
    damage(plain, manifest, plain_writer, 9)
    with pytest.raises(IntegrityError, match="damaged"):
        diff.diff(plain, manifest.id, other.id, Silent())
