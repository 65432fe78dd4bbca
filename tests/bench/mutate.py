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
    """Changed pieces of one image, with what was there before in a file beside it."""

    image: Path
    places: list[int]
    piece: int

    @property
    def saved(self) -> Path:
        """A file: the kernel counts this process's peak memory into that of every process it starts."""
        return self.image.with_name(self.image.name + ".before")

    @property
    def extents(self) -> list[Extent]:
        """What changed, in order."""
        return sparse.merged([(at, self.piece) for at in self.places])

    def undo(self) -> None:
        """Put everything back."""
        with self.image.open("r+b") as file, self.saved.open("rb") as before:
            for at in self.places:
                os.pwrite(file.fileno(), before.read(self.piece), at)
        self.saved.unlink()


def scatter(image: Path, count: int, seed: int, piece: int = PAGE) -> Change:
    """Overwrite `count` pieces of the image's data, chosen at random, with bytes that are half noise."""
    choice = random.Random(seed)
    change = Change(image, _places(image, count, choice, piece), piece)
    with image.open("r+b") as file, change.saved.open("wb") as before:
        for at in change.places:
            before.write(os.pread(file.fileno(), piece, at))
            noise = choice.randbytes(piece // 2)
            os.pwrite(file.fileno(), noise + noise[: piece // 4] * 2, at)
    return change


def _places(image: Path, count: int, choice: random.Random, piece: int) -> list[int]:
    """Where whole pieces of data lie: `count` of them, in order."""
    extents = [
        (-(-start // piece) * piece, (start + length) // piece * piece)
        for start, length in sparse.data_extents(image)
    ]
    sums = list(itertools.accumulate(max(0, end - start) // piece for start, end in extents))
    picked = sorted(choice.sample(range(sums[-1]), count))
    ends = [(bisect.bisect_right(sums, number), number) for number in picked]
    return [extents[at][1] - (sums[at] - number) * piece for at, number in ends]


def blocks_named(change: Change, block_size: int) -> int:
    """How many blocks a map of the change names."""
    return sparse.blocks_touched(change.extents, block_size)


def write_map(path: Path, change: Change) -> None:
    """The changed-block map of a change, as JSON extents."""
    found = {"size": change.image.stat().st_size, "extents": [list(extent) for extent in change.extents]}
    path.write_text(json.dumps(found))
