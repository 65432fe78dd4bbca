"""An image's block map, a bounded piece at a time.

Invariant: memory follows the number of blocks that hold data in one window,
never the size of the image; every block of the walk is in exactly one
window, and there either in `ranges` (with its slot), in `runs` (zeroes), or in
`unused` (what no filesystem used, and no content was kept of).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from msgspec import Struct, field

from imager._native import DATA, UNUSED, Slots
from imager.extents import Extents
from imager.units import MIB

WINDOW = 1 << 18
"Slots held at once: 16 GiB of data at 64 KiB a block, some 40 MiB of memory."
SEGMENT_BYTES = 256 * MIB
"Image bytes that one comparison call handles: progress and interruption wait that long."

Ranges = list[tuple[int, int]]
Piece = tuple[int, int, Slots | int]
"What a walk over a map yields: first block, number of blocks, their slots or their one type."


class Window(Struct):
    """Blocks `[first, end)`, as far as the walk covered them."""

    first: int
    end: int
    slots: Slots = field(default_factory=lambda: Slots(0))
    ranges: Ranges = field(default_factory=list)
    runs: Ranges = field(default_factory=list)
    unused: Ranges = field(default_factory=list)

    def zeroed(self) -> Window:
        """The same window, where what is unused counts as zeroes."""
        if not self.unused:
            return self
        runs = Extents.of([*self.runs, *self.unused])
        return Window(self.first, self.end, self.slots, self.ranges, list(runs))

    def segments(self, blocks: int) -> Iterator[tuple[Ranges, Slots]]:
        """The slots, at most `blocks` at a time, with the block numbers they belong to."""
        yield from self.select(self.ranges, blocks)

    def select(self, wanted: Iterable[tuple[int, int]], blocks: int) -> Iterator[tuple[Ranges, Slots]]:
        """The slots of the blocks that lie in `wanted` too (sorted), at most `blocks` at a time."""
        out: Ranges = []
        slots = Slots(0)
        for start, end, at in _located(self.ranges, wanted):
            while start < end:
                step = min(end - start, blocks - len(slots))
                slots.extend(self.slots.slice(at, at + step))
                push(out, start, start + step)
                start, at = start + step, at + step
                if len(slots) == blocks:
                    yield out, slots
                    out, slots = [], Slots(0)
        if out:
            yield out, slots

    def zeroes(self) -> Iterator[tuple[int, int]]:
        """Ranges of blocks that read as zeroes: by pages, then by slots."""
        yield from self.runs
        yield from runs_of(self.ranges, self.slots, data=False)

    def data(self) -> tuple[int, int]:
        """How many blocks hold data, and how many read as zeroes."""
        data = self.slots.counts()[3]
        return data, len(self.slots) - data + sum(end - start for start, end in self.runs)


def pieces(window: Window) -> Iterator[tuple[int, Slots]]:
    """(first block, slots) of each range of a window."""
    at = 0
    for start, end in window.ranges:
        whole = end - start == len(window.slots)
        yield start, window.slots if whole else window.slots.slice(at, at + end - start)
        at += end - start


def push(ranges: Ranges, start: int, end: int) -> None:
    """Append `[start, end)`, joined to the last range where they touch."""
    if ranges and ranges[-1][1] == start:
        ranges[-1] = (ranges[-1][0], end)
    else:
        ranges.append((start, end))


def windows(walk: Iterable[Piece], limit: int = WINDOW) -> Iterator[Window]:
    """Cut a walk into windows of at most `limit` slots (or pages' runs)."""
    window: Window | None = None
    for first, count, what in _apart(walk):
        weight = 1 if isinstance(what, int) else count
        if (
            window is None
            or (window.ranges or window.runs or window.unused)
            and (len(window.slots) + len(window.runs) + len(window.unused) + weight > limit)
        ):
            if window is not None:
                yield window
            window = Window(first, first)
        if isinstance(what, int):
            push(window.unused if what == UNUSED else window.runs, first, first + count)
        else:
            window.slots.extend(what)
            push(window.ranges, first, first + count)
        window.end = first + count
    if window is not None:
        yield window


def _apart(walk: Iterable[Piece]) -> Iterator[Piece]:
    """A walk, with what is unused in pieces of its own."""
    for first, count, what in walk:
        if isinstance(what, int) or not what.counts()[1]:
            yield first, count, what
            continue
        at = 0
        for kind, low, high in what.runs():
            if kind == UNUSED:
                if at < low:
                    yield first + at, low - at, what.slice(at, low)
                yield first + low, high - low, UNUSED
                at = high
        if at < count:
            yield first + at, count - at, what.slice(at, count)


def runs_of(ranges: Ranges, slots: Slots, *, data: bool) -> Iterator[tuple[int, int]]:
    """Ranges of block numbers whose slots hold data, or hold none. `slots` are those of `ranges`."""
    wanted = ((start, end) for kind, start, end in slots.runs() if (kind == DATA) == data)
    at = index = 0  # position in slots, and the range that it lies in
    last: tuple[int, int] | None = None
    for start, end in wanted:
        while start < end:
            low, high = ranges[index]
            if start >= at + high - low:
                at += high - low
                index += 1
                continue
            first = low + start - at
            step = min(end - start, high - first)
            if last is not None and last[1] == first:
                last = (last[0], first + step)
            else:
                if last is not None:
                    yield last
                last = (first, first + step)
            start += step
    if last is not None:
        yield last


def _located(ranges: Ranges, wanted: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(start, end, position) of each common piece; position counts through all `ranges`."""
    at = index = 0
    for start, end in wanted:
        while index < len(ranges) and ranges[index][1] <= start:
            at += ranges[index][1] - ranges[index][0]
            index += 1
        here, position = index, at
        while here < len(ranges) and ranges[here][0] < end:
            low, high = ranges[here]
            first, last = max(low, start), min(high, end)
            if first < last:
                yield first, last, position + first - low
            position += high - low
            here += 1
