"""A random sample of blocks that a map calls unchanged.

Invariant: the sample is drawn uniformly, without repeats, from the unnamed
blocks only, by the system's random numbers, so that nobody who makes a map
can know which blocks will be looked at.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from itertools import accumulate

from imager.extents import Extents

LEAST = 16
SHARE = 1000  # one unnamed block in a thousand
_NONE = Extents()
CAP = 20  # at most one sampled block for twenty named ones, beyond LEAST


def count(named: int, unnamed: int) -> int:
    """How many of `unnamed` blocks to look at, where a map names `named`."""
    return min(unnamed, max(LEAST, min(-(-unnamed // SHARE), named // CAP)))


def choose(named: Extents, blocks: int, skip: Extents = _NONE) -> list[int]:
    """Block numbers to check, increasing. `named` has ranges of block numbers, `blocks` is the image's.

    `skip`: blocks that are not looked at either, without being named.
    """
    rest = (named | skip).complement(blocks).ranges
    ends = list(accumulate(end - start for start, end in rest))
    unnamed = ends[-1] if ends else 0
    wanted = count(named.clip(blocks).total, unnamed)
    picked: set[int] = set(range(unnamed)) if wanted == unnamed else set()
    while len(picked) < wanted:
        # 64 random bits over fewer than 2^52 blocks: the bias is below 2^-12 of nothing that matters.
        picked.add(int.from_bytes(os.urandom(8)) % unnamed)
    return [_nth(rest, ends, at) for at in sorted(picked)]


def _nth(rest: tuple[tuple[int, int], ...], ends: list[int], at: int) -> int:
    index = bisect_right(ends, at)
    before = ends[index - 1] if index else 0
    return rest[index][0] + at - before
