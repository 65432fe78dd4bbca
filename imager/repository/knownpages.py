"""What a key that reads nothing takes over from earlier maps: their block size, and pages that are the same.

Invariant: an earlier page is taken only where its id is the very one that the new page would have,
so the content of what is shared is never a guess.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

from imager import _native
from imager._native import Slots
from imager.errors import IntegrityError
from imager.repository.blockmap import span
from imager.repository.format import KIND_DATA, RECORD_HEAD, is_block_size, pack_object
from imager.repository.manifest import Public, Root
from imager.repository.public import Place, PublicReader, root_place, upper_pages
from imager.repository.repository import Repository
from imager.storage.errors import NotFound

_HEAD = struct.Struct("<4sBBHII32s12sI")
_KIND_BLOCK, _KIND_PAGE = 1, 2


def block_size(repository: Repository, public: Public) -> int | None:
    """The block size of a set's images, as the heads of a few blocks show it; None where they do not."""
    reader = PublicReader(repository)
    for root in public.roots:
        if root is None:
            continue
        place, level = root_place(root), root.level
        try:
            targets = reader.page(place, level)[1].targets
            while level and targets:
                level -= 1
                targets = reader.page(targets[0], level)[1].targets
            lengths = [_plain_length(repository, one) for one in targets[:2]]
        except IntegrityError:
            continue  # It is told by check; a backup just begins a new map.
        # Only the last block of an image may be shorter than the others.
        if len(lengths) == 2 and is_block_size(max(lengths)):
            return max(lengths)
    return None


def _plain_length(repository: Repository, block: Place) -> int:
    try:
        head = repository.storage.read(pack_object(KIND_DATA, block.pack), block.offset, RECORD_HEAD)
    except NotFound as error:
        raise IntegrityError(f"pack {block.pack.hex()} is missing") from error
    if len(head) < RECORD_HEAD:
        raise IntegrityError(f"pack {block.pack.hex()} is cut short")
    magic, kind, _, _, plain, _, identity, _, check = _HEAD.unpack(head)
    if magic != b"IREC" or check != _native.xxh3(head[: RECORD_HEAD - 4]) & 0xFFFFFFFF:
        raise IntegrityError(f"a record of pack {block.pack.hex()} is damaged")
    if kind != _KIND_BLOCK or identity != block.id:
        raise IntegrityError(f"another record lies in its place in pack {block.pack.hex()}")
    return int(plain)


class KnownPages:
    """The pages of earlier maps, found again by their ids, so that none is stored twice.

    A key that can only write makes each map from scratch. What it makes of unchanged blocks
    is, bit for bit, a page that is there already: it has the same id.
    """

    def __init__(self, repository: Repository, roots: Iterable[Root | None]) -> None:
        """Follows the public parts above the leaves. A bad page is passed over. Raises `StorageError`."""
        self._repository = repository
        self._known = _native.Known(repository.names)
        there = [root for root in roots if root is not None]
        self._add(root_place(root) for root in there)
        for _, page in upper_pages(PublicReader(repository), there):
            self._add(page.targets)

    def _add(self, targets: Iterable[Place]) -> None:
        names = self._repository.names
        for target in targets:
            number = names.intern(target.pack)
            if names.is_present(number):
                self._known.add_pack(number, [(_KIND_PAGE, target.id, target.offset, target.length)])

    def find(self, level: int, index: int, slots: Slots) -> Slots | None:
        """The slot of a page that is just this one; None where there is none."""
        repository, first, packs = self._repository, index * span(level), slots.packs()
        if any(repository.names.name(pack) is None for pack in packs):
            return None  # It names what is being written now, so it is new itself.
        # A page that lies in one pack with pages that it names was written with a mark in that pack's place.
        holders: list[int | None] = [None, *packs] if level else [None]
        for holder in holders:
            identity = repository.vault.page_id(level, first, slots, repository.names, holder)
            place = self._known.find(identity)
            if place is not None and holder in (None, place[0]):
                found = Slots(1)
                found.set_data(0, identity, *place)
                return found
        return None
