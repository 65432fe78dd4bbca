"""Writing the block map of an image on top of that of its base.

Invariant: a new map shares every page that did not change with its base, so the
cost of writing follows the change and not the image; and it refers to nothing
that the base has lost.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from imager import _native
from imager._native import UNKNOWN, ZERO, Slots
from imager.extents import Extents
from imager.repository.blockmap import DamagedPage, MapReader, Page, slots_of, span
from imager.repository.format import PACK_TARGET, PAGE_SLOTS
from imager.repository.knownpages import KnownPages
from imager.repository.manifest import Root, root_level
from imager.repository.session import Session, writing_failed


class Leaf(Struct):
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

    def __init__(
        self, session: Session, blocks: int, base: MapReader | None, stored: KnownPages | None = None
    ) -> None:
        """`stored`: pages that are there already, for a writer that has no base to share them with."""
        self.session = session
        self.blocks = blocks
        self.base = base
        self.growing = False
        self._stored = stored
        self._pending: dict[int, Slots] = {}
        self._changed: dict[int, Slots] = {}
        self._uniform: list[tuple[int, int, int]] = []
        self._pack: _native.PackWriter | None = None
        self.pages = 0
        "Pages written."

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
        if self.base is not None and isinstance(page, Page):
            page = self.base.placed(page)
        slots = old.copy()
        names = self.session.repository.names
        if self.session.known is not None:
            slots.relocate(names, self.session.known)
        absent = slots.drop_absent(names)
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
        leaves = {start // PAGE_SLOTS for start, _ in wanted.cut(span(1))} or {0}
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
        if self._stored is not None and (there := self._stored.find(level, index, slots)) is not None:
            return there
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
            return self._base_root(self.base)
        _, identity, pack, offset, length = slot.get(0)
        name = self.session.repository.names.name(pack)
        if name is None:
            raise ValueError("the root's pack has no name")
        return Root(name.hex(), offset, length, identity.hex(), top)

    def _base_root(self, base: MapReader) -> Root:
        """The base's root, with the place where it lies now."""
        root = base.find(top := root_level(self.blocks), 0)
        assert isinstance(root, Page) and base.root is not None
        root = base.placed(root)
        name = self.session.repository.names.name(root.pack)
        return Root(name.hex(), root.offset, root.length, root.id.hex(), top) if name else base.root

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


def _reference(page: Page) -> Slots:
    slot = Slots(1)
    slot.set_data(0, page.id, page.pack, page.offset, page.length)
    return slot
