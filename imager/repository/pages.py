"""Every page of a block map, read and checked one by one, for upkeep.

Invariant: a page counts as whole only if its id is the one that its parent
(or the manifest) names, and its level, place and number of slots are what
its position in the tree demands. What a bad page hides is told exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from imager._native import DATA, DamagedError, Slots
from imager.errors import IntegrityError
from imager.repository.format import PAGE_SLOTS
from imager.repository.manifest import Image
from imager.repository.repository import Repository
from imager.storage.errors import Gone, StorageError


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page: where its record lies, and what it says."""

    pack: int
    offset: int
    length: int
    level: int
    first: int
    slots: Slots


@dataclass(frozen=True, slots=True)
class BadPage:
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
        span: int = PAGE_SLOTS**level
        slots = _open(repository, pack, offset, length, identity, level, first)
        if not isinstance(slots, str) and len(slots) != min(PAGE_SLOTS, -(-(image.blocks - first) // span)):
            slots = f"it has {len(slots)} slots, and another number is due"
        if isinstance(slots, str):
            yield BadPage(pack, offset, first, min(span * PAGE_SLOTS, image.blocks - first), slots)
            continue
        yield Page(pack, offset, length, level, first, slots)
        if level:
            for at in range(len(slots) - 1, -1, -1):
                kind, child, child_pack, child_offset, child_length = slots.get(at)
                if kind == DATA:
                    place = first + at * span
                    stack.append((child_pack, child_offset, child_length, child, level - 1, place))


def _open(
    repository: Repository, pack: int, offset: int, length: int, identity: bytes, level: int, first: int
) -> Slots | str:
    """The slots of a page, or why it is bad."""
    try:
        record = repository.read_page(pack, offset, length)
        keys = repository.pack_reader(pack)[1]
        found, its_level, its_first, slots = repository.vault.open_page(record, keys, repository.names, pack)
    except Gone:
        raise
    except (IntegrityError, StorageError) as error:
        return error.message
    except DamagedError as error:
        return str(error)
    if found != identity or (its_level, its_first) != (level, first):
        return "another page lies in its place"
    return slots
