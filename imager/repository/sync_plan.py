"""What a sync has to copy: chosen sets, and the objects that they need and the target lacks.

Invariant: a set is planned only with everything that it refers to, as its
signed manifest and the digests of its map's pages name it. What the source
cannot give whole is told before anything is copied, and the sets that would
be hurt by it are left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from msgspec import Struct, field

from imager.errors import IntegrityError, NoRepository, UsageError
from imager.repository import imageset, index, manifest, sessions, sync_objects
from imager.repository.format import (
    CONFIG,
    KIND_DATA,
    KIND_MAP,
    MAPS,
    MAX_SMALL_JSON,
    PACKS,
    SETS,
    is_pack_name,
    pack_object,
)
from imager.repository.keyless import open_keyless
from imager.repository.manifest import Public
from imager.repository.public import PublicPage, PublicReader, upper_keys, walk
from imager.repository.repository import Repository
from imager.storage.base import Storage
from imager.storage.errors import Gone, NotFound

_ATTEMPTS = 3


class Wishes(Struct, frozen=True):
    """Which sets to copy: those that fit every kind of wish that was made. None made: all.

    sets: ids or unique prefixes. names, tags: need a key. latest: so many of each lineage.
    since: microseconds since 1970 UTC.
    """

    sets: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    latest: int | None = None
    since: int | None = None

    @property
    def need_key(self) -> bool:
        """Whether they speak of what is sealed."""
        return bool(self.names or self.tags)


class Refused(Struct, frozen=True):
    """An object or a set that is not copied, and why."""

    object: str
    reason: str


class SyncPlan(Struct, frozen=True):
    """What a sync will copy. Objects by name; sets by id, in the order in which they are made.

    `renamed`: packs that the target is about to delete, or may be: they are stored under other names.
    `objects`: slots, epochs, abort marks, tombstones, announcements. `unindexed`: packs that the target
    has and no index of it names. `absent`: predecessors that the target will lack. `bytes`: of the packs.
    """

    source: str
    target: str
    repository: str
    creates: bool
    sets: tuple[str, ...]
    present: int
    packs: tuple[str, ...]
    maps: tuple[str, ...]
    renamed: tuple[str, ...]
    objects: tuple[str, ...]
    unindexed: tuple[str, ...]
    absent: tuple[str, ...]
    bytes: int
    refused: tuple[Refused, ...]
    notes: tuple[str, ...]
    relies: frozenset[str] = frozenset()
    "Objects of the target that must stay for the plan to hold."

    @property
    def empty(self) -> bool:
        """Whether nothing is to be done."""
        return not (self.creates or self.sets or self.objects or self.unindexed or self.absent)


class Planning(Struct):
    """What is known of both ends while a plan is made, and again while it is carried out."""

    source: Repository
    target: Storage
    reader: PublicReader
    creates: bool = False
    sizes: dict[str, int] = field(default_factory=dict)
    "Packs and map packs of the source."
    there: set[str] = field(default_factory=set)
    "Packs and map packs of the target, but none that a prune is about to delete."
    doomed: set[str] = field(default_factory=set)
    "Those that it is."
    pruned: bool = False
    "Whether a prune of the target has no end yet."
    relies: set[str] = field(default_factory=set)
    target_sets: set[str] = field(default_factory=set)
    publics: dict[str, Public] = field(default_factory=dict)
    lost: bool = False
    "Whether something was not to be had."
    looked: bool = False
    "Whether the source's index was read anew."

    def elsewhere(self, identities: Iterable[bytes]) -> dict[bytes, str]:
        """Object names of packs of the source that hold blocks, of those that are found."""
        wanted = set(identities)
        found = self._located(wanted)
        if len(found) < len(wanted) and not self.looked:
            # What the source was when an earlier plan looked: prunes may have moved it on.
            self.looked = True
            if self.source.locator.look_again():
                found |= self._located(wanted - found.keys())
        return found

    def _located(self, identities: Iterable[bytes]) -> dict[bytes, str]:
        found: dict[bytes, str] = {}
        for identity, place in self.source.locator.find_all(identities, KIND_DATA).items():
            name = self.source.names.name(place[0])
            path = pack_object(KIND_DATA, name) if name is not None else ""
            if path in self.sizes:
                found[identity] = path
        return found


def begin(source: Repository, target: Storage) -> Planning:
    """Look at both ends. Raises `UsageError` where the target is another repository's, `IntegrityError`."""
    planning = Planning(source, target, PublicReader(source))
    _compare_config(planning)
    planning.sizes = _sizes(source)
    if not planning.creates:
        # Before the packs: one that is listed, and gone when the condemnations are read, was never there.
        doomed = condemned(target, source.config.repository)
        there = {name for prefix in (PACKS, MAPS) for name in target.list_names(prefix)}
        planning.doomed = doomed & there
        planning.there = there - planning.doomed
        planning.pruned = pruned(target, source.config.repository)
        planning.target_sets = {name.removeprefix(SETS) for name in target.list_names(SETS)}
    return planning


def condemned(storage: Storage, repository: str) -> set[str]:
    """Object names of the packs that a prune is about to delete. Raises `IntegrityError`, `StorageError`."""
    found = sessions.read_condemned(storage, repository).values()
    packs = {pack_object(KIND_DATA, name) for one in found for name in one.packs}
    return packs | {pack_object(KIND_MAP, name) for one in found for name in one.maps}


def pruned(storage: Storage, repository: str) -> bool:
    """Whether somebody prunes there, or did and has no end: it may be asleep. Raises `StorageError`."""
    found = sessions.open_sessions(storage, repository)
    return any(one.told is None or one.told.kind == "prune" for one in found)


def still_holds(made: SyncPlan, target: Storage) -> bool:
    """Whether the target still has what the plan relies on: asked once a session is announced there."""
    if (made.packs or made.maps) and pruned(target, made.repository):
        return False  # They need other names now.
    if not made.relies:
        return True
    doomed = condemned(target, made.repository)
    there = {name for prefix in (SETS, PACKS, MAPS) for name in target.list_names(prefix)}
    return made.relies <= there - doomed


def _sizes(source: Repository) -> dict[str, int]:
    """Packs and map packs that are there, with their sizes."""
    entries = (entry for prefix in (PACKS, MAPS) for entry in source.storage.list(prefix))
    return {entry.name: entry.size for entry in entries if is_pack_name(entry.name[-64:])}


def begin_reading(source: Repository) -> Planning:
    """As `begin`, of the source alone: every set of it is known, and nothing counts as copied."""
    planning = Planning(source, source.storage, PublicReader(source))
    planning.sizes = _sizes(source)
    _manifests(planning, [])
    return planning


def needs_of(planning: Planning, set_id: str) -> Needs:
    """All that one set needs. Raises `StorageError`."""
    needs = Needs()
    _reach(planning, set_id, set(), needs)
    return needs


def _compare_config(planning: Planning) -> None:
    source, target = planning.source, planning.target
    raw = source.storage.read(CONFIG, 0, MAX_SMALL_JSON + 1)
    try:
        other = target.read(CONFIG, 0, MAX_SMALL_JSON + 1)
    except (NotFound, Gone):
        planning.creates = True
        return
    if other == raw:
        return
    from imager.repository.repository import read_config

    try:
        found = read_config(target, writing=True)[0].repository
    except NoRepository as error:
        raise UsageError(f"{target.url} is no copy of {source.storage.url}: {error.message}") from error
    if found == source.config.repository:
        raise IntegrityError(
            f"{target.url} has another config for the same repository",
            hint="one of the two is damaged or was replaced; compare them with a third copy",
        )
    raise UsageError(
        f"{target.url} is another repository ({found[:8]}, not {source.config.repository[:8]})",
        hint="a copy has the id of its original: name an empty place, or the copy that you made before",
    )


# --- which sets ---------------------------------------------------------------------------


def plan(
    source: Repository, target: Storage, wishes: Wishes, *, distrusted: Collection[str] = ()
) -> SyncPlan:
    """What there is to do. `distrusted`: sets of the target that may lack what they refer to.

    Raises `UsageError`, `WrongKey` where a wish needs a key, `StorageError`.
    """
    for _ in range(_ATTEMPTS):
        planning = begin(source, target)
        planning.target_sets -= set(distrusted)
        made = _plan(planning, wishes)
        if not planning.lost or planning.sizes.keys() == _sizes(source).keys():
            break  # Else a prune was at work in the source: what seems lost has another place by now.
    return made


def _plan(planning: Planning, wishes: Wishes) -> SyncPlan:
    source, target = planning.source, planning.target
    refused: list[Refused] = []
    raws = _manifests(planning, refused)
    chosen = _choose(planning, raws, wishes)
    new = [set_id for set_id in chosen if set_id not in planning.target_sets]
    new, notes = sync_objects.not_forgotten(planning, new, wishes)
    needs = _needs(planning, new, refused)
    lacking = {item.object.removeprefix(SETS) for item in refused}
    new = [set_id for set_id in new if set_id not in lacking]
    needed = needs.packs | needs.maps
    packs = sorted(needs.packs - planning.there - planning.doomed)
    maps = sorted(needs.maps - planning.there - planning.doomed)
    renamed = sorted(needed & planning.doomed)
    if planning.pruned:
        # Whoever prunes there may sleep, and delete later what it once condemned: by its old name.
        packs, maps, renamed = [], [], sorted(needed - planning.there)
    present = [one for one in chosen if one in planning.target_sets]
    objects, tombs = sync_objects.lacking(planning, new, present)
    unindexed = _unindexed(planning, needs.packs & planning.there)
    coming = {*new, *planning.target_sets, *tombs}
    before = (planning.publics[set_id].previous for set_id in new)
    absent = {one.set for one in before if one is not None and one.set not in coming}
    return SyncPlan(
        source=source.storage.url,
        target=target.url,
        repository=source.config.repository,
        creates=planning.creates,
        sets=tuple(new),
        present=len(chosen) - len(new) - len(lacking & set(chosen)),
        packs=tuple(packs),
        maps=tuple(maps),
        renamed=tuple(renamed),
        objects=tuple(objects),
        unindexed=tuple(unindexed),
        absent=tuple(sorted(absent)),
        bytes=sum(planning.sizes[name] for name in (*packs, *maps, *renamed)),
        refused=tuple(refused),
        notes=(*sync_objects.notes(planning), *notes),
        relies=frozenset(planning.relies | (needed & planning.there)),
    )


def _manifests(planning: Planning, refused: list[Refused]) -> dict[str, bytes]:
    """The manifests of the source whose seal is whole, by id; their public parts go into `publics`."""
    source = planning.source
    found: dict[str, bytes] = {}
    for set_id, raw in imageset.raw_sets(source):
        if manifest.is_abort_mark(raw):
            continue
        try:
            manifest.parse_public(raw, set_id, source.config.repository)
            if not manifest.is_sealed(source, raw):
                raise IntegrityError("its manifest's seal is not by this repository")
            public = manifest.decode(source, set_id, raw).public
        except (IntegrityError, NoRepository) as error:
            refused.append(Refused(SETS + set_id, error.message))
            continue
        planning.publics[set_id] = public
        found[set_id] = raw
    return dict(sorted(found.items(), key=lambda item: (planning.publics[item[0]].created, item[0])))


def _choose(planning: Planning, raws: dict[str, bytes], wishes: Wishes) -> list[str]:
    """Ids of the sets that are wished for, oldest first. Raises `UsageError`, `WrongKey`."""
    source, publics, chosen = planning.source, planning.publics, list(raws)
    if wishes.sets:
        named = {_named(text, chosen) for text in wishes.sets}
        chosen = [set_id for set_id in chosen if set_id in named]
    if wishes.need_key:
        chosen = [set_id for set_id in chosen if _fits(source, set_id, raws[set_id], wishes)]
    if wishes.since is not None:
        chosen = [set_id for set_id in chosen if publics[set_id].created >= wishes.since]
    if wishes.latest is not None:
        lineages: dict[str, list[str]] = {}
        for set_id in chosen:
            lineages.setdefault(publics[set_id].lineage, []).append(set_id)
        kept = {set_id for members in lineages.values() for set_id in members[-wishes.latest :]}
        chosen = [set_id for set_id in chosen if set_id in kept]
    return chosen


def _named(text: str, ids: Sequence[str]) -> str:
    prefix = text.lower()
    found = [set_id for set_id in ids if set_id.startswith(prefix)] if len(prefix) >= 4 else []
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(f"{text!r} may be any of {len(found)} image sets", hint="give more digits of the id")
    raise UsageError(
        f"no whole image set of the source has the id {text!r}",
        hint="write at least 4 digits of it, as list shows it",
    )


def _fits(source: Repository, set_id: str, raw: bytes, wishes: Wishes) -> bool:
    body = manifest.decode(source, set_id, raw).content
    fits = not wishes.names or body.name in wishes.names
    return fits and (not wishes.tags or not set(wishes.tags).isdisjoint(body.tags))


# --- what they need ------------------------------------------------------------------------


class Needs(Struct):
    """Object names of the packs that sets refer to; `lost`: what is not to be had, a line each."""

    packs: set[str] = field(default_factory=set)
    maps: set[str] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)


def _needs(planning: Planning, new: list[str], refused: list[Refused]) -> Needs:
    """All that the new sets need; those that cannot be had whole are refused."""
    seen = _held(planning, new)
    together = Needs()
    for set_id in new:
        _reach(planning, set_id, seen, together)
    if not together.lost:
        return together
    planning.lost = True
    # Something is missing: only now each set is looked at by itself, to tell which ones that hurts.
    together = Needs()
    for set_id in new:
        own = Needs()
        _reach(planning, set_id, set(), own)
        if own.lost:
            more = f" and {len(own.lost) - 1} more" if len(own.lost) > 1 else ""
            refused.append(Refused(SETS + set_id, f"it is not whole in the source: {own.lost[0]}{more}"))
            continue
        together.packs |= own.packs
        together.maps |= own.maps
    return together


def _held(planning: Planning, new: Iterable[str]) -> set[bytes]:
    """Keys of pages of sets that both ends have, of the same lineages: the target has all below them."""
    lineages = {planning.publics[set_id].lineage for set_id in new}
    newest: dict[str, Public] = {}
    for set_id, public in planning.publics.items():
        if public.lineage in lineages and set_id in planning.target_sets:
            before = newest.get(public.lineage)
            if before is None or before.sequence < public.sequence:
                newest[public.lineage] = public
    held: set[bytes] = set()
    for public in newest.values():
        held |= upper_keys(planning.reader, public.roots)
        planning.relies.add(SETS + public.set)
    return held


def _reach(planning: Planning, set_id: str, seen: set[bytes], needs: Needs) -> None:
    def leaf(page: PublicPage) -> None:
        gone = {number for number, name in enumerate(page.packs) if not _had(planning, KIND_DATA, name)}
        needs.packs.update(
            pack_object(KIND_DATA, name) for number, name in enumerate(page.packs) if number not in gone
        )
        if gone:
            _look_elsewhere(planning, page, {page.packs[number] for number in gone}, needs)

    found = walk(planning.reader, planning.publics[set_id].roots, seen, leaf)
    for name in found.maps:
        if _had(planning, KIND_MAP, name):
            needs.maps.add(pack_object(KIND_MAP, name))
        else:
            needs.lost.append(f"map pack {name.hex()} was set aside")
    needs.lost += [f"a map page in pack {place.pack.hex()}: {reason}" for place, reason in found.lost]


def _had(planning: Planning, kind: int, name: bytes) -> bool:
    path = pack_object(kind, name)
    return path in planning.sizes or path in planning.there


def _look_elsewhere(planning: Planning, page: PublicPage, gone: set[bytes], needs: Needs) -> None:
    """The packs to which a prune has moved the blocks of packs that are gone."""
    stray = [target for target in page.targets if target.pack in gone]
    found = planning.elsewhere({target.id for target in stray})
    needs.packs.update(found.values())
    lost = [target for target in stray if target.id not in found]
    if lost:
        needs.lost.append(f"{len(lost)} blocks of pack {lost[0].pack.hex()}, which is missing")


def _unindexed(planning: Planning, packs: set[str]) -> list[str]:
    """Those of the packs, which the target has, that no index segment there names: an earlier sync died."""
    if not packs:
        return []
    with open_keyless(planning.target) as copy:
        named = index.packs_named(copy)
    return sorted(name for name in packs if bytes.fromhex(name[-64:]) not in named)
