"""Where a record is that is not where a map says: prune has moved it, or a repair set its pack aside.

Invariant: a location is a hint and the id the truth. The index is asked first; where
that does not know, the trailers of the packs that no index segment names are, and
before something counts as lost, those of all packs: a merged segment names one place of each
block, and that one may be gone. What is found lies in a pack that the storage lists.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

from imager import _native
from imager.errors import IntegrityError
from imager.repository import index, partial
from imager.repository.format import KIND_DATA, KIND_MAP, pack_object
from imager.repository.packs import PackAccess
from imager.repository.segments import cache_of
from imager.storage.errors import Gone, NotFound, StorageError, Unavailable

Place = tuple[int, int, int]
"Number of the pack in the repository's names, offset, length of the record."
Tried = Mapping[bytes, Container[tuple[int, int]]]
"By id the places that were no good: number of the pack, and offset."
MOST_LOOKS = 16
"How often a reader looks for a record that is damaged where it was found, or that prunes move on."


_NONE: Tried = {}


class Locator:
    """Finds records of one repository by their ids. Nothing is read before it is asked."""

    def __init__(self, repository: PackAccess) -> None:
        self._repository = repository
        self._names = _native.Names()  # Its own: what is present to a writer is another matter.
        self._known = _native.Known(self._names)
        self._listing: frozenset[str] = frozenset()
        self._complete: set[int] = set()
        self._exhausted: set[int] = set()

    def find(self, identity: bytes, kind: int, tried: Container[tuple[int, int]] = ()) -> Place | None:
        """Where a record is, other than in the places that were tried; see `find_all`."""
        return self.find_all([identity], kind, {identity: tried}).get(identity)

    def find_all(self, identities: Iterable[bytes], kind: int, tried: Tried = _NONE) -> dict[bytes, Place]:
        """Where records are, of those that are found; `kind`: that of their pack.

        A record may be there more than once: what was `tried` is passed over. Looks again,
        once, where packs or segments came or went since it looked. Raises `StorageError`.
        """
        wanted = list(identities)
        found: dict[bytes, Place] = {}
        for attempt in (
            self._as_it_is, self._completed, self._looked_again, self._completed, self._asked_all,
        ):  # fmt: skip
            missing = [identity for identity in wanted if identity not in found]
            if not missing or not attempt(kind):
                continue
            for identity in missing:
                passed = tried.get(identity, ())
                for pack, offset, length in self._known.places(identity):
                    number = self._translated(pack)
                    if (number, offset) not in passed:
                        found[identity] = (number, offset, length)
                        break
        return found

    def is_doubtful(self, identity: bytes, tried: Container[tuple[int, int]]) -> bool:
        """Whether another place of a record that was found is known than those that were tried."""
        places = ((self._translated(pack), offset) for pack, offset, _ in self._known.places(identity))
        return any(place not in tried for place in places)

    def look_again(self) -> bool:
        """List the packs and load the index anew; False where nothing came or went. Raises `StorageError`."""
        return self._load()

    def _translated(self, number: int) -> int:
        name = self._names.name(number)
        assert name is not None, "packs of the index have names"
        return self._repository.names.intern(name)

    # --- the ways of looking; each tells whether it brought anything new ---------------------

    def _as_it_is(self, kind: int) -> bool:
        return bool(self._listing) or self._load()

    def _looked_again(self, kind: int) -> bool:
        return self._load()

    def _load(self) -> bool:
        """List the packs, load the index; False where nothing has changed."""
        repository = self._repository
        packs = repository.pack_names(KIND_DATA) + repository.pack_names(KIND_MAP)
        # After the packs: what was moved out of one that is not listed was in the index before.
        segments = index.segment_names(repository)
        listing = frozenset(segments) | {name.hex() for name in packs}
        if listing == self._listing:
            return False
        self._listing = listing
        self._names = _native.Names()
        self._names.set_present(packs)
        self._known = _native.Known(self._names)
        self._complete.clear()
        self._exhausted.clear()
        cache = cache_of(repository)
        for name in segments:
            try:
                index.load_one(repository, self._known, name, cache)
            except Gone:
                raise
            except (IntegrityError, StorageError):
                continue  # A hint that is damaged or gone; the trailers tell as well.
        return True

    def _completed(self, kind: int) -> bool:
        """Take in what packs hold that no segment names."""
        if kind in self._complete:
            return False
        self._complete.add(kind)
        indexed = {self._names.name(number) for number in range(self._names.reserve())}
        strange = [name for name in self._repository.pack_names(kind) if name not in indexed]
        for name, records in records_of_all(self._repository, strange, kind):
            self._known.add_pack(self._names.intern(name), records)
        return True

    def _asked_all(self, kind: int) -> bool:
        """Take in what any pack holds and the index does not know."""
        if kind in self._exhausted:
            return False
        self._exhausted.add(kind)
        packs = self._repository.pack_names(kind)
        try:
            return add_unknown(self._repository, self._names, self._known, packs, kind)
        except (Gone, Unavailable):
            raise
        except StorageError:
            return True  # What cannot be read there was not found; why the record is not to be had, is known.


def places_elsewhere(
    locator: Locator, identity: bytes, kind: int, tried: set[tuple[int, int]]
) -> Iterator[Place]:
    """The places of a record other than those that were `tried`, to which they are added; looks again as long
    as others move it meanwhile. Raises `StorageError`.
    """
    for _ in range(MOST_LOOKS):
        place = locator.find(identity, kind, tried)
        if place is not None:
            tried.add(place[:2])
            yield place
        elif not locator.look_again():
            return


def fetch_elsewhere(
    locator: Locator,
    failures: Sequence[_native.Failure],
    fetch: Callable[[_native.Gather], list[_native.Failure]],
) -> tuple[list[_native.Failure], list[_native.Failure]]:
    """Fetch blocks whose records are not whole where a map says from other places: (had, not to be had).

    Each of `failures` comes back in one of the two. `fetch` gets what is gathered and gives what
    failed of it. As long as others move records meanwhile it looks again. Raises `StorageError`.
    """
    tried: dict[bytes, set[tuple[int, int]]] = {}
    for failure in failures:
        tried.setdefault(bytes(failure.id), set()).add((failure.pack, failure.offset))
    had: list[_native.Failure] = []
    left = list(failures)
    for _ in range(MOST_LOOKS):
        places = locator.find_all({bytes(one.id) for one in left}, KIND_DATA, tried)
        if not places:
            if not left or not locator.look_again():
                break
            continue
        gather = _native.Gather()
        hoped = [failure for failure in left if bytes(failure.id) in places]
        for failure in hoped:
            place = places[bytes(failure.id)]
            tried[bytes(failure.id)].add(place[:2])
            slot = _native.Slots(1)
            slot.set_data(0, bytes(failure.id), *place)
            for block in failure.blocks:
                gather.add(block, slot)
        gather.sort()
        lost = {block for failure in fetch(gather) for block in failure.blocks}
        had += [failure for failure in hoped if lost.isdisjoint(failure.blocks)]
        left = [one for one in left if bytes(one.id) not in places or not lost.isdisjoint(one.blocks)]
    return had, left


Records = list[tuple[int, bytes, int, int]]
"(kind, id, offset, length) of each."


def records_of(repository: PackAccess, name: bytes, kind: int) -> Records:
    """A pack's records; none where it is gone or its frame is damaged. Raises `StorageError`."""
    try:
        fd = partial.frame(repository.storage, pack_object(kind, name))
    except NotFound:
        return []
    try:
        return _native.pack_records(fd, name, repository.id)
    except (_native.DamagedError, OSError):
        return []
    finally:
        os.close(fd)


def add_unknown(
    repository: PackAccess, names: _native.Names, known: _native.Known, packs: Sequence[bytes], kind: int
) -> bool:
    """Read the trailers of packs, for those of their records that `known` lacks; whether there were any.

    What it knows already stays out, so memory is bounded by what the index lacks. Raises `StorageError`.
    """
    found = False
    for name, records in records_of_all(repository, packs, kind):
        if known.count(b"".join(record[1] for record in records)) < len(records):
            lacking = [record for record in records if known.find(record[1]) is None]
            known.add_pack(names.intern(name), lacking)
            found = True
    return found


def records_of_all(
    repository: PackAccess, names: Sequence[bytes], kind: int
) -> Iterator[tuple[bytes, Records]]:
    """The records of many packs, as `records_of` gives them. Raises `StorageError`."""
    found = partial.at_once(repository.storage, lambda name: records_of(repository, name, kind), names)
    yield from zip(names, found, strict=True)
