"""Disk images as plain files: copied, hashed and compared without reading their holes.

Invariant: nothing here uses the engine. It is the lab's own judgement of
what the engine did, so a fault of the engine cannot hide itself here.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator

from imager.extents import Extents

STEP = 1 << 20
_ZERO = bytes(STEP)


def data(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of `[start, end)` that are no holes."""
    at = start
    while at < end:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if at >= end:
            return
        stop = min(os.lseek(fd, at, os.SEEK_HOLE), end)
        yield at, stop
        at = stop


def data_bytes(path: str | os.PathLike[str]) -> int:
    """How many bytes of a file are no holes."""
    with open(path, "rb") as file:
        return sum(end - start for start, end in data(file.fileno(), 0, os.fstat(file.fileno()).st_size))


def copy(source: int, at: int, length: int, target: int, to: int) -> int:
    """Copy a range into a place of `target` that is a hole; zeroes stay holes. Returns bytes written."""
    written = 0
    for start, end in data(source, at, at + length):
        for position in range(start, end, STEP):
            piece = os.pread(source, min(STEP, end - position), position)
            if piece != _ZERO[: len(piece)]:
                os.pwrite(target, piece, to + position - at)
                written += len(piece)
    return written


def fill_with_noise(path: str | os.PathLike[str], size: int) -> None:
    """Make a file of `size` random bytes, none of which reads as a zero by luck for long."""
    noise = os.urandom(STEP)
    with open(path, "wb") as file:
        for position in range(0, size, STEP):
            file.write(noise[: size - position])


def digest(path: str | os.PathLike[str], of: Extents | None = None) -> str:
    """A digest of size and content; files that read the same have the same, whatever their holes.

    `of`: the bytes that count; all others may be any.
    """
    state = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        fd = file.fileno()
        size = os.fstat(fd).st_size
        state.update(size.to_bytes(8, "little"))
        for position in _steps(data(fd, 0, size)):
            piece = os.pread(fd, STEP, position)
            if of is not None:
                piece = _only(piece, position, of)
            if piece != _ZERO[: len(piece)]:
                state.update(position.to_bytes(8, "little"))
                state.update(piece)
    return state.hexdigest()


def _only(piece: bytes, position: int, of: Extents) -> bytes:
    """A piece of a file, zeroed where it does not count."""
    kept = bytearray(len(piece))
    for start, end in of & Extents(((position, position + len(piece)),)):
        kept[start - position : end - position] = piece[start - position : end - position]
    return bytes(kept)


def differences(a: str | os.PathLike[str], b: str | os.PathLike[str], size: int) -> Extents:
    """Where the first `size` bytes of two files differ, in units of 4 KiB."""
    found: list[tuple[int, int]] = []
    with open(a, "rb") as first, open(b, "rb") as second:
        fds = first.fileno(), second.fileno()
        steps = sorted({p for fd in fds for p in _steps(data(fd, 0, size))})
        for position in steps:
            length = min(STEP, size - position)
            one, two = (os.pread(fd, length, position) for fd in fds)
            if one == two:
                continue
            for at in range(0, length, 4096):
                if one[at : at + 4096] != two[at : at + 4096]:
                    found.append((position + at, min(position + at + 4096, size)))
    return Extents.of(found)


def _steps(ranges: Iterator[tuple[int, int]]) -> Iterator[int]:
    """Offsets of the aligned steps that the ranges touch, each once."""
    done = -1
    for start, end in ranges:
        for step in range(max(start // STEP, done + 1), -(-end // STEP)):
            yield step * STEP
            done = step
