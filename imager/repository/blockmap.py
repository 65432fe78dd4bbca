"""The block map of an image: reading its tree of pages.

Invariant: a page is believed only as what it was asked for: its id, its level,
its position and its number of slots must all be those that its parent implies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from msgspec import Struct

from imager import _native
from imager._native import DATA, Slots
from imager.errors import IntegrityError
from imager.extents import Extents
from imager.repository.format import KIND_MAP, PAGE_SLOTS
from imager.repository.locator import places_elsewhere
from imager.repository.manifest import Image, root_level
from imager.repository.repository import Repository
from imager.storage.errors import Gone, StorageError

OnDamage = Callable[[int, int, str], None]
"""`on_damage(first_block, count, reason)`: the page for these blocks cannot be read."""

_KEPT_PAGES = 64
_EXPECTED = 32
"Pages that a walk asks a far storage for before it comes to them."


class DamagedPage(IntegrityError):
    """A page of the map cannot be read: nothing is known of `count` blocks from `first_block` on."""

    def __init__(self, first_block: int, count: int, pack: str, reason: str) -> None:
        super().__init__(
            f"the block map is damaged for blocks {first_block} to {first_block + count - 1}:"
            f" {reason} ({pack})",
            hint="imager check names everything that is damaged",
        )
        self.first_block = first_block
        self.count = count
        self.pack = pack
        self.reason = reason


class Page(Struct, frozen=True):
    """Where a page lies, and what it covers. `pack` is a number in the repository's names."""

    level: int
    index: int
    id: bytes
    pack: int
    offset: int
    length: int


def span(level: int) -> int:
    """How many blocks a full page of this level covers."""
    covered: int = PAGE_SLOTS ** (level + 1)
    return covered


def slots_of(level: int, index: int, blocks: int) -> int:
    """How many slots the page `index` of a level has, in an image of `blocks` blocks."""
    below: int = PAGE_SLOTS**level
    return min(PAGE_SLOTS, -(-blocks // below) - index * PAGE_SLOTS)


def find_page(
    repository: Repository, page: Page, blocks: int, *, listed_only: bool = False
) -> tuple[Page, Slots]:
    """The slots of a page in the map of so many blocks, and the page with the place where it was found.

    Where it does not lie in its place it is looked for by its id. `listed_only`: only packs that
    are present in the repository's names count. Raises as `open_page` does.
    """
    try:
        if listed_only and not repository.names.is_present(page.pack):
            raise IntegrityError("its pack is missing or was set aside")
        return page, open_page(repository, page, blocks)
    except Gone:
        raise
    except (IntegrityError, StorageError):
        found = _find_elsewhere(repository, page, blocks, listed_only)
        if found is None:
            raise
        return found


def _find_elsewhere(
    repository: Repository, page: Page, blocks: int, listed_only: bool
) -> tuple[Page, Slots] | None:
    """The page by its id; looks again as long as others move it meanwhile. None where it is nowhere."""
    tried = {(page.pack, page.offset)}
    for place in places_elsewhere(repository.locator, page.id, KIND_MAP, tried):
        if listed_only and not repository.names.is_present(place[0]):
            continue
        moved = Page(page.level, page.index, page.id, *place)
        try:
            return moved, open_page(repository, moved, blocks)
        except Gone:
            raise
        except (IntegrityError, StorageError):
            continue  # That one too? Then it was moved on, or there is no whole one.
    return None


def open_page(repository: Repository, page: Page, blocks: int) -> Slots:
    """The slots of the page that lies in a place, in the map of so many blocks.

    Raises `IntegrityError` where it is missing, damaged, or not the page that its
    parent implies; `WrongKey`, `StorageError`.
    """
    record = repository.read_page(page.pack, page.offset, page.length)
    keys = repository.pack_keys(page.pack, KIND_MAP)
    try:
        identity, level, start, slots = repository.vault.open_page(record, keys, repository.names, page.pack)
    except _native.DamagedError as error:
        raise IntegrityError(str(error)) from error
    if (identity, level, start) != (page.id, page.level, page.index * span(page.level)):
        raise IntegrityError("another page lies in its place")
    if len(slots) != slots_of(level, page.index, blocks):
        raise IntegrityError(f"it has {len(slots)} slots, and another number is due")
    return slots


class MapReader:
    """Reads the map of one image. Pages are fetched when they are needed; a few are kept.

    `listed_only`: a page in a pack that the storage's listing lacks (one that a
    repair set aside) counts as damaged, for a new set must not refer to it.
    """

    def __init__(self, repository: Repository, image: Image, *, listed_only: bool = False) -> None:
        self.repository = repository
        self._listed_only = listed_only
        self.blocks = image.blocks
        self.block_size = image.block_size
        self.root = image.root
        self._kept: OrderedDict[bytes, Slots] = OrderedDict()
        self._moved: dict[bytes, Page] = {}
        self._root: Page | None = None
        if image.root is not None:
            root = image.root
            pack = repository.names.intern(bytes.fromhex(root.pack))
            self._root = Page(root.level, 0, bytes.fromhex(root.id), pack, root.offset, root.length)

    def load(self, page: Page) -> Slots:
        """The slots of a page; not to be changed. Raises `DamagedPage`."""
        kept = self._kept.get(page.id)
        if kept is not None:
            self._kept.move_to_end(page.id)
            return kept
        slots = self._read(page)
        self._kept[page.id] = slots
        if len(self._kept) > _KEPT_PAGES:
            self._kept.popitem(last=False)
        return slots

    def _read(self, page: Page) -> Slots:
        repository = self.repository
        try:
            found, slots = find_page(repository, page, self.blocks, listed_only=self._listed_only)
            if found is not page:
                self._moved[page.id] = found
            return slots
        except Gone:
            raise
        except (IntegrityError, StorageError) as error:
            first = page.index * span(page.level)
            count = min(span(page.level), self.blocks - first)
            raise DamagedPage(first, count, repository.pack_label(page.pack), error.message) from error

    def placed(self, page: Page) -> Page:
        """A page that was loaded, with the place where it was found."""
        return self._moved.get(page.id, page)

    def child(self, page: Page, slots: Slots, at: int) -> Page:
        """The page below slot `at`, which holds data."""
        _, identity, pack, offset, length = slots.get(at)
        return Page(page.level - 1, page.index * PAGE_SLOTS + at, identity, pack, offset, length)

    def find(self, level: int, index: int) -> Page | int | None:
        """The page `index` of a level; its type where it is of one type; None where there is no such page."""
        page = self._root
        if page is None or level > page.level or slots_of(level, index, self.blocks) <= 0:
            return None
        while page.level > level:
            at = index // int(PAGE_SLOTS ** (page.level - level - 1)) % PAGE_SLOTS
            slots = self.load(page)
            kind = slots.get(at)[0]
            if kind != DATA:
                return kind
            page = self.child(page, slots, at)
        return page

    def leaf(self, index: int) -> Slots:
        """The slots of the blocks from `256 * index` on, not to be changed; none beyond the image.

        Raises `DamagedPage`.
        """
        found = self.find(0, index)
        if found is None:
            return Slots()
        if isinstance(found, int):
            return Slots(slots_of(0, index, self.blocks), found)
        return self.load(found)

    def walk(
        self, ranges: Sequence[tuple[int, int]] | None = None, on_damage: OnDamage | None = None
    ) -> Iterator[tuple[int, int, Slots | int]]:
        """All blocks, or those of `ranges` (ascending), in order: (first block, count, slots or one type).

        The slots are not to be changed. Raises `DamagedPage`, unless `on_damage` is
        given: then it is told, and the walk goes on behind the gap.
        """
        if self._root is not None:
            wanted = Extents.whole(self.blocks) if ranges is None else Extents.of(ranges).clip(self.blocks)
            yield from self._walk(self._root, wanted, on_damage)

    def _walk(
        self, page: Page, wanted: Extents, on_damage: OnDamage | None
    ) -> Iterator[tuple[int, int, Slots | int]]:
        first = page.index * span(page.level)
        try:
            slots = self.load(page)
        except DamagedPage as damage:
            if on_damage is None:
                raise
            on_damage(damage.first_block, damage.count, damage.reason)
            return
        if page.level == 0:
            for start, end in wanted:
                whole = start == first and end - start == len(slots)
                part = slots if whole else slots.slice(start - first, end - first)
                kind = part.uniform()
                yield start, end - start, part if kind is None else kind
            return
        below = span(page.level - 1)
        for kind, low, high in slots.runs():
            if kind != DATA:
                for start, end in wanted & Extents(((first + low * below, first + high * below),)):
                    yield start, end - start, kind
                continue
            for at in range(low, high):
                begin = first + at * below
                if not self.repository.storage.local and (at - low) % (_EXPECTED // 2) == 0:
                    self._expect(slots, at, min(at + _EXPECTED, high))
                if inside := wanted & Extents(((begin, begin + below),)):
                    yield from self._walk(self.child(page, slots, at), inside, on_damage)

    def _expect(self, slots: Slots, start: int, end: int) -> None:
        """The walk is about to come to these children."""
        for at in range(start, end):
            _, _, pack, offset, length = slots.get(at)
            self.repository.expect_page(pack, offset, length)


def diff(a: MapReader, b: MapReader) -> Iterator[tuple[int, int]]:
    """Ranges of block numbers in which two maps of one block size differ, pages that they share left out.

    Blocks that only one of them has count as different. Raises `DamagedPage`.
    """
    common = min(a.blocks, b.blocks)
    last: tuple[int, int] | None = None
    for start, end in _differing(a, b, common):
        if last is not None and last[1] == start:
            last = (last[0], end)
            continue
        if last is not None:
            yield last
        last = (start, end)
    longer = (common, max(a.blocks, b.blocks))
    if last is not None and last[1] == longer[0] < longer[1]:
        last, longer = (last[0], longer[1]), (0, 0)
    if last is not None:
        yield last
    if longer[0] < longer[1]:
        yield longer


def _differing(a: MapReader, b: MapReader, blocks: int) -> Iterator[tuple[int, int]]:
    if not blocks:
        return
    stack = [(root_level(blocks), 0)]
    while stack:
        level, index = stack.pop()
        first = index * span(level)
        if first >= blocks:
            continue
        left, right = a.find(level, index), b.find(level, index)
        if isinstance(left, Page) and isinstance(right, Page) and left.id == right.id:
            continue
        if isinstance(left, int) and left == right:
            continue
        if level:
            stack += [(level - 1, index * PAGE_SLOTS + at) for at in reversed(range(PAGE_SLOTS))]
            continue
        count = min(PAGE_SLOTS, blocks - first)
        pieces = (reader.leaf(index).slice(0, count) for reader in (a, b))
        yield from ((first + low, first + high) for low, high in _native.diff_slots(*pieces))
