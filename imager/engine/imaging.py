"""Imaging one source: from the ranges to read to a finished block map.

Invariant: every block of the image ends up with a slot that was read now, or
is the base's and counts as unchanged by a map that was believed, or is a
hole. Memory is bounded: leaves whose packs are still open are counted, and a
pack is sealed early before they become too many.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import groupby

from msgspec import Struct

from imager import _native
from imager._native import UNUSED, Slots
from imager.engine.source import Opened
from imager.errors import ImagerError, SourceError
from imager.events import Reporter
from imager.extents import Extents
from imager.repository import index
from imager.repository.blockmap import MapReader
from imager.repository.format import PACK_TARGET, PAGE_SLOTS
from imager.repository.knownpages import KnownPages
from imager.repository.manifest import Root
from imager.repository.mapwriter import Leaf, MapWriter
from imager.repository.session import Session, writing_failed

SEGMENT = 64 << 20
"Bytes that one native call handles: so long an interruption waits."
_SLOW_SEGMENT = 8 << 20
"The same where compression takes its time."
_STREAM = 32 << 20
_MAX_PENDING = 2048
_MAX_LEAVES = 1024


_Work = tuple[Leaf, list[tuple[int, int]], Extents]
"A leaf, the ranges of blocks to read, and those that are not in use."


class Figures(Struct):
    """What imaging one source came to."""

    blocks_read: int = 0
    blocks_changed: int = 0
    blocks_new: int = 0
    blocks_shared: int = 0
    blocks_zero: int = 0
    bytes_read: int = 0
    bytes_stored: int = 0


class Imaged(Struct, frozen=True):
    """An image that is read: its size, what of it could not be (start, length)."""

    size: int
    unreadable: tuple[tuple[int, int], ...]
    figures: Figures


class Settings(Struct, frozen=True):
    """How blocks are read and stored. codec: 0 none, 1 lz4, 2 zstd; threads 0: one for each core."""

    block_size: int
    codec: int
    level: int
    threads: int
    skip_errors: bool

    @property
    def segment(self) -> int:
        """Bytes that one native call handles."""
        return _SLOW_SEGMENT if self.codec == 2 and self.level > 3 else SEGMENT


class Stopped(Exception):
    """`Imaging.stopped` was set: whoever set it knows why."""


class Imaging:
    """One source on its way into the repository. Set `stopped` from any thread to end it soon."""

    def __init__(
        self,
        session: Session,
        known: _native.Known,
        settings: Settings,
        base: MapReader | None,
        reporter: Reporter,
        size: int,
        stored: KnownPages | None = None,
    ) -> None:
        self._session = session
        self._repository = session.repository
        self._known = known
        self._settings = settings
        self._reporter = reporter
        self._size = size
        self._writer = MapWriter(session, -(-size // settings.block_size), base, stored)
        self._pack: _native.PackWriter | None = None
        self._lost: list[tuple[int, int]] = []
        self._warned = False
        self._open_leaf: Leaf | None = None
        self.stopped = False
        self.figures = Figures()

    def follow(self, earlier: Imaging) -> None:
        """Take the place of one that has to be begun anew: what it read and stored counts, too."""
        for name in ("blocks_read", "blocks_new", "bytes_read", "bytes_stored"):
            setattr(self.figures, name, getattr(earlier.figures, name))
        # Whoever wanted to stop the work may have told the other one.
        self.stopped = self.stopped or earlier.stopped

    # --- files and devices -------------------------------------------------------------

    def read(
        self, source: Opened, wanted: Extents, elsewhere: int | None, unused: Extents | None = None
    ) -> Imaged:
        """Image `source`. `wanted`: ranges of blocks to read; those of `unused` are not in use, and
        not read; the others are of type `elsewhere`, or as in the base where that is None.

        Raises `SourceError`, `StorageError`.
        """
        unused = unused or Extents()
        if elsewhere is None and (untold := self._writer.untold(wanted | unused)):
            wanted |= untold
            self._warn_once()
        wanted -= unused
        whole, parts = _unused_leaves(unused, self._writer.blocks)
        batch: list[_Work] = []
        blocks = 0
        position = 0
        for number, ranges in _by_leaf(wanted, parts):
            self._gap(position, number, elsewhere, whole)
            position = number + 1
            leaf = self._leaf(number)
            out = parts.get(number, Extents())
            if elsewhere is None and not leaf.known:
                # The base does not tell what the unread blocks of this leaf are.
                start = number * PAGE_SLOTS
                ranges = list(Extents.of([(start, start + len(leaf.slots))]) - out)
            batch.append((leaf, ranges, out))
            blocks += sum(end - start for start, end in ranges)
            if blocks * self._settings.block_size >= self._settings.segment or len(batch) >= _MAX_LEAVES:
                self._scan(batch, source, elsewhere)
                batch, blocks = [], 0
        if batch:
            self._scan(batch, source, elsewhere)
        self._gap(position, -(-self._writer.blocks // PAGE_SLOTS), elsewhere, whole)
        source.check_unchanged()
        return self._finish()

    def _gap(self, start: int, end: int, elsewhere: int | None, whole: Extents) -> None:
        """Leaves `[start, end)` of which nothing is read: not in use, or what all else is."""
        if start >= end:
            return
        here = Extents.of([(start, end)])
        gaps = [(low, high, UNUSED) for low, high in whole & here]
        if elsewhere is not None:
            gaps += [(low, high, elsewhere) for low, high in here - whole]
        for low, high, kind in sorted(gaps):
            self._writer.uniform(low, high, kind)

    def _scan(self, batch: list[_Work], source: Opened, elsewhere: int | None) -> None:
        """Read what a batch of leaves needs, in calls of about `SEGMENT` bytes, then put the leaves."""
        most = max(1, self._settings.segment // self._settings.block_size)
        ranges: list[tuple[int, int]] = []
        base = Slots()
        parts: list[tuple[Leaf, int, int, int]] = []
        for leaf, wanted, unused in batch:
            first = leaf.index * PAGE_SLOTS
            known = leaf.slots if elsewhere is None and not unused else leaf.slots.copy()
            if elsewhere is not None:
                leaf.slots.fill(0, len(leaf.slots), elsewhere)
            for low, high in unused:
                leaf.slots.fill(low - first, high - first, UNUSED)
            for low, high in wanted:
                while low < high:
                    end = min(high, low + most - len(base))
                    parts.append((leaf, low - first, len(base), len(base) + end - low))
                    base.extend(known.slice(low - first, end - first))
                    if ranges and ranges[-1][1] == low:
                        ranges[-1] = (ranges[-1][0], end)
                    else:
                        ranges.append((low, end))
                    low = end
                    if len(base) >= most:
                        self._place(self._call(source.fd, ranges, base, source), parts)
                        ranges, base, parts = [], Slots(), []
        if ranges:
            self._place(self._call(source.fd, ranges, base, source), parts)
        for leaf, _, _ in batch:
            self._writer.put(leaf)
        self._settle()

    @staticmethod
    def _place(slots: Slots, parts: list[tuple[Leaf, int, int, int]]) -> None:
        for leaf, at, low, high in parts:
            leaf.slots.put(at, slots.slice(low, high))

    def _leaf(self, number: int) -> Leaf:
        leaf = self._writer.leaf(number)
        if leaf.harmed:
            self._warn_once()
        return leaf

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            self._reporter.warn(
                "parts of the base set are damaged or missing: the blocks there are read and stored again",
                hint="this set will be whole; imager check tells what happened to the others",
            )

    # --- streams -------------------------------------------------------------------------

    def stream(self, fd: int, path: str) -> Imaged:
        """Image a stream to its end. Raises `SourceError`, `StorageError`."""
        buffer = memoryview(bytearray(_STREAM))
        self._writer.growing = True
        while count := _fill(fd, path, buffer):
            offset, self._size = self._size, self._size + count
            self._writer.blocks = -(-self._size // self._settings.block_size)
            self._stream_segment(bytes(buffer[:count]), offset)
            if count < _STREAM:
                break
        self._writer.growing = False
        if self._open_leaf is not None:
            self._writer.put(self._open_leaf)
            self._open_leaf = None
        self._settle()
        return self._finish()

    def _stream_segment(self, data: bytes, offset: int) -> None:
        block = self._settings.block_size
        first, last = offset // block, -(-(offset + len(data)) // block)
        leaves: list[Leaf] = []
        if self._open_leaf is not None and self._open_leaf.index < first // PAGE_SLOTS:
            self._writer.put(self._open_leaf)
        for number in range(first // PAGE_SLOTS, -(-last // PAGE_SLOTS)):
            leaf = self._open_leaf if self._open_leaf and self._open_leaf.index == number else None
            if leaf is None:
                leaf = self._leaf(number)
            elif len(leaf.slots) < self._writer.length(number):
                grown = self._leaf(number)
                grown.slots.put(0, leaf.slots)
                leaf = grown
            leaves.append(leaf)
        base, parts = Slots(), []
        for leaf in leaves:
            low = max(first - leaf.index * PAGE_SLOTS, 0)
            high = min(last - leaf.index * PAGE_SLOTS, len(leaf.slots))
            parts.append((leaf, low, len(base), len(base) + high - low))
            base.extend(leaf.slots.slice(low, high))
        self._place(self._call(data, [(first, last)], base, None, offset), parts)
        for leaf in leaves[:-1]:
            self._writer.put(leaf)
        self._open_leaf = leaves[-1]
        self._settle()

    # --- what both do -----------------------------------------------------------------------

    def _call(
        self,
        data: int | bytes,
        ranges: list[tuple[int, int]],
        base: Slots,
        source: Opened | None,
        offset: int = 0,
    ) -> Slots:
        if self.stopped:
            raise Stopped
        if self._pack is None:
            self._pack = self._session.new_data_pack()
        settings = self._settings
        try:
            found = _native.scan(
                self._repository.vault,
                data,
                ranges,
                image_size=self._size,
                block_size=settings.block_size,
                base=base,
                pack=self._pack,
                known=self._known,
                codec=settings.codec,
                level=settings.level,
                threads=settings.threads,
                direct=source.direct if source else False,
                source_offset=offset,
                skip_errors=settings.skip_errors,
                sector=source.sector if source else 512,
            )
        except _native.ReadError as error:
            raise read_failed(source.path if source else "the stream", error) from error
        except _native.WriteError as error:
            raise writing_failed(self._repository, error) from error
        figures = self.figures
        figures.blocks_read += sum(end - start for start, end in ranges)
        figures.blocks_changed += found.changed
        figures.blocks_new += found.new
        figures.blocks_shared += found.shared
        figures.blocks_zero += found.zero
        figures.bytes_read += found.read
        figures.bytes_stored += found.stored
        self._lost += found.unreadable
        self._reporter.advance(found.read, stored=found.stored)
        if self._pack.size >= PACK_TARGET:
            self.seal()
        return found.slots

    def _settle(self) -> None:
        """Seal the pack where too many leaves wait for its name; write the leaves that can be written."""
        if self._writer.pending >= _MAX_PENDING:
            self.seal()
        if self._writer.pending >= _MAX_PENDING // 2 or self._pack is None:
            self._writer.flush()
        if self._known.pending >= index.SEGMENT_ENTRIES:
            index.write_segment(self._session, self._known, self._reporter, reload=True)

    def seal(self) -> None:
        """Seal the open pack, so that every map that refers to it can be written."""
        if self._pack is not None:
            self._session.seal(self._pack)
            self._pack = None

    def _finish(self) -> Imaged:
        self.seal()
        lost = Extents.of(self._lost)
        return Imaged(self._size, tuple((start, end - start) for start, end in lost), self.figures)

    def write_map(self) -> Root | None:
        """Write the map; all packs of the session must be sealed. Raises `StorageError`."""
        return self._writer.finish()


def read_failed(path: str, error: _native.ReadError) -> ImagerError:
    """The error for a source that could not be read."""
    at = f" at byte {error.filename}" if error.filename is not None else ""
    if not error.errno:
        return SourceError(
            f"{path} ended early{at}: it shrank while it was read",
            hint="nothing was kept; back up again when it is at rest",
        )
    said = os.strerror(error.errno)
    hint = "a failing disk? --on-read-error skip records what cannot be read, and goes on"
    return SourceError(f"{path} cannot be read{at}: {said}", hint=hint)


def _by_leaf(wanted: Extents, parts: Mapping[int, Extents]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Ranges of blocks, leaf by leaf; leaves of `parts` come too where nothing of them is wanted."""
    left = iter(sorted(parts))
    part = next(left, None)
    for number, ranges in groupby(wanted.cut(PAGE_SLOTS), key=lambda piece: piece[0] // PAGE_SLOTS):
        while part is not None and part <= number:
            if part < number:
                yield part, []
            part = next(left, None)
        yield number, list(ranges)
    while part is not None:
        yield part, []
        part = next(left, None)


def _unused_leaves(unused: Extents, blocks: int) -> tuple[Extents, dict[int, Extents]]:
    """Ranges of leaves that are not in use throughout; of the other leaves, which blocks are not."""
    whole: list[tuple[int, int]] = []
    parts: dict[int, list[tuple[int, int]]] = {}
    for start, end in unused:
        first = -(-start // PAGE_SLOTS)
        last = end // PAGE_SLOTS if end < blocks else -(-blocks // PAGE_SLOTS)
        if first >= last:
            first = last = -(-end // PAGE_SLOTS)
        whole.append((first, last))
        for low, high in ((start, min(end, first * PAGE_SLOTS)), (max(start, last * PAGE_SLOTS), end)):
            for piece in Extents.of([(low, high)]).cut(PAGE_SLOTS):
                parts.setdefault(piece[0] // PAGE_SLOTS, []).append(piece)
    return Extents.of(whole), {number: Extents.of(pieces) for number, pieces in parts.items()}


def _fill(fd: int, path: str, buffer: memoryview) -> int:
    """Read until the buffer is full or the stream ends: how many bytes. Raises `SourceError`."""
    count = 0
    while count < len(buffer):
        try:
            got = os.readv(fd, [buffer[count:]])
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from error
        if not got:
            break
        count += got
    return count
