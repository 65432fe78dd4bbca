"""Block maps as anybody sees them who has no key that reads: which pages and blocks, never where on the disk.

Invariant: what is told here is what the public parts of pages say. Without a key their ids
cannot be checked, so it is good for following, sharing and blaming, and proves nothing
about content; and every length is bounded before memory is taken for it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from imager import _native
from imager._native import Slots
from imager.errors import IntegrityError
from imager.repository.blockmap import span
from imager.repository.format import (
    KIND_DATA,
    KIND_MAP,
    MAX_PACK,
    MAX_PAGE,
    RECORD_HEAD,
    is_block_size,
    pack_object,
)
from imager.repository.manifest import Public, Root
from imager.repository.repository import Repository
from imager.storage.errors import NotFound

_HEAD = struct.Struct("<4sBBHII32s12sI")
_PAGE = struct.Struct("<BBHHH")
_TARGET = struct.Struct("<HII32s")
_NAME = 32
_MAX_TABLE = 512
_SELF = bytes(_NAME)
_KIND_BLOCK, _KIND_PAGE = 1, 2


@dataclass(frozen=True, slots=True)
class Target:
    """A record that a page or a manifest names: pack, offset and length there, and its id."""

    pack: bytes
    offset: int
    length: int
    id: bytes


@dataclass(frozen=True, slots=True)
class PublicPage:
    """The public part of a page: where the page itself lies, and what it names."""

    place: Target
    level: int
    targets: tuple[Target, ...]


def of_root(root: Root) -> Target:
    """The place of an image's root page."""
    return Target(bytes.fromhex(root.pack), root.offset, root.length, bytes.fromhex(root.id))


def parse_page(record: bytes, place: Target, level: int) -> PublicPage:
    """The public part out of a page's record. Raises `IntegrityError` where it is none, or another one's."""
    where = f"the map page at {place.offset} of pack {place.pack.hex()}"
    if len(record) != place.length or len(record) < RECORD_HEAD + 4 + _PAGE.size:
        raise IntegrityError(f"{where} is cut short")
    magic, kind, codec, _, _, payload, identity, _, check = _HEAD.unpack_from(record)
    if magic != b"IREC" or check != _native.xxh3(record[: RECORD_HEAD - 4]) & 0xFFFFFFFF:
        raise IntegrityError(f"{where} is damaged: its head has another checksum")
    if (kind, codec, payload) != (_KIND_PAGE, 0, place.length - RECORD_HEAD) or identity != place.id:
        raise IntegrityError(f"{where} is another record")
    length = int.from_bytes(record[RECORD_HEAD : RECORD_HEAD + 4], "little")
    public = record[RECORD_HEAD + 4 : RECORD_HEAD + 4 + length]
    if len(public) != length or length < _PAGE.size:
        raise IntegrityError(f"{where} is cut short")
    found, version, packs, targets, reserved = _PAGE.unpack_from(public)
    if (found, version, reserved) != (level, 1, 0) or max(packs, targets) > _MAX_TABLE:
        raise IntegrityError(f"{where} is of another level or version")
    if length != _PAGE.size + _NAME * packs + _TARGET.size * targets:
        raise IntegrityError(f"{where} has another length than it says")
    at = _PAGE.size
    names = [public[at + _NAME * one : at + _NAME * (one + 1)] for one in range(packs)]
    if level == 0 and _SELF in names:
        raise IntegrityError(f"{where} names its own pack for blocks")
    listed: list[Target] = []
    for number, offset, size, target in _TARGET.iter_unpack(public[at + _NAME * packs :]):
        if number >= packs or size < RECORD_HEAD or offset + size > MAX_PACK:
            raise IntegrityError(f"{where} names a place that cannot be")
        listed.append(Target(place.pack if names[number] == _SELF else names[number], offset, size, target))
    return PublicPage(place, level, tuple(listed))


def read_page(repository: Repository, place: Target, level: int) -> PublicPage:
    """A page's public part from the storage. Raises `IntegrityError`, `StorageError`."""
    if not RECORD_HEAD <= place.length <= RECORD_HEAD + MAX_PAGE:
        raise IntegrityError(f"no map page has {place.length} bytes (in pack {place.pack.hex()})")
    try:
        record = repository.storage.read(pack_object(KIND_MAP, place.pack), place.offset, place.length)
    except NotFound as error:
        raise IntegrityError(f"pack {place.pack.hex()} is missing") from error
    return parse_page(record, place, level)


def walk(
    repository: Repository, root: Root, seen: set[Target], *, leaves: bool = True
) -> Iterator[PublicPage | tuple[Target, str]]:
    """The pages below a root that are not in `seen`, parents first; or (place, what is wrong) of a bad one.

    `leaves`: read those of level 0 too. Raises `StorageError`.
    """
    stack = [(of_root(root), root.level)]
    while stack:
        place, level = stack.pop()
        if place in seen or (level == 0 and not leaves):
            continue
        seen.add(place)
        try:
            page = read_page(repository, place, level)
        except IntegrityError as error:
            yield place, error.message
            continue
        yield page
        if level:
            stack += [(target, level - 1) for target in reversed(page.targets)]


def block_size(repository: Repository, public: Public) -> int | None:
    """The block size of a set's images, as the heads of a few blocks show it; None where they do not."""
    for root in public.roots:
        try:
            place, level = (of_root(root), root.level) if root is not None else (None, 0)
            while place is not None and level:
                targets = read_page(repository, place, level).targets
                place, level = (targets[0], level - 1) if targets else (None, 0)
            if place is None:
                continue
            lengths = [_plain_length(repository, one) for one in read_page(repository, place, 0).targets[:2]]
        except IntegrityError:
            continue  # It is told by check; a backup just begins a new map.
        # Only the last block of an image may be shorter than the others.
        if len(lengths) == 2 and is_block_size(max(lengths)):
            return max(lengths)
    return None


def _plain_length(repository: Repository, block: Target) -> int:
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
        seen: set[Target] = set()
        for root in roots:
            if root is None:
                continue
            self._add([of_root(root)])
            for page in walk(repository, root, seen, leaves=False):
                if isinstance(page, PublicPage):
                    self._add(page.targets)

    def _add(self, targets: Iterable[Target]) -> None:
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
