"""What of a repository lives: every record that some image set refers to, found without any key.

Invariant: a record that a set refers to is marked where it can be relied upon (in
a pack that is listed and not condemned) or, where it lies in no such pack, where
it lies; a page that cannot be read whole is told of, for what hangs on it is not known.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping

from msgspec import Struct, field

from imager import _native
from imager.errors import IntegrityError
from imager.events import Reporter
from imager.repository import imageset, index, public, sessions
from imager.repository.format import KIND_DATA, KIND_MAP, MAPS, PACKS, is_pack_name
from imager.repository.locator import add_unknown, records_of_all
from imager.repository.manifest import (
    Public,
    Root,
    is_abort_mark,
    is_revoked,
    parse_public,
    signature_problem,
)
from imager.repository.repository import Repository
from imager.repository.sessions import Condemnation
from imager.storage.errors import NotFound

_KEPT_PACKS = 64
Lines = dict[int, tuple[bytes, int, bytes]]
"Of a pack's records, by offset: id, length, digest of the payload."


class View(Struct):
    """What there is, in the order in which it has to be looked at. Packs by name, with their sizes."""

    condemned: dict[str, Condemnation]
    packs: dict[bytes, int]
    maps: dict[bytes, int]
    open: dict[str, sessions.Open]
    sets: dict[str, Public]
    marks: frozenset[str]
    "Sessions that were declared dead."
    void: frozenset[str]
    "Sets that do not count, for their writer was revoked before them."
    damaged: dict[str, str]
    "Sets whose manifest is damaged, and how."

    @property
    def doomed(self) -> frozenset[bytes]:
        """Packs that are condemned."""
        return frozenset[bytes]().union(*(one.packs | one.maps for one in self.condemned.values()))

    @property
    def outcomes(self) -> frozenset[str]:
        """Sessions that have an outcome."""
        return frozenset(self.sets) | self.marks | self.void | frozenset(self.damaged)


def look(repository: Repository) -> View:
    """See what there is. Raises `IntegrityError` for a damaged condemnation, `StorageError`."""
    storage, name = repository.storage, repository.config.repository
    condemned = sessions.read_condemned(storage, name)
    # Packs before sessions before sets: so the writer of a pack that is listed is announced, or has
    # ended, and where it ended with a set, that is listed too.
    packs, maps = (dict(_packs(repository, prefix)) for prefix in (PACKS, MAPS))
    opened = {one.id: one for one in sessions.open_sessions(storage, name)}
    sets: dict[str, Public] = {}
    marks: set[str] = set()
    void: set[str] = set()
    damaged: dict[str, str] = {}
    for set_id, raw in imageset.raw_sets(repository):
        opened.pop(set_id, None)
        if is_abort_mark(raw):
            marks.add(set_id)
            continue
        try:
            found = parse_public(raw, set_id, name)
            if (fault := signature_problem(repository, found, raw)) is not None:
                raise IntegrityError(f"it {fault}")
            if is_revoked(repository, found, raw):
                void.add(set_id)  # It never counts, so nothing lives by it, and nobody is to be asked.
            else:
                sets[set_id] = found
        except IntegrityError as error:
            damaged[set_id] = error.message
    return View(condemned, packs, maps, opened, sets, frozenset(marks), frozenset(void), damaged)


def _packs(repository: Repository, prefix: str) -> Iterator[tuple[bytes, int]]:
    for entry in repository.storage.list(prefix):
        name = entry.name[-64:]
        if is_pack_name(name) and entry.name == f"{prefix}{name[:2]}/{name}":
            yield bytes.fromhex(name), entry.size


class Marked(Struct):
    """What lives. Packs are meant by their numbers in the repository's names."""

    marks: _native.Marks = field(default_factory=_native.Marks)
    damage: list[tuple[str, str]] = field(default_factory=list)
    "(set, what is wrong): pages that cannot be read."


class Marker:
    """Marks what the sets of a view refer to. Close it to free descriptors.

    Tells `repository.names` which packs can be relied upon.
    """

    def __init__(self, repository: Repository, view: View, reporter: Reporter) -> None:
        self.repository = repository
        self.view = view
        self.names = repository.names
        doomed = view.doomed
        self.names.set_present([name for name in (*view.packs, *view.maps) if name not in doomed])
        # After the packs: what was moved out of one that is not listed was in the index before.
        self.known = index.load(repository, reporter)
        self._stranded = _native.Known(self.names)
        self._pages: _native.Known | None = None
        self._completed = False
        self._open: OrderedDict[int, tuple[int, _native.MapPack] | None] = OrderedDict()
        for kind, listed in ((KIND_DATA, view.packs), (KIND_MAP, view.maps)):
            there = sorted(doomed.intersection(listed))
            for name, records in records_of_all(repository, there, kind):
                self._stranded.add_pack(self.names.intern(name), records)

    def mark(self, sets: Mapping[str, Public]) -> Marked:
        """Mark what the sets refer to; the newest of each lineage come first. Raises `StorageError`."""
        found = self._mark(sets)
        if found.marks.lost and not self._completed:
            # The index lacks something, or names packs that came after the listing: ask the packs.
            self._complete()
            found = self._mark(sets)
            if found.marks.lost and self._ask_all():
                found = self._mark(sets)
        return found

    def _mark(self, sets: Mapping[str, Public]) -> Marked:
        found = Marked()
        newest = newest_of(sets)
        for set_id in sorted(sets, key=lambda one: (one not in newest, one)):
            for root in sets[set_id].roots:
                if root is not None:
                    self._walk(set_id, root, set_id in newest, found)
        self._settle(found.marks)
        return found

    def _settle(self, marks: _native.Marks) -> None:
        """Mark records that have moved and that several places are known for.

        Whoever can write to the index can name a record of his own under any id, and only a key tells
        which of them says the truth: so one of each content lives.
        """
        lines: OrderedDict[int, Lines] = OrderedDict()
        for identity, places, newest in sorted(marks.take_doubtful(), key=lambda one: one[1]):
            told: set[bytes] = set()
            for pack, offset, _ in places:
                if pack not in lines:
                    lines[pack] = self._lines(pack)
                    if len(lines) > _KEPT_PACKS:
                        lines.popitem(last=False)
                there = lines[pack].get(offset)
                if there is not None and there[0] == identity and there[2] not in told:
                    told.add(there[2])
                    marks.add(pack, offset, there[1], newest)
            if not told:
                marks.add(*places[0], newest)

    def _lines(self, number: int) -> Lines:
        name = self.names.name(number)
        return dict(public.lines_of(self.repository, name)) if name is not None else {}

    def _walk(self, set_id: str, root: Root, newest: bool, found: Marked) -> None:
        number = self.names.intern(bytes.fromhex(root.pack))
        stack = [(bytes.fromhex(root.id), number, root.offset, root.level)]
        while stack:
            identity, pack, offset, level = stack.pop()
            try:
                below = self._page(identity, pack, offset, level, newest, found.marks)
            except IntegrityError as error:
                found.damage.append((set_id, error.message))
                continue
            stack += [(child, at, start, level - 1) for child, at, start, _ in reversed(below)]

    def _page(
        self, identity: bytes, pack: int, offset: int, level: int, newest: bool, marks: _native.Marks
    ) -> list[tuple[bytes, int, int, int]]:
        reason = "it is nowhere to be found"
        below: list[tuple[bytes, int, int, int]] = []
        told: set[bytes] = set()
        tried: set[tuple[int, int]] = set()
        for place, last in self._places(identity, pack, offset):
            if place in tried or (last and told):
                continue
            tried.add(place)
            opened = self._map_pack(place[0])
            # Of those that moved and have several places one of each content lives: see `_settle`.
            if opened is None or (digest := opened[1].digest(place[1])) is None or digest in told:
                continue
            try:
                found = opened[1].mark(
                    opened[0],
                    identity,
                    *place,
                    level,
                    names=self.names,
                    known=self.known,
                    stranded=self._stranded,
                    marks=marks,
                    newest=newest,
                )
            except _native.DamagedError as error:
                reason = str(error)
                continue
            except OSError as error:
                reason = f"it cannot be read: {error.strerror}"
                continue
            below += found or []
            told.add(digest)
            if place == (pack, offset):
                return below
        if told:
            return below
        raise IntegrityError(f"page {identity.hex()} of a block map is damaged or missing: {reason}")

    def _places(self, identity: bytes, pack: int, offset: int) -> Iterator[tuple[tuple[int, int], bool]]:
        """Where a page may be, the best place first; and whether that counts only if there is no other."""
        if self.names.is_present(pack):
            yield (pack, offset), False
        for known in (self.known, None, self._stranded):
            for place in (known or self._trailers()).places(identity):
                yield place[:2], known is self._stranded

    def _trailers(self) -> _native.Known:
        """The pages of all map packs that can be relied upon."""
        if self._pages is None:
            self._pages = _native.Known(self.names)
            doomed = self.view.doomed
            safe = [name for name in self.view.maps if name not in doomed]
            for name, records in records_of_all(self.repository, safe, KIND_MAP):
                self._pages.add_pack(self.names.intern(name), records)
        return self._pages

    def _map_pack(self, number: int) -> tuple[int, _native.MapPack] | None:
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        opened = None
        name = self.names.name(number)
        if name is not None and name in self.view.maps:
            try:
                fd = self.repository.open_object(number, KIND_MAP)
            except (IntegrityError, NotFound):
                fd = -1
            if fd >= 0:
                try:
                    opened = fd, _native.MapPack(fd, name, self.repository.id)
                except (_native.DamagedError, OSError):
                    os.close(fd)
        self._open[number] = opened
        if len(self._open) > _KEPT_PACKS and (old := self._open.popitem(last=False)[1]) is not None:
            os.close(old[0])
        return opened

    def _complete(self) -> None:
        """Take in the records of packs that no index segment names, those listed since too."""
        self._completed = True
        doomed = self.view.doomed
        listed = dict(_packs(self.repository, PACKS))
        fresh = {name: size for name, size in listed.items() if name not in self.view.packs}
        self.view.packs |= fresh
        self.names.set_present([name for name in (*self.view.packs, *self.view.maps) if name not in doomed])
        self.known = index.load(self.repository)
        named = index.packs_named(self.repository)
        strange = [name for name in self.view.packs if name not in named and name not in doomed]
        for name, records in records_of_all(self.repository, strange, KIND_DATA):
            self.known.add_pack(self.names.intern(name), records)

    def _ask_all(self) -> bool:
        """Take in what the index lacks of packs that it names: a merge keeps one place of each block."""
        safe = sorted(self.view.packs.keys() - self.view.doomed)
        return add_unknown(self.repository, self.names, self.known, safe, KIND_DATA)

    def close(self) -> None:
        """Close the descriptors of map packs."""
        for opened in self._open.values():
            if opened is not None:
                os.close(opened[0])
        self._open.clear()


def newest_of(sets: Mapping[str, Public]) -> frozenset[str]:
    """The newest set of each lineage."""
    newest: dict[str, tuple[int, int, str]] = {}
    for set_id, one in sets.items():
        order = (one.sequence, one.created, set_id)
        newest[one.lineage] = max(order, newest.get(one.lineage, order))
    return frozenset(order[2] for order in newest.values())
