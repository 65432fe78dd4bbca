"""The block maps of all sets as they look without a key.

Invariant: what is called whole has the digests that signed manifests lead to,
page by page; what only a key could tell is not claimed, and said to be so.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from imager.repository.findings import Hurt, Problem, Survey
from imager.repository.format import (
    FOOTER,
    KIND_DATA,
    KIND_MAP,
    MAX_RECORDS,
    RECORD_HEAD,
    TRAILER_ENTRY,
    pack_object,
)
from imager.repository.manifest import Manifest
from imager.repository.public import Place, PublicPage, PublicReader, walk
from imager.storage.errors import NotFound, StorageError

UNTOLD = (
    "without a key it was not checked: whether blocks, map pages and manifests decrypt, "
    "whether each block has its hash, and which bytes of which disk a damage costs"
)
_KEPT = 64

Entries = dict[int, tuple[int, bytes]]
"Offset -> (length of the record, id)."


def survey_maps(found: Survey, sets: Iterable[Manifest]) -> None:
    """Visit every page that these sets lead to; what is wrong goes to `found`. Raises `StorageError`."""
    reader = PublicReader(found.repository)
    names = found.repository.names
    seen: set[bytes] = set()

    def leaf(page: PublicPage) -> None:
        gone = {name for name in page.packs if pack_object(KIND_DATA, name) not in found.sizes}
        found.used.update(names.intern(name) for name in page.packs if name not in gone)
        stray = [target for target in page.targets if target.pack in gone]
        places = found.repository.locator.find_all({one.id for one in stray}, KIND_DATA) if stray else {}
        # What prune has moved, or a backup stored anew, is where its id leads.
        found.used.update(place[0] for place in places.values())
        found.used.update(names.intern(one.pack) for one in stray if one.id not in places)

    for manifest in sets:
        reach = walk(reader, manifest.public.roots, seen, leaf)
        found.pages += reach.pages
        for name in reach.maps:
            number = names.intern(name)
            found.maps.add(number)
            found.used.add(number)
        for place, reason in reach.lost:
            _blame(found, place, reason)


def _blame(found: Survey, place: Place, reason: str) -> None:
    number = found.repository.names.intern(place.pack)
    found.maps.add(number)
    found.used.add(number)
    if number in found.aside:
        return
    missing = pack_object(KIND_MAP, place.pack) not in found.sizes
    found.blame(number, "it is missing" if missing else f"a page of a block map is damaged: {reason}")


def check_blocks(found: Survey, chosen: list[str]) -> None:
    """Whether each block that a page names is in its pack, for the packs that were read (`chosen`).

    A block that is not in its place counts as there where the index knows another one.
    """
    trailers = _Trailers(found, {path for path in chosen if path.startswith("packs/")})
    strays: dict[bytes, int] = {}

    def leaf(page: PublicPage) -> None:
        for target in page.targets:
            entries = trailers.of(target.pack)
            if entries is None or entries.get(target.offset) == (target.length, target.id):
                continue
            if found.repository.locator.find(target.id, KIND_DATA) is None:
                strays[target.pack] = strays.get(target.pack, 0) + 1

    reader = PublicReader(found.repository)
    seen: set[bytes] = set()
    for manifest in found.listing.sets:
        walk(reader, manifest.public.roots, seen, leaf)
    for pack, number in sorted(strays.items()):
        path = pack_object(KIND_DATA, pack)
        found.problems.append(
            Problem("map", path, f"{number} blocks that block maps name are not in it, and not in the index")
        )


class _Trailers:
    """Records of packs by their trailers, the last few kept."""

    def __init__(self, found: Survey, wanted: set[str]) -> None:
        self._found = found
        self._wanted = wanted
        self._kept: OrderedDict[bytes, Entries | None] = OrderedDict()

    def of(self, pack: bytes) -> Entries | None:
        """The records of a pack; None where it is not one of those that are looked at, or damaged."""
        if pack in self._kept:
            self._kept.move_to_end(pack)
            return self._kept[pack]
        path = pack_object(KIND_DATA, pack)
        bad = self._found.repository.names.intern(pack) in self._found.bad
        entries = None if bad or path not in self._wanted else self._read(path)
        self._kept[pack] = entries
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return entries

    def _read(self, path: str) -> Entries | None:
        storage, size = self._found.repository.storage, self._found.sizes[path]
        try:
            footer = storage.read(path, size - FOOTER, FOOTER)
            count, at = int.from_bytes(footer[8:12], "little"), int.from_bytes(footer[16:24], "little")
            if count > MAX_RECORDS or at + count * TRAILER_ENTRY + FOOTER != size:
                return None
            trailer = storage.read(path, at, count * TRAILER_ENTRY)
        except (NotFound, StorageError):
            return None  # It was whole a moment ago; whoever took it away since, the next check tells.
        entries: Entries = {}
        offset = at
        for start in range((count - 1) * TRAILER_ENTRY, -1, -TRAILER_ENTRY):
            length = RECORD_HEAD + int.from_bytes(trailer[start + 12 : start + 16], "little")
            offset -= length
            entries[offset] = length, trailer[start + 16 : start + 48]
        return entries


def hurt_sets(found: Survey) -> dict[int, list[Hurt]]:
    """Which sets refer to each bad pack: a key would tell which of their bytes."""
    costs: dict[int, list[Hurt]] = {}
    doubtful = set(found.bad) | found.aside
    if not doubtful:
        return costs
    reader, names = PublicReader(found.repository), found.repository.names
    for manifest in found.listing.sets:
        hit: set[int] = set()

        def leaf(page: PublicPage, hit: set[int] = hit) -> None:
            bad = {name for name in page.packs if names.intern(name) in doubtful}
            stray = [target for target in page.targets if target.pack in bad]
            places = found.repository.locator.find_all({one.id for one in stray}, KIND_DATA) if stray else {}
            # Elsewhere, and not in another doubtful pack: then nothing hangs on this one.
            whole = {identity for identity, place in places.items() if place[0] not in doubtful}
            hit.update(names.intern(one.pack) for one in stray if one.id not in whole)

        reach = walk(reader, manifest.public.roots, set(), leaf)
        hit |= {names.intern(place.pack) for place, _ in reach.lost}
        for number in sorted(hit & doubtful):
            costs.setdefault(number, []).append(Hurt(manifest.id, "", "", ()))
    return costs
