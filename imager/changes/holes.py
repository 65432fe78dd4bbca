"""Holes of sparse files, by SEEK_DATA and SEEK_HOLE.

Invariant: what is left out is a hole that the filesystem says reads as
zeroes at the moment of asking; where it cannot tell, all is data. The cost
follows the number of extents, not the size, and `walk` holds one at a time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from msgspec import Struct

from imager.changes.provider import ZERO, Changes, Request
from imager.extents import Extents

_CANNOT_TELL = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.ESPIPE)


def walk(fd: int, start: int, end: int, grain: int = 1) -> Iterator[tuple[int, int]]:
    """Data ranges `(start, end)` of `[start, end)`, widened to multiples of `grain` and merged.

    `start` is a multiple of `grain`; the last range ends at `end` at most. The
    descriptor's file position moves. Raises `OSError` for real I/O errors.
    """
    low = high = start  # the range that is not handed out yet
    position = start
    while position < end:
        try:
            data = os.lseek(fd, position, os.SEEK_DATA)
            hole = os.lseek(fd, data, os.SEEK_HOLE) if data < end else end
        except OSError as error:
            if error.errno == errno.ENXIO:
                break  # nothing but a hole up to the end of the file
            if error.errno not in _CANNOT_TELL:
                raise
            data, hole = position, end
        if data >= end:
            break
        first = max(data // grain * grain, high)
        last = min(-(-hole // grain) * grain, end)
        if first > high:
            if low < high:
                yield low, high
            low = first
        high = max(high, last)
        # A file that shrinks while it is read may answer with no progress.
        position = max(high, hole, position + 1)
    if low < high:
        yield low, high


def data_extents(fd: int, size: int, grain: int = 1) -> Extents:
    """All data ranges of the first `size` bytes, in multiples of `grain`.

    Prefer `walk` on a window at a time where a file may have very many.
    """
    return Extents(tuple(walk(fd, 0, size, grain)))


def is_hole(fd: int, start: int, end: int) -> bool:
    """Whether `[start, end)` lies within one hole or past the end: it reads as zeroes."""
    return next(walk(fd, start, end), None) is None


class Holes(Struct, frozen=True):
    """What is not a hole must be read; a hole is zeroes, whatever the base holds there."""

    name: str = "holes"

    def changes(self, request: Request) -> Changes:
        return Changes(data_extents(request.fd, request.size), self.name, exact=True, elsewhere=ZERO)
