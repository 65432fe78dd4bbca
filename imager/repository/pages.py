"""Every page of a block map, read and checked one by one, for upkeep.

Invariant: a page counts as whole only if its id is the one that its parent
(or the manifest) names, and its level, place and number of slots are what
its position in the tree demands. What a bad page hides is told exactly.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from imager._native import DATA, Slots
from imager.errors import IntegrityError
from imager.repository import blockmap
from imager.repository.format import PAGE_SLOTS
from imager.repository.manifest import Image
from imager.repository.repository import Repository
from imager.storage.errors import Gone, StorageError


class Page(Struct, frozen=True):
    """A whole page: where its record lies, and what it says."""

    pack: int
    offset: int
    length: int
    level: int
    first: int
    slots: Slots


class BadPage(Struct, frozen=True):
    """A page that is missing or damaged: it hides blocks [first, first + count)."""

    pack: int
    offset: int
    first: int
    count: int
    reason: str


Seen = set[tuple[int, int, bytes]]
"Pages met before, so that what sets share is read once."


def pages(repository: Repository, image: Image, seen: Seen | None = None) -> Iterator[Page | BadPage]:
    """The pages of an image's map, parents first, in the order of their blocks; none that is in `seen`.

    Raises `WrongKey` where the key cannot read them, `StorageError` where the storage is gone.
    """
    root = image.root
    if root is None:
        return
    number = repository.names.intern(bytes.fromhex(root.pack))
    stack = [(number, root.offset, root.length, bytes.fromhex(root.id), root.level, 0)]
    while stack:
        pack, offset, length, identity, level, first = stack.pop()
        if seen is not None:
            if (pack, offset, identity) in seen:
                continue
            seen.add((pack, offset, identity))
        below: int = PAGE_SLOTS**level
        place = blockmap.Page(level, first // (below * PAGE_SLOTS), identity, pack, offset, length)
        try:
            found, slots = blockmap.find_page(repository, place, image.blocks)
        except Gone:
            raise
        except (IntegrityError, StorageError) as error:
            hidden = min(below * PAGE_SLOTS, image.blocks - first)
            yield BadPage(pack, offset, first, hidden, error.message)
            continue
        yield Page(found.pack, found.offset, found.length, level, first, slots)
        if level:
            for at in range(len(slots) - 1, -1, -1):
                kind, child, child_pack, child_offset, child_length = slots.get(at)
                if kind == DATA:
                    begin = first + at * below
                    stack.append((child_pack, child_offset, child_length, child, level - 1, begin))
