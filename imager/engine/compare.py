"""Holding a device or a file against an image's block map.

Invariant: every block of a window is decided by its content, hashed against
the map, or by the filesystem's word that it is a hole; nothing passes unread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator

from msgspec import Struct

from imager._native import ReadError, Slots, Vault, non_zero, scan
from imager.engine.windows import SEGMENT_BYTES, Ranges, Window, runs_of
from imager.errors import ImagerError, SourceError
from imager.events import Reporter
from imager.extents import Extents


class Geometry(Struct, frozen=True):
    """An image's size and block size in bytes."""

    size: int
    block_size: int

    @property
    def blocks(self) -> int:
        return -(-self.size // self.block_size)

    @property
    def segment(self) -> int:
        """Blocks that one native call handles."""
        return max(1, SEGMENT_BYTES // self.block_size)

    def length(self, start: int, end: int) -> int:
        """Bytes of the blocks `[start, end)`."""
        return max(0, min(end * self.block_size, self.size) - start * self.block_size)

    def total(self, ranges: Iterable[tuple[int, int]]) -> int:
        return sum(self.length(start, end) for start, end in ranges)

    def extents(self, blocks: Extents) -> Extents:
        """Ranges of blocks as ranges of bytes."""
        return blocks.scale(self.block_size).clip(self.size)


class Readable(Struct, frozen=True):
    """What is compared. `direct`: opened with O_DIRECT. `sparse`: its holes can be asked for.

    `failure` is the class of error that a failing read becomes.
    """

    fd: int
    path: str
    size: int
    direct: bool = False
    sparse: bool = False
    failure: type[ImagerError] = SourceError


def open_readable(
    path: str, *, name: str | None = None, failure: type[ImagerError] = SourceError
) -> Readable:
    """Open a device (past the page cache) or a file. The caller closes `fd`. Raises `failure`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            return Readable(fd, name or path, os.fstat(fd).st_size, sparse=True, failure=failure)
        from imager.device import blockio

        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        os.close(fd)
        return Readable(direct, name or path, blockio.size(direct), direct=True, failure=failure)
    except OSError as error:
        raise failure(f"cannot read {name or path}: {error.strerror}") from error


def unreadable(what: Readable, error: ReadError) -> ImagerError:
    """The error for a read that failed. The core keeps the offset where OSError keeps a file's name."""
    return what.failure(f"{what.path} cannot be read at byte {error.filename}: {error.strerror or error}")


class Comparer:
    """Compares windows of one image with one device or file."""

    def __init__(
        self,
        vault: Vault,
        geometry: Geometry,
        what: Readable,
        reporter: Reporter,
        threads: int = 0,
    ) -> None:
        self._vault = vault
        self._geometry = geometry
        self._what = what
        self._reporter = reporter
        self._threads = threads

    def differing(self, window: Window, within: Extents | None = None) -> Extents:
        """Block numbers of the window (and of `within`) whose content is not the map's.

        Raises the class of error that `what` names, with the offset that cannot be read.
        """
        try:
            found: Ranges = []
            ranges = window.ranges if within is None else within
            for part, slots in window.select(ranges, self._geometry.segment):
                wanted = Extents(tuple(part))
                read = (
                    wanted
                    if not self._what.sparse
                    else self._not_holes(wanted, runs_of(part, slots, data=True))
                )
                if read:
                    few = Window(part[0][0], part[-1][1], slots, part)
                    for pieces, base in few.select(read, self._geometry.segment):
                        found += self._scan(pieces, base)
                self._reporter.advance(self._geometry.total(part))
            runs = Extents(tuple(window.runs))
            for start, end in runs if within is None else runs & within:
                found += self._run(start, end)
            return Extents.of(found)
        except ReadError as error:
            raise unreadable(self._what, error) from error

    def _scan(self, ranges: Ranges, base: Slots) -> Ranges:
        result = scan(
            self._vault,
            self._what.fd,
            ranges,
            image_size=self._geometry.size,
            block_size=self._geometry.block_size,
            base=base,
            threads=self._threads,
            direct=self._what.direct,
        )
        return result.differing

    def _not_holes(self, wanted: Extents, data: Iterator[tuple[int, int]]) -> Extents:
        """What must be read: where data is expected, and where the file has data."""
        found: Ranges = []
        for start, end in wanted:
            found += self._data_blocks(start, end)
        return Extents.of([*data, *(Extents.of(found) & wanted)])

    def _data_blocks(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        from imager.changes import holes

        size = self._geometry.block_size
        stop = start * size + self._geometry.length(start, end)
        for low, high in holes.walk(self._what.fd, start * size, stop, size):
            yield low // size, -(-high // size)

    def _run(self, start: int, end: int) -> Ranges:
        """A run of zeroes, of any length."""
        found: Ranges = []
        size, step = self._geometry.block_size, self._geometry.segment
        parts = self._data_blocks(start, end) if self._what.sparse else iter([(start, end)])
        done = start
        for low, high in parts:
            for first in range(low, high, step):
                last = min(first + step, high)
                stop = first * size + self._geometry.length(first, last)
                pages = non_zero(
                    self._what.fd, first * size, stop, direct=self._what.direct, threads=self._threads
                )
                found += [(page // size, -(-page_end // size)) for page, page_end in pages]
                self._reporter.advance(self._geometry.length(done, last))
                done = last
        self._reporter.advance(self._geometry.length(done, end))
        return found
