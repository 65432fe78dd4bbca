"""Blocks that a backup leaves out, because no filesystem of the source uses them.

Invariant: a block is left out only where every byte of it is unused by a map
that was believed before the source was read and was the same afterwards; gaps,
tables, and the first and last MiB of every partition are always imaged. A
block that the base left out and that is in use now is always read, whatever a
map of changes says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from imager._native import UNUSED
from imager.engine.source import Opened
from imager.extents import Extents
from imager.filesystem import whole
from imager.filesystem.used import Unknown, Used
from imager.filesystem.whole import Part
from imager.repository.blockmap import DamagedPage, MapReader
from imager.repository.imageset import Image, Manifest
from imager.repository.repository import Repository
from imager.units import KIB, MIB, format_size

EDGE = MIB
"Of each partition so much is imaged at either end: boot code, and what else is looked for at such places."
_STATE = 128 * KIB
"Bytes at a partition's beginning that stay the same while its filesystem is not written."
WRITTEN = "it was written to while it was read"


class PartUse(Struct, frozen=True):
    """A partition (`number`; None: the source is not divided), as a set tells of it. Sizes in bytes.

    `used`: what was imaged, `read`: how much of that was read. `kind`: what is on it, or empty.
    `note` is of the map that was taken; where `every_block` is not empty there was none, for that reason.
    """

    number: int | None
    start: int
    size: int
    used: int
    read: int = 0
    kind: str = ""
    note: str = ""
    every_block: str = ""

    def describe(self) -> str:
        """The part in one line for a person."""
        what = "all of it" if self.number is None else f"partition {self.number}"
        what += f", {self.kind}" if self.kind else ""
        read, size = format_size(self.read), format_size(self.size)
        if self.every_block:
            return f"{what}: {read} read, every block of {size}: {self.every_block}"
        said = f"{what}: {read} read, {format_size(self.used)} of {size} in use"
        return said + (f" ({self.note})" if self.note else "")


class _Told(Struct, frozen=True):
    """`changes` of one image in a manifest, where its used blocks were asked for."""

    source: str
    unused: int
    parts: tuple[PartUse, ...]


class Unused(Struct, frozen=True):
    """Numbers of the blocks that are left out, and how that is known, part by part."""

    blocks: Extents = Extents()
    parts: tuple[Part, ...] = ()
    states: tuple[bytes, ...] = ()
    block_size: int = 0
    size: int = 0

    @property
    def bytes(self) -> int:
        """Bytes that are left out."""
        return self.blocks.scale(self.block_size).clip(self.size).total

    def uses(self, wanted: Extents) -> tuple[PartUse, ...]:
        """Each part, where the blocks `wanted` were read."""
        read = (wanted - self.blocks).scale(self.block_size).clip(self.size)
        used = self.blocks.scale(self.block_size).complement(self.size)
        out = []
        for part in self.parts:
            here = Extents.of([(part.start, part.start + part.size)])
            answer = part.answer
            use = PartUse(
                part.number, part.start, part.size, (used & here).total, (read & here).total, answer.kind
            )
            if isinstance(answer, Used):
                out.append(replace(use, note=answer.note))
            else:
                out.append(replace(use, every_block=answer.reason))
        return tuple(out)

    def told(self, change_source: str, wanted: Extents) -> Any:
        """What the set says of how the blocks to read were found: `changes` in its manifest."""
        if not self.parts:
            return change_source
        return msgspec.to_builtins(_Told(change_source, self.bytes, self.uses(wanted)))

    def moved(self, opened: Opened) -> tuple[int, ...]:
        """Positions in `parts` of those whose map may not be true any longer: asked when all is read."""
        mine = [at for at, part in enumerate(self.parts) if isinstance(part.answer, Used)]
        if not mine:
            return ()
        now = _look(opened)
        if [(part.number, part.start, part.size) for part in now] != [
            (part.number, part.start, part.size) for part in self.parts
        ]:
            return tuple(mine)
        return tuple(
            at
            for at in mine
            if now[at].answer != self.parts[at].answer or _state(opened, now[at]) != self.states[at]
        )

    def without(self, moved: Iterable[int]) -> Unused:
        """The same, with every block of some parts."""
        parts = list(self.parts)
        for at in moved:
            parts[at] = replace(parts[at], answer=Unknown(WRITTEN, parts[at].answer.kind))
        return _of(tuple(parts), self.states, self.block_size, self.size)


def find(opened: Opened, block_size: int) -> Unused:
    """What of a source is not in use. Reads filesystems' metadata.

    Whoever leaves these blocks out asks `moved` when the others are read.
    """
    parts = _look(opened)
    states = tuple(_state(opened, part) for part in parts)
    return _of(parts, states, block_size, opened.size)


def _look(opened: Opened) -> tuple[Part, ...]:
    written = whole.mounted_for_writing(opened.fd)
    found = whole.used_blocks(opened.fd, opened.size, sector=opened.sector, written=written, again=True)
    return found.parts


def _extents(part: Part) -> Extents | None:
    return part.answer.extents if isinstance(part.answer, Used) else None


def _state(opened: Opened, part: Part) -> bytes:
    """What changes where a filesystem is written to: its superblock's times, counts and generation.

    Only what is in use counts: of swap space the header, not the pages that come and go.
    """
    digest = hashlib.blake2b()
    for start, end in (_extents(part) or Extents()).clip(_STATE):
        digest.update(whole.read(opened.fd, part.start + start, end - start))
    return digest.digest()


def _of(parts: tuple[Part, ...], states: tuple[bytes, ...], block_size: int, size: int) -> Unused:
    free: list[tuple[int, int]] = []
    for part in parts:
        if (used := _extents(part)) is not None:
            inner = Extents.of([(EDGE, part.size - EDGE)])
            free += [
                (part.start + low, part.start + high) for low, high in used.complement(part.size) & inner
            ]
    used = Extents.of(free).complement(size)
    return Unused(used.blocks(block_size).complement(-(-size // block_size)), parts, states, block_size, size)


def recorded(manifest: Manifest, at: int) -> tuple[int, tuple[PartUse, ...]]:
    """What a set tells of its image number `at`: bytes left out, and its parts, if it tells."""
    changes = manifest.content.changes
    if isinstance(changes, list | tuple) and at < len(changes) and isinstance(changes[at], dict):
        try:
            told = msgspec.convert(changes[at], _Told)
        except msgspec.ValidationError:
            return 0, ()  # of a form that this program does not know
        return told.unused, told.parts
    return 0, ()


def left_out(repository: Repository, manifest: Manifest, base: Image) -> Extents:
    """Blocks that the base left out as unused: they have no content to be unchanged.

    Walks the base's map, unless its manifest says that nothing was left out.
    """
    changes, at = manifest.content.changes, manifest.images.index(base)
    how = changes[at] if isinstance(changes, list | tuple) and at < len(changes) else None
    if isinstance(how, str) or isinstance(how, dict) and how.get("unused") == 0:
        return Extents()
    out: list[tuple[int, int]] = []

    def damaged(first: int, count: int, reason: str) -> None:
        out.append((first, first + count))

    try:
        for first, count, part in MapReader(repository, base, listed_only=True).walk(on_damage=damaged):
            if isinstance(part, int):
                out += [(first, first + count)] if part == UNUSED else []
            else:
                out += [(first + low, first + high) for kind, low, high in part.runs() if kind == UNUSED]
    except DamagedPage as damage:
        out.append((damage.first_block, damage.first_block + damage.count))
    return Extents.of(out)
