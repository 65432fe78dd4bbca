"""Sparse files: what they hold, copying and comparing them without touching their holes.

Invariant: a hole is never read and never written, so a 1 TiB file that holds 100 MiB costs 100 MiB;
and `same_content` still compares every byte, since a byte in a hole is a zero.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 20
PAGE = 4096

Extent = tuple[int, int]
"""(start, length), in bytes."""


def data_extents(path: Path) -> list[Extent]:
    """The extents of a file that are not holes, in order."""
    found: list[Extent] = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        position = 0
        while position < size:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    break
                raise
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            found.append((start, position - start))
    return found


def data_bytes(path: Path) -> int:
    """How many bytes of a file are not in holes."""
    return sum(length for _, length in data_extents(path))


def copy_into(source: Path, target: Path, target_offset: int = 0, window: Extent | None = None) -> None:
    """Copy a file's data (or that of a window of it) into an existing file at an offset, holes left alone."""
    begin, length = window or (0, source.stat().st_size)
    with source.open("rb") as reader, target.open("r+b") as writer:
        for start, size in data_extents(source):
            first, last = max(start, begin), min(start + size, begin + length)
            for position in range(first, last, CHUNK):
                piece = os.pread(reader.fileno(), min(CHUNK, last - position), position)
                if piece.count(0) != len(piece):
                    os.pwrite(writer.fileno(), piece, target_offset + position - begin)


def copy(source: Path, target: Path, window: Extent | None = None) -> None:
    """Make a new sparse file that holds what another (or a window of it) holds."""
    size = window[1] if window else source.stat().st_size
    with target.open("wb") as file:
        file.truncate(size)
    copy_into(source, target, 0, window)


def same_content(first: Path, second: Path) -> bool:
    """Whether two files of the same size hold the same bytes, a hole being zeroes."""
    if first.stat().st_size != second.stat().st_size:
        return False
    extents = merged(data_extents(first) + data_extents(second))
    with first.open("rb") as one, second.open("rb") as other:
        for position, length in _pieces(extents):
            if os.pread(one.fileno(), length, position) != os.pread(other.fileno(), length, position):
                return False
    return True


def merged(extents: list[Extent]) -> list[Extent]:
    """The same bytes as ordered extents that neither overlap nor touch."""
    result: list[Extent] = []
    for start, length in sorted(extents):
        if result and start <= result[-1][0] + result[-1][1]:
            before, size = result[-1]
            result[-1] = (before, max(size, start + length - before))
        else:
            result.append((start, length))
    return result


def blocks_touched(extents: list[Extent], block_size: int) -> int:
    """How many blocks of a size some extents touch."""
    touched: set[int] = set()
    for start, length in extents:
        touched.update(range(start // block_size, (start + length - 1) // block_size + 1))
    return len(touched)


def _pieces(extents: list[Extent]) -> Iterator[Extent]:
    for start, length in extents:
        for position in range(start, start + length, CHUNK):
            yield position, min(CHUNK, start + length - position)
