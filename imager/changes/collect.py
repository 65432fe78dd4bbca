"""Extents as they come out of a file, in bounded memory.

Invariant: what was added is covered by what comes out. Where there would be
too many extents, those with the smallest gaps between them are joined: a map
may name too much, and this names as little too much as can be.
"""

from __future__ import annotations

from itertools import pairwise

from imager.extents import Extents

MOST = 1 << 18
"Extents that are kept: some 30 MiB of memory."


class Collector:
    """Add ranges in any order; `result` has them sorted and joined."""

    def __init__(self, most: int = MOST) -> None:
        self.coarsened = False
        self._most = most
        self._ranges: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> None:
        """Add `[start, end)`."""
        ranges = self._ranges
        if ranges and ranges[-1][1] == start:
            ranges[-1] = (ranges[-1][0], end)
            return
        ranges.append((start, end))
        if len(ranges) >= 2 * self._most:
            self._reduce()

    def result(self, size: int) -> Extents:
        """All that was added, within `[0, size)`."""
        self._reduce()
        return Extents.of(self._ranges).clip(size)

    def _reduce(self) -> None:
        ranges = Extents.of(self._ranges).ranges
        excess = len(ranges) - self._most
        if excess <= 0:
            self._ranges = list(ranges)
            return
        self.coarsened = True
        widest = sorted(after[0] - before[1] for before, after in pairwise(ranges))[excess - 1]
        # Of the gaps that are exactly that wide, only so many are closed as have to be.
        ties = excess - sum(after[0] - before[1] < widest for before, after in pairwise(ranges))
        joined = [ranges[0]]
        for start, end in ranges[1:]:
            gap = start - joined[-1][1]
            if gap < widest or (gap == widest and ties > 0):
                ties -= gap == widest
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((start, end))
        self._ranges = joined
