"""Sets of byte ranges: what changed, what is used, what could not be read.

Invariant: an `Extents` value is sorted, without overlaps, without touching
neighbours and without empty ranges; so equal sets compare equal.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator

from msgspec import Struct


class Extents(Struct, frozen=True):
    """A set of half-open ranges `(start, end)`, in bytes unless the caller says blocks."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> Extents:
        """Normalise any ranges `(start, end)`: sort, merge, drop the empty."""
        merged: list[tuple[int, int]] = []
        for start, end in sorted(r for r in ranges if r[0] < r[1]):
            if merged and start <= merged[-1][1]:
                if end > merged[-1][1]:
                    merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        return cls(tuple(merged))

    @classmethod
    def whole(cls, size: int) -> Extents:
        return cls.of([(0, size)])

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.ranges)

    def __len__(self) -> int:
        return len(self.ranges)

    def __bool__(self) -> bool:
        return bool(self.ranges)

    @property
    def total(self) -> int:
        """How much is covered."""
        return sum(end - start for start, end in self.ranges)

    def __contains__(self, point: int) -> bool:
        at = bisect_right(self.ranges, (point, float("inf"))) - 1
        return at >= 0 and self.ranges[at][0] <= point < self.ranges[at][1]

    def __or__(self, other: Extents) -> Extents:
        return Extents.of([*self.ranges, *other.ranges])

    def __and__(self, other: Extents) -> Extents:
        out: list[tuple[int, int]] = []
        a, b = self.ranges, other.ranges
        i = j = 0
        while i < len(a) and j < len(b):
            start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
            if start < end:
                out.append((start, end))
            if a[i][1] < b[j][1]:
                i += 1
            else:
                j += 1
        return Extents(tuple(out))

    def __sub__(self, other: Extents) -> Extents:
        if not self.ranges:
            return self
        return self & other.complement(self.ranges[-1][1])

    def complement(self, size: int) -> Extents:
        """What of `[0, size)` is not covered."""
        out: list[tuple[int, int]] = []
        position = 0
        for start, end in self.ranges:
            if start >= size:
                break
            if position < start:
                out.append((position, start))
            position = end
        if position < size:
            out.append((position, size))
        return Extents(tuple(out))

    def clip(self, size: int) -> Extents:
        """What lies within `[0, size)`."""
        return self & Extents.whole(size)

    def cut(self, size: int) -> Iterator[tuple[int, int]]:
        """The ranges, cut where multiples of `size` lie within."""
        for start, end in self.ranges:
            while start < end:
                stop = min(end, (start // size + 1) * size)
                yield start, stop
                start = stop

    def blocks(self, block_size: int) -> Extents:
        """The numbers of the blocks that are touched, as ranges of block numbers."""
        return Extents.of((start // block_size, -(-end // block_size)) for start, end in self.ranges)

    def scale(self, block_size: int) -> Extents:
        """Ranges of block numbers as ranges of bytes."""
        return Extents(tuple((start * block_size, end * block_size) for start, end in self.ranges))
