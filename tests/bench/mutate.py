"""Changes to a disk image: a share of its pages at random, told as a changed-block map, and undone.

Invariant: only pages that hold data change, every byte of a changed page is new, and `undo` puts back
exactly what was there, so every tool and every round meets the same image before and after.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import sparse
from sparse import PAGE, Extent


@dataclass
class Change:
    """Changed stretches of one image, with what was there before."""

    image: Path
    before: list[tuple[int, bytes]]

    @property
    def extents(self) -> list[Extent]:
        """What changed, in order."""
        return sparse.merged([(start, len(data)) for start, data in self.before])

    def undo(self) -> None:
        """Put everything back."""
        with self.image.open("r+b") as file:
            for start, data in self.before:
                os.pwrite(file.fileno(), data, start)


def scatter(image: Path, count: int, seed: int, piece: int = PAGE) -> Change:
    """Overwrite `count` pieces of the image's data, chosen at random, with bytes that are half noise."""
    choice = random.Random(seed)
    extents = [
        (-(-start // piece) * piece, (start + length) // piece * piece)
        for start, length in sparse.data_extents(image)
    ]
    sums = list(itertools.accumulate(max(0, end - start) // piece for start, end in extents))
    picked = sorted(choice.sample(range(sums[-1]), count))
    ends = [(bisect.bisect_right(sums, number), number) for number in picked]
    places = [extents[at][1] - (sums[at] - number) * piece for at, number in ends]
    before: list[tuple[int, bytes]] = []
    with image.open("r+b") as file:
        for at in places:
            before.append((at, os.pread(file.fileno(), piece, at)))
            noise = choice.randbytes(piece // 2)
            os.pwrite(file.fileno(), noise + noise[: piece // 4] * 2, at)
    return Change(image, before)


def blocks_named(change: Change, block_size: int) -> int:
    """How many blocks a map of the change names."""
    return sparse.blocks_touched(change.extents, block_size)


def write_map(path: Path, change: Change) -> None:
    """The changed-block map of a change, as JSON extents."""
    found = {"size": change.image.stat().st_size, "extents": [list(extent) for extent in change.extents]}
    path.write_text(json.dumps(found))
