"""A part of a device or an image file, read by offsets of its own.

Invariant: `read` never returns a byte from outside the window, and never
more than `LIMIT` at once, whatever a structure on the disk asks for.
"""

from __future__ import annotations

import mmap
import os
from typing import Protocol

from msgspec import Struct

_PAGE = 4096
LIMIT = 64 << 20
"""The most that one structure is read as, in bytes: who asks for more has met a lie."""


class Window(Struct, frozen=True):
    """The bytes `[start, start + size)` of the open descriptor `fd`. Offsets count from `start`.

    The descriptor may be one for direct reads (O_DIRECT).
    """

    fd: int
    start: int
    size: int

    def read(self, at: int, length: int) -> bytes:
        """`length` bytes from `at`, fewer at the end of the window. Raises `OSError` where it cannot be read.

        Outside of the window, and beyond `LIMIT`, there is nothing: b"".
        """
        if at < 0 or length <= 0 or at >= self.size or length > LIMIT:
            return b""
        want = min(length, self.size - at)
        first = (self.start + at) // _PAGE * _PAGE
        skip = self.start + at - first
        # Whole pages at aligned addresses, as O_DIRECT wants; a file at its end gives fewer.
        with mmap.mmap(-1, -(-(skip + want) // _PAGE) * _PAGE) as buffer:
            done = 0
            while done < skip + want:
                with memoryview(buffer) as whole, whole[done:] as rest:
                    got = os.preadv(self.fd, [rest], first + done)
                done += got
                if not got or got % _PAGE:
                    break
            return buffer[skip : min(done, skip + want)]

    def part(self, start: int, size: int) -> Window:
        """The window `[start, start + size)` of this one, cut where this one ends."""
        begin = min(max(start, 0), self.size)
        return Window(self.fd, self.start + begin, max(0, min(size, self.size - begin)))


class Spread(Struct, frozen=True):
    """Several windows as one, in their order: a logical volume in pieces, say."""

    parts: tuple[Window, ...]

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(part.size for part in self.parts)

    def read(self, at: int, length: int) -> bytes:
        """As `Window.read`."""
        if at < 0 or length <= 0 or length > LIMIT:
            return b""
        out = []
        for part in self.parts:
            if length and at < part.size:
                out.append(part.read(at, min(length, part.size - at)))
                length -= len(out[-1])
                at = 0
            else:
                at -= part.size
            if not length:
                break
        return b"".join(out)


class Readable(Protocol):
    """A window, in one piece or in several."""

    @property
    def size(self) -> int:
        """How many bytes it has."""

    def read(self, at: int, length: int) -> bytes:
        """As `Window.read`."""
