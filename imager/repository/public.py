"""What can be read of a block map without a key: which packs, pages and blocks it refers to.

Invariant: a page counts only if its record is the one that its pack's name
binds (name, trailer, digest of the payload), has the id that its parent (or the
signed manifest) names, and keeps to every bound of the format. Where it does not
lie at its place, it is looked for by its id: location is a hint, id is the truth.
Memory grows with the number of pages that are walked, not with that of blocks.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator

from msgspec import Struct, field

from imager import _native
from imager.errors import IntegrityError
from imager.repository import partial
from imager.repository.format import (
    FOOTER,
    KIND_DATA,
    KIND_MAP,
    MAX_PACK,
    RECORD_HEAD,
    TRAILER_ENTRY,
    pack_object,
)
from imager.repository.manifest import Root
from imager.repository.repository import Repository
from imager.storage.errors import Gone, NotFound, StorageError

_HEAD = struct.Struct("<4sBBHII32s12sI")
_PAGE_HEAD = struct.Struct("<BBHHH")
_TARGET = struct.Struct("<HII32s")
_PAGE, _MOST = 2, 512
_SELF = bytes(32)
_KEPT_FRAMES = 64


class Place(Struct, frozen=True):
    """Where a record is said to lie. `pack`: its name."""

    pack: bytes
    offset: int
    length: int
    id: bytes


class PublicPage(Struct, frozen=True):
    """The public part of a page: on level 0 its targets are blocks, above they are pages."""

    level: int
    packs: tuple[bytes, ...]
    targets: tuple[Place, ...]


def parse_page(record: bytes, place: Place, level: int) -> PublicPage:
    """The public part of a page's record. Raises `IntegrityError` where it is none, or of another level."""
    if len(record) != place.length or len(record) < RECORD_HEAD + 4 + _PAGE_HEAD.size:
        raise IntegrityError("its record is cut short")
    magic, kind, codec, _, _, payload, identity, _, check = _HEAD.unpack_from(record)
    if magic != b"IREC" or check != _native.xxh3(record[:60]) & 0xFFFFFFFF:
        raise IntegrityError("its record has a damaged head")
    if kind != _PAGE or codec != 0 or identity != place.id or payload + RECORD_HEAD != len(record):
        raise IntegrityError("another record lies in its place")
    public = int.from_bytes(record[RECORD_HEAD : RECORD_HEAD + 4], "little")
    if not _PAGE_HEAD.size <= public <= len(record) - RECORD_HEAD - 4:
        raise IntegrityError("its public part has an impossible length")
    own, version, packs, targets, reserved = _PAGE_HEAD.unpack_from(record, RECORD_HEAD + 4)
    at = RECORD_HEAD + 4 + _PAGE_HEAD.size
    if own != level:
        raise IntegrityError("it is a page of another level")
    if version != 1 or reserved or own > 7 or packs > _MOST or targets > _MOST:
        raise IntegrityError("its public part is of another version, or out of bounds")
    if public != _PAGE_HEAD.size + 32 * packs + _TARGET.size * targets:
        raise IntegrityError("its public part has an impossible length")
    names = tuple(record[at + 32 * n : at + 32 * n + 32] for n in range(packs))
    if not level and _SELF in names:
        raise IntegrityError("it names its own pack for blocks")
    names = tuple(place.pack if name == _SELF else name for name in names)
    at += 32 * packs
    found: list[Place] = []
    for number, offset, length, target in _TARGET.iter_unpack(record[at : at + _TARGET.size * targets]):
        if number >= packs or not RECORD_HEAD < length <= MAX_PACK - offset:
            raise IntegrityError("its public part names a place that cannot be")
        found.append(Place(names[number], offset, length, target))
    return PublicPage(level, names, tuple(found))


class PublicReader:
    """Reads public parts of pages of one repository, by place or, where that fails, by id."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository
        self._frames: OrderedDict[bytes, dict[int, bytes]] = OrderedDict()

    def page(self, place: Place, level: int) -> tuple[Place, PublicPage]:
        """A page of this level, and where it was found. Raises `IntegrityError`, `Gone`, `StorageError`."""
        return self.pages(place, level)[0]

    def pages(self, place: Place, level: int) -> list[tuple[Place, PublicPage]]:
        """What may be this page, and where. One, unless it has moved and several records claim to be it.

        Only a key could tell which of those says the truth. Raises what `page` does.
        """
        try:
            return [(place, self._at(place, level))]
        except IntegrityError:
            tried = {(self.repository.names.intern(place.pack), place.offset)}
            found: dict[bytes, tuple[Place, PublicPage]] = {}
            while (other := self._find(place.id, tried)) is not None:
                try:
                    page = self._at(other, level)
                except IntegrityError:
                    continue
                number = self.repository.names.intern(other.pack)
                found.setdefault(self._digests(other.pack, number)[other.offset], (other, page))
                if not self.repository.locator.is_doubtful(place.id, tried):
                    break
            if not found:
                raise
            return list(found.values())

    def _at(self, place: Place, level: int) -> PublicPage:
        number = self.repository.names.intern(place.pack)
        digest = self._digests(place.pack, number).get(place.offset)
        if digest is None:
            raise IntegrityError("no record begins in its place")
        record = self.repository.read_page(number, place.offset, place.length)
        if _native.blake3(record[RECORD_HEAD:]) != digest:
            raise IntegrityError("its record is damaged")
        return parse_page(record, place, level)

    def _digests(self, pack: bytes, number: int) -> dict[int, bytes]:
        """Digest of each record's payload, by its offset, as the pack's name vouches for it."""
        known = self._frames.get(pack)
        if known is None:
            fd, _ = self.repository.pack_reader(number, KIND_MAP)
            try:
                lines = _lines(fd, pack, self.repository.id)
                known = {offset: digest for offset, (_, _, digest) in lines}
            except _native.DamagedError as error:
                raise IntegrityError(f"its pack is damaged: {error}") from error
            except OSError as error:
                raise StorageError(f"reading pack {pack.hex()} failed: {error.strerror}") from error
            self._frames[pack] = known
            if len(self._frames) > _KEPT_FRAMES:
                self._frames.popitem(last=False)
        return known

    def _find(self, identity: bytes, tried: set[tuple[int, int]]) -> Place | None:
        """Another place of a page whose record is not where it should be; it counts as tried from now on."""
        place = self.repository.locator.find(identity, KIND_MAP, tried)
        if place is None:
            return None
        tried.add(place[:2])
        name = self.repository.names.name(place[0])
        return Place(name, place[1], place[2], identity) if name is not None else None


Line = tuple[int, tuple[bytes, int, bytes]]
"Of a record: its offset, and its id, its length and the digest of its payload."


def _lines(fd: int, name: bytes, repository: bytes) -> Iterator[Line]:
    """The lines of a pack's trailer. Raises `DamagedError`, OSError."""
    records = _native.pack_records(
        fd, name, repository
    )  # This checks header, trailer and footer by the name.
    size = len(records) * TRAILER_ENTRY
    trailer = os.pread(fd, size, os.fstat(fd).st_size - FOOTER - size)
    for at, (_, identity, offset, length) in enumerate(records):
        digest = trailer[at * TRAILER_ENTRY + RECORD_HEAD : (at + 1) * TRAILER_ENTRY]
        yield offset, (identity, length, digest)


def lines_of(repository: Repository, name: bytes) -> list[Line]:
    """The lines of a data pack's trailer; none where it is gone or its frame is damaged.

    Raises `StorageError`.
    """
    try:
        fd = partial.frame(repository.storage, pack_object(KIND_DATA, name))
    except NotFound:
        return []
    try:
        return list(_lines(fd, name, repository.id))
    except (_native.DamagedError, OSError):
        return []
    finally:
        os.close(fd)


class Reach(Struct):
    """What some sets refer to.

    `lost`: pages that cannot be had, and why; what is below them is not known. `astray`: pages that
    were had, but not from a pack that is listed.
    """

    maps: set[bytes] = field(default_factory=set)
    data: set[bytes] = field(default_factory=set)
    pages: int = 0
    lost: list[tuple[Place, str]] = field(default_factory=list)
    astray: list[Place] = field(default_factory=list)


def key(place: Place, level: int) -> bytes:
    """What tells a reference to a page from others, in 32 bytes.

    Not the id alone: without a key nobody can tell whether a record is what its id says, so a page that
    somebody has put elsewhere under an id must not stand for the one that a map means.
    """
    return _native.blake3(place.pack + place.offset.to_bytes(4, "little") + bytes((level,)) + place.id)


OnLeaf = Callable[[PublicPage], None]


def root_place(root: Root) -> Place:
    """Where a manifest says that a map's root lies."""
    return Place(bytes.fromhex(root.pack), root.offset, root.length, bytes.fromhex(root.id))


def walk(
    reader: PublicReader,
    roots: Iterable[Root | None],
    seen: set[bytes],
    on_leaf: OnLeaf | None = None,
    *,
    listed: Container[bytes] | None = None,
) -> Reach:
    """Visit every page below some roots, but none of which `seen` has the `key`, and remember them there.

    `on_leaf` is called with each page of level 0; `listed`: names of the map packs that count for `astray`.
    Raises `StorageError` where the storage is gone.
    """
    found = Reach()
    stack = [(root_place(root), root.level) for root in roots if root is not None]
    while stack:
        place, level = stack.pop()
        if (reference := key(place, level)) in seen:
            continue
        seen.add(reference)
        try:
            pages = reader.pages(place, level)
        except Gone:
            raise
        except (IntegrityError, StorageError) as error:
            found.lost.append((place, error.message))
            continue
        for at, page in pages:
            found.pages += 1
            found.maps.add(at.pack)
            if listed is not None and at.pack not in listed:
                found.astray.append(at)
            if level:
                stack += [(target, level - 1) for target in reversed(page.targets)]
            else:
                found.data.update(page.packs)
                if on_leaf is not None:
                    on_leaf(page)
    return found


def upper_pages(reader: PublicReader, roots: Iterable[Root | None]) -> Iterator[tuple[Place, PublicPage]]:
    """The pages below some roots, each once, but those of level 0; with the places that lead to them.

    What lies below a page that cannot be read is left out. Raises `StorageError` where the storage is gone.
    """
    seen: set[bytes] = set()
    stack = [(root_place(root), root.level) for root in roots if root is not None]
    while stack:
        place, level = stack.pop()
        if not level or (reference := key(place, level)) in seen:
            continue
        seen.add(reference)
        try:
            _, page = reader.page(place, level)
        except Gone:
            raise
        except (IntegrityError, StorageError):
            continue
        yield place, page
        stack += [(target, level - 1) for target in page.targets]


def upper_keys(reader: PublicReader, roots: Iterable[Root | None]) -> set[bytes]:
    """The `key`s of all pages below some roots, without reading those of level 0.

    What lies below a page that cannot be read is left out. Raises `StorageError` where the storage is gone.
    """
    there = [root for root in roots if root is not None]
    keys = {key(root_place(root), 0) for root in there if not root.level}
    for place, page in upper_pages(reader, there):
        keys.add(key(place, page.level))
        if page.level == 1:
            keys.update(key(target, 0) for target in page.targets)
    return keys
