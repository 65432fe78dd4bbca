"""The block map of an image: reading its tree of pages, and writing the next one.

Invariant: a page is believed only as what it was asked for: its id, its level,
its position and its number of slots must all be those that its parent
implies. A new map shares every page that did not change with its base, so
the cost of writing follows the change and not the image.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from imager import _native
from imager._native import DATA, UNKNOWN, ZERO, Slots
from imager.errors import ImagerError, IntegrityError
from imager.extents import Extents
from imager.repository.format import PACK_TARGET, PAGE_SLOTS
from imager.repository.manifest import Image, Root, root_level
from imager.repository.repository import Repository
from imager.repository.session import Session, writing_failed

OnDamage = Callable[[int, int, str], None]
"""`on_damage(first_block, count, reason)`: the page for these blocks cannot be read."""

_KEPT_PAGES = 64


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


@dataclass(frozen=True, slots=True)
class Page:
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
        first = page.index * span(page.level)
        try:
            if self._listed_only and not repository.names.is_present(page.pack):
                raise IntegrityError("its pack is missing or was set aside")
            record = repository.read_page(page.pack, page.offset, page.length)
            _, keys = repository.pack_reader(page.pack)
            names = repository.names
            identity, level, start, slots = repository.vault.open_page(record, keys, names, page.pack)
            if (identity, level, start) != (page.id, page.level, first):
                raise IntegrityError("another page lies in its place")
            if len(slots) != slots_of(level, page.index, self.blocks):
                raise IntegrityError(f"it has {len(slots)} slots")
            return slots
        except (_native.DamagedError, ImagerError) as error:
            count = min(span(page.level), self.blocks - first)
            reason = error.message if isinstance(error, ImagerError) else str(error)
            raise DamagedPage(first, count, repository.pack_label(page.pack), reason) from error

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
                if inside := wanted & Extents(((begin, begin + below),)):
                    yield from self._walk(self.child(page, slots, at), inside, on_damage)

    def pages(self, on_damage: OnDamage | None = None) -> Iterator[tuple[Page, Slots]]:
        """Every page of the map with its slots, parents first. Damage as in `walk`."""
        stack = [self._root] if self._root else []
        while stack:
            page = stack.pop()
            try:
                slots = self.load(page)
            except DamagedPage as damage:
                if on_damage is None:
                    raise
                on_damage(damage.first_block, damage.count, damage.reason)
                continue
            yield page, slots
            if page.level:
                children = [at for kind, low, high in slots.runs() if kind == DATA for at in range(low, high)]
                stack += [self.child(page, slots, at) for at in reversed(children)]


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


@dataclass(slots=True)
class Leaf:
    """A leaf that is worked on. `page`, `old`: what the base has; `known`: nothing in it is UNKNOWN.

    `harmed`: the base has lost the page, or records that it refers to.
    """

    index: int
    page: Page | int | None
    old: Slots
    slots: Slots
    known: bool
    harmed: bool


class MapWriter:
    """Writes the map of one image on top of a base: of the pages below, those that changed.

    The caller takes leaves with `leaf`, overwrites slots, and hands them back with
    `put`; leaves that it never touches stay as they are in the base. `flush` writes
    what it can: a page waits until every pack that it refers to has its name.
    While `growing` is set, `blocks` may still become larger (a stream).
    """

    def __init__(self, session: Session, blocks: int, base: MapReader | None) -> None:
        self.session = session
        self.blocks = blocks
        self.base = base
        self.growing = False
        self._pending: dict[int, Slots] = {}
        self._changed: dict[int, Slots] = {}
        self._uniform: list[tuple[int, int, int]] = []
        self._pack: _native.PackWriter | None = None
        self.pages = 0
        "Pages written."
        self.absent = 0
        "Blocks of the base whose pack the storage lacks: they are read and stored again."

    @property
    def pending(self) -> int:
        """How many leaves wait for the names of packs; each holds 12 KiB of memory."""
        return len(self._pending)

    def leaf(self, index: int) -> Leaf:
        """A leaf as the base has it, in the length that it has now; what is not known is UNKNOWN."""
        page: Page | int | None = None
        old = Slots()
        harmed = False
        if self.base is not None:
            try:
                page = self.base.find(0, index)
                old = self.base.leaf(index)
            except DamagedPage:
                page, harmed = None, True
        slots = old.copy()
        absent = slots.drop_absent(self.session.repository.names)
        self.absent += absent
        known = absent == 0 and page is not None and len(old) == self.length(index)
        slots.resize(self.length(index), UNKNOWN)
        return Leaf(index, page, old, slots, known, harmed or absent > 0)

    def untold(self, wanted: Extents) -> Extents:
        """Ranges of blocks below damaged pages that are above the leaves of `wanted`: the base tells nothing.

        What damaged leaves hide is no part of it: `leaf` tells.
        """
        damaged: list[tuple[int, int]] = []
        if self.base is None or self.base.root is None:
            return Extents()
        # Where nothing is wanted, the new map is the base's root: it has to be whole, at least.
        leaves = {start // PAGE_SLOTS for start, _ in _cut(wanted, span(1))} or {0}
        for index in sorted(leaves):
            try:
                found = self.base.find(0, index)
                if not wanted and isinstance(found, Page):
                    self.base.load(found)
            except DamagedPage as damage:
                damaged.append((damage.first_block, damage.first_block + damage.count))
        return Extents.of(damaged)

    def length(self, index: int) -> int:
        """How many blocks a leaf has."""
        return min(PAGE_SLOTS, self.blocks - index * PAGE_SLOTS)

    def put(self, leaf: Leaf) -> None:
        """A leaf is finished. Leaves come in ascending order."""
        index, slots = leaf.index, leaf.slots
        kind = slots.uniform()
        if leaf.page is not None and len(leaf.old) == len(slots) and leaf.old.same_places(slots):
            if self._shares_geometry():
                return
            if isinstance(leaf.page, Page):
                # The parents are written anew, and refer to the base's leaf.
                self._changed[index] = _reference(leaf.page)
                return
        if kind is None:
            self._pending[index] = slots
        else:
            self.uniform(index, index + 1, kind)

    def _shares_geometry(self) -> bool:
        base = self.base
        same = base is not None and base.blocks == self.blocks and base.root is not None
        return same and not self.growing

    def uniform(self, start: int, end: int, kind: int) -> None:
        """The leaves `[start, end)` have one type throughout. In ascending order with the others."""
        if self._uniform and self._uniform[-1][1] == start and self._uniform[-1][2] == kind:
            self._uniform[-1] = (self._uniform[-1][0], end, kind)
        elif start < end:
            self._uniform.append((start, end, kind))

    def flush(self) -> None:
        """Write the pending leaves whose packs have names."""
        names = self.session.repository.names
        for index in list(self._pending):
            slots = self._pending[index]
            if all(names.name(pack) is not None for pack in slots.packs()):
                self._changed[index] = self._add(0, index, slots)
                del self._pending[index]

    def _add(self, level: int, index: int, slots: Slots) -> Slots:
        if self._pack is not None and self._pack.size >= PACK_TARGET:
            self.session.seal(self._pack)
            self._pack = None
        if self._pack is None:
            self._pack = self.session.new_map_pack()
        self.pages += 1
        try:
            return self._pack.add_page(level, index * span(level), slots, self.session.repository.names)
        except _native.WriteError as error:
            raise writing_failed(self.session.repository, error) from error

    def finish(self) -> Root | None:
        """Write what is left, up to the root. All data packs must be sealed. Raises `StorageError`."""
        self.flush()
        if self._pending:
            raise ValueError("finish with data packs that were not sealed")
        if not self.blocks:
            return None
        top = root_level(self.blocks)
        self._uniform.sort()
        for level in range(1, top + 1):
            self._rise(level, top)
        slot = self._changed.get(0)
        if slot is None and top == 0 and self._uniform:
            slot = self._add(0, 0, Slots(self.blocks, self._uniform[-1][2]))
        if self._pack is not None:
            self.session.seal(self._pack)
        if slot is None:
            if self.base is None or self.base.root is None:
                raise ValueError("a map without a base needs all of its leaves")
            return self.base.root
        _, identity, pack, offset, length = slot.get(0)
        name = self.session.repository.names.name(pack)
        if name is None:
            raise ValueError("the root's pack has no name")
        return Root(name.hex(), offset, length, identity.hex(), top)

    def _rise(self, level: int, top: int) -> None:
        """From the changes of the level below to those of this level."""
        below, uniform = self._changed, self._uniform
        total = -(-self.blocks // int(PAGE_SLOTS**level))  # slots of this level
        self._changed, self._uniform = {}, []
        touched = {index // PAGE_SLOTS for index in below}
        covered: list[tuple[int, int, int]] = []
        for start, end, kind in uniform:
            first = -(-start // PAGE_SLOTS)
            last = end // PAGE_SLOTS if end < total else -(-total // PAGE_SLOTS)
            if first < last and level < top:
                covered.append((first, last, kind))
                touched |= {start // PAGE_SLOTS} if start % PAGE_SLOTS else set()
                touched |= {end // PAGE_SLOTS} if end % PAGE_SLOTS and end < total else set()
            else:
                touched |= set(range(start // PAGE_SLOTS, -(-end // PAGE_SLOTS)))
        whole = {start: (end, kind) for start, end, kind in covered}
        for start in sorted(touched | whole.keys()):
            if start in whole:
                self.uniform(start, *whole[start])
            else:
                self._page(level, start, below, uniform, top)

    def _page(
        self, level: int, index: int, below: dict[int, Slots], uniform: list[tuple[int, int, int]], top: int
    ) -> None:
        first, count = index * PAGE_SLOTS, slots_of(level, index, self.blocks)
        old: Slots | None = None
        if self._shares_geometry() and self.base is not None:
            try:
                found = self.base.find(level, index)
                old = self.base.load(found) if isinstance(found, Page) else Slots(count, found or ZERO)
            except DamagedPage:
                pass  # The caller has given all that lies below.
        slots = old.copy() if old is not None else Slots(count, UNKNOWN)
        for start, end, kind in _within(uniform, first, first + count):
            slots.fill(start - first, end - first, kind)
        for at in range(count):
            if (slot := below.get(first + at)) is not None:
                slots.put(at, slot)
        if old is not None and slots.same_places(old):
            return
        same = slots.uniform()
        if same is not None and level < top:
            self.uniform(index, index + 1, same)
        else:
            self._changed[index] = self._add(level, index, slots)


def _within(ranges: list[tuple[int, int, int]], start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The parts of sorted ranges that lie in `[start, end)`."""
    low, high = 0, len(ranges)
    while low < high:
        middle = (low + high) // 2
        if ranges[middle][1] <= start:
            low = middle + 1
        else:
            high = middle
    for first, last, kind in ranges[low:]:
        if first >= end:
            return
        yield max(first, start), min(last, end), kind


def _cut(wanted: Extents, size: int) -> Iterator[tuple[int, int]]:
    """The ranges, cut where multiples of `size` lie within."""
    for low, end in wanted:
        start = low
        while start < end:
            stop = min(end, (start // size + 1) * size)
            yield start, stop
            start = stop


def _reference(page: Page) -> Slots:
    slot = Slots(1)
    slot.set_data(0, page.id, page.pack, page.offset, page.length)
    return slot
