"""One byte of a stored block changed, in a copy of the repository.

Invariant: the lab's own repository is never touched: the copy shares its
objects (hard links) except the damaged one; and what the byte belongs to is
worked out from the undamaged block maps, before any check is asked.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from imager._native import DATA
from imager.engine import images
from imager.engine.windows import pieces
from imager.errors import ImagerError
from imager.extents import Extents
from imager.repository.format import KIND_DATA, pack_object
from imager.repository.repository import Repository

_HEAD = 64
_Place = tuple[bytes, int, int, int]
"""Of a block: its id, and the record's pack number, offset and length."""


class Wound(Struct, frozen=True):
    """A byte to damage. `extents`: what each set loses by it, in bytes of its disk; `pack` in hex."""

    pack: str
    file: str
    offset: int
    extents: dict[str, Extents]

    def touched(self) -> tuple[str, ...]:
        """The ids of the sets that lose something."""
        return tuple(one for one, extents in self.extents.items() if extents)

    def inflict(self, repository: Path, copy: Path) -> None:
        """Make `copy`, a repository like that at `repository` but for the damaged byte."""
        for folder, _, files in os.walk(repository):
            there = copy / os.path.relpath(folder, repository)
            there.mkdir(parents=True, exist_ok=True)
            for name in files:
                os.link(Path(folder, name), there / name)
        damaged = copy / self.file
        damaged.unlink()
        shutil.copyfile(repository / self.file, damaged)
        with damaged.open("r+b", buffering=0) as file:
            before = os.pread(file.fileno(), 1, self.offset)
            os.pwrite(file.fileno(), bytes([before[0] ^ 0x40]), self.offset)
            os.fsync(file.fileno())


def choose(repository: Repository, sets: list[str]) -> Wound:
    """A block that the last set holds and the first does not, so that a check must tell them apart.

    Raises `ImagerError` where there is none.
    """
    held = {one: _blocks(repository, one) for one in sets}
    first = {place[0] for place in held[sets[0]].values()}
    own = [place for _, place in sorted(held[sets[-1]].items()) if place[0] not in first]
    if not own:
        raise ImagerError("the last set has no block of its own: the changes changed nothing")
    block, pack, offset, length = own[len(own) // 2]
    name = repository.names.name(pack)
    if name is None:
        raise ImagerError("the block map names a pack that has no name")
    extents = {}
    for one, blocks in held.items():
        geometry = images.select_one(repository, one).geometry
        lost = Extents.of((number, number + 1) for number, place in blocks.items() if place[0] == block)
        extents[one] = geometry.extents(lost)
    at = offset + _HEAD + (length - _HEAD) // 2
    return Wound(name.hex(), pack_object(KIND_DATA, name), at, extents)


def _blocks(repository: Repository, text: str) -> dict[int, _Place]:
    return dict(_walk(repository, text))


def _walk(repository: Repository, text: str) -> Iterator[tuple[int, _Place]]:
    for window in images.select_one(repository, text).windows():
        for first, slots in pieces(window):
            for kind, start, end in slots.runs():
                for at in range(start, end) if kind == DATA else ():
                    yield first + at, slots.get(at)[1:]
