"""Blocks that a backup leaves out, because no filesystem of the source uses them.

Invariant: a block is left out only where every byte of it is unused by a map
that was believed; a block that the base left out and that is in use now is
always read, whatever a map of changes says.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from imager._native import UNUSED
from imager.engine.source import Opened
from imager.events import Reporter
from imager.extents import Extents
from imager.filesystem import whole
from imager.filesystem.used import Used
from imager.filesystem.whole import Part
from imager.repository.blockmap import DamagedPage, MapReader
from imager.repository.imageset import Image, Manifest
from imager.repository.repository import Repository


class Unused(Struct, frozen=True):
    """Numbers of the blocks that are left out, and how that is known, part by part."""

    blocks: Extents = Extents()
    parts: tuple[Part, ...] = ()

    def told(self, change_source: str) -> Any:
        """What the set says of how the blocks to read were found: `changes` in its manifest."""
        return {"source": change_source, "parts": self.facts()} if self.parts else change_source

    def facts(self) -> list[dict[str, Any]]:
        """Of each part its place, and the map that was taken or why there is none."""
        out: list[dict[str, Any]] = []
        for part in self.parts:
            answer = part.answer
            fact: dict[str, Any] = {"number": part.number, "start": part.start, "size": part.size}
            fact |= {"used": part.used, "kind": answer.kind}
            fact |= {"note": answer.note} if isinstance(answer, Used) else {"every_block": answer.reason}
            out.append(fact)
        return out


def find(opened: Opened, block_size: int, reporter: Reporter) -> Unused:
    """What of a source is not in use. Reads filesystems' metadata; says where it takes every block."""
    written = whole.mounted_for_writing(opened.fd)
    found = whole.used_blocks(opened.fd, opened.size, sector=opened.sector, written=written)
    for part in found.parts:
        if not isinstance(part.answer, Used):
            what = opened.path if part.number is None else f"partition {part.number} of {opened.path}"
            reporter.note(f"{what}: every block is imaged: {part.answer.reason}")
    blocks = found.used.blocks(block_size).complement(-(-opened.size // block_size))
    return Unused(blocks, found.parts)


def left_out(repository: Repository, manifest: Manifest, base: Image) -> Extents:
    """Blocks that the base left out as unused: they have no content to be unchanged.

    Walks the base's map, where its manifest says that anything was left out.
    """
    changes = manifest.content.changes
    if not any(isinstance(how, dict) for how in (changes if isinstance(changes, list | tuple) else ())):
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
