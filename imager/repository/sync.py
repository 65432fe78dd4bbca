"""Repository to repository: what a copy lacks, and nothing else.

Invariant: objects come in the order in which a writer makes them (packs, map
packs, index, then manifests), each durable before the next kind is begun, so a
set of the copy is complete from the moment that it exists, and a sync that
was killed goes on by what is there. Nothing of the source is changed,
nothing of the target is deleted, and nothing damaged is copied as good.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec import Struct, field

from imager import _native
from imager.errors import IntegrityError, Locked
from imager.events import Reporter
from imager.repository import absent, index, sync_objects, sync_plan
from imager.repository.announce import Announcement
from imager.repository.format import (
    CONFIG,
    EPOCHS,
    MAPS,
    MAX_JSON,
    MAX_SMALL_JSON,
    REVOKED,
    SESSIONS,
    SETS,
    SLOTS,
    parse_config,
)
from imager.repository.manifest import MAX_MANIFEST, is_abort_mark, is_sealed, parse_public
from imager.repository.repository import Repository
from imager.repository.sync_plan import Refused, SyncPlan, Wishes, plan
from imager.repository.transfer import IN_FLIGHT, Copied, copy_packs, copy_small, rename_packs
from imager.storage.base import Storage
from imager.storage.errors import NotFound, StorageError

__all__ = ["Refused", "SyncPlan", "SyncSummary", "Wishes", "execute", "plan", "sync"]

_FIRST = (SLOTS, EPOCHS, REVOKED)
"What there is before the config of a new copy."
_ROUNDS = 5
"So often a plan is made anew because packs of the source vanished."


class SyncSummary(Struct, frozen=True):
    """What a sync came to. `sets`: ids of those that the target has now and had not before.

    `verified`: packs that were read back from the target, None where that was not asked for.
    """

    source: str
    target: str
    repository: str
    created: bool
    sets: tuple[str, ...]
    present: int
    packs: int
    maps: int
    objects: int
    bytes: int
    verified: int | None
    refused: tuple[Refused, ...]
    notes: tuple[str, ...]
    seconds: float
    ok: bool


class _Done(Struct):
    """What is there by now."""

    sets: list[str] = field(default_factory=list)
    packs: list[str] = field(default_factory=list)
    maps: list[str] = field(default_factory=list)
    objects: int = 0
    bytes: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    "Packs of the source that are damaged, and how."
    refused: dict[str, Refused] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def spoil(self, name: str, problem: str) -> None:
        """A pack of the source is damaged."""
        self.bad[name] = problem
        self.refuse([Refused(name, f"it is damaged in the source: {problem}")])

    def count(self, copied: Copied) -> None:
        """A pack is there now."""
        (self.maps if copied.name.startswith(MAPS) else self.packs).append(copied.name)
        self.bytes += copied.size

    def refuse(self, items: Sequence[Refused]) -> None:
        self.refused.update({item.object: item for item in items})


def sync(
    source: Repository, target: Storage, wishes: Wishes, reporter: Reporter, *, verify: bool = False
) -> SyncSummary:
    """Plan and execute at once."""
    return execute(source, target, wishes, plan(source, target, wishes), reporter, verify=verify)


def execute(
    source: Repository,
    target: Storage,
    wishes: Wishes,
    first: SyncPlan,
    reporter: Reporter,
    *,
    verify: bool = False,
    workers: int = IN_FLIGHT,
) -> SyncSummary:
    """Carry out a plan; where the source changes meanwhile, plan anew.

    Raises `StorageError` (what was copied stays and counts the next time), `Locked` where the
    target's upkeep declared this sync dead again and again.
    """
    begun = time.monotonic()
    done = _Done(notes=list(first.notes))
    done.refuse(first.refused)
    todo = first
    if not (first.empty or first.creates):
        try:
            target.sweep()  # or syncs that are killed again and again would fill the disk
        except StorageError:
            pass  # Tidying up is no condition of a copy; what really is wrong, the next call tells.
    for _ in range(_ROUNDS):
        if todo.empty:
            break
        if todo.creates and not _create(source, target, done):
            todo = plan(source, target, wishes)  # Another one made the copy meanwhile: go on with it.
            done.refuse(todo.refused)
            continue
        with Announcement.begin(source.config, target, "sync") as own:
            if not sync_plan.still_holds(todo, target):
                todo = plan(source, target, wishes, distrusted=done.sets)
                done.refuse(todo.refused)
            gone = _copy(source, target, todo, own.id, done, reporter, workers)
            if not gone and not own.fenced():
                _commit(source, target, todo, done)
                # Looked at after the sets exist: a prune that fences from now on sees them first.
                if not own.fenced():
                    break
        todo = plan(source, target, wishes, distrusted=done.sets)
        done.refuse(todo.refused)
    else:
        raise Locked(
            "the source or the copy changed again and again while it was copied",
            hint="let prune end at both places, then sync again: it goes on where it stopped",
        )
    verified = _verify(source, target, done, reporter) if verify else None
    return SyncSummary(
        source=first.source,
        target=first.target,
        repository=first.repository,
        created=first.creates,
        sets=tuple(done.sets),
        present=first.present,
        packs=len(done.packs),
        maps=len(done.maps),
        objects=done.objects,
        bytes=done.bytes,
        verified=verified,
        refused=tuple(done.refused[name] for name in sorted(done.refused)),
        notes=tuple(done.notes),
        seconds=round(time.monotonic() - begun, 3),
        ok=not done.refused,
    )


def _create(source: Repository, target: Storage, done: _Done) -> bool:
    """Make the target a repository: slots, epochs and revocations first, the config last, as init does.

    False where it has become one since the plan was made.
    """
    from imager.repository.repository import refuse_used

    if target.exists(CONFIG):
        return False
    refuse_used(target)
    raw = source.storage.read(CONFIG, 0, MAX_SMALL_JSON + 1)
    if parse_config(raw)[0] != source.config:
        raise IntegrityError("config of the source is another than it was a moment ago")
    with target.initializing():
        if target.exists(CONFIG):
            return False
        refuse_used(target)
        for prefix in _FIRST:
            for name in target.list_names(prefix):
                target.delete(name)  # An init or a sync was interrupted: no config, so nobody needs these.
            for name in source.storage.list_names(prefix):
                _object(source, target, name, done)
        target.create(CONFIG, raw)
    return True


def _copy(
    source: Repository,
    target: Storage,
    todo: SyncPlan,
    session: str,
    done: _Done,
    reporter: Reporter,
    workers: int,
) -> bool:
    """Copy what the sets need, and index it. Whether something of the source vanished meanwhile."""
    for name in todo.objects:
        made = todo.creates and name.startswith(_FIRST)
        if not made and not name.startswith(SESSIONS):
            _object(source, target, name, done)
    known = _native.Known(source.names)
    gone = False
    reporter.phase("copying packs", todo.bytes)
    for names in (todo.packs, todo.maps):
        wanted = [name for name in names if name not in done.bad]
        for copied in copy_packs(source.storage, target, wanted, source.id, workers=workers):
            gone = gone or copied.gone
            if copied.problem is not None:
                done.spoil(copied.name, copied.problem)
            elif not copied.gone:
                done.count(copied)
                reporter.advance(copied.size, stored=copied.size)
                if names is todo.packs and copied.records is not None:
                    known.add_pack(source.names.intern(bytes.fromhex(copied.name[-64:])), copied.records)
                    if known.pending >= index.SEGMENT_ENTRIES:
                        _segment(source, target, known, done)
    wanted = [name for name in todo.renamed if name not in done.bad]
    for copied in rename_packs(source.storage, target, wanted, source.id, session, workers=workers):
        gone = gone or copied.gone
        if copied.problem is not None:
            done.spoil(copied.name, copied.problem)
        elif not copied.gone:
            done.count(copied)
            reporter.advance(copied.size, stored=copied.size)
            known.add_pack(source.names.intern(bytes.fromhex(copied.name[-64:])), copied.records or [])
    for name in todo.unindexed:
        _index_again(source, target, known, name)
    _segment(source, target, known, done)
    reporter.end()
    return gone


def _object(source: Repository, target: Storage, name: str, done: _Done) -> None:
    """Copy a slot, an epoch, a revocation, a tombstone, an announcement or an abort mark."""
    try:
        raw = source.storage.read(name, 0, MAX_JSON + 1)
        sync_objects.verify_small(source, name, raw)
        copy_small(target, name, raw)
    except NotFound:
        return
    except IntegrityError as error:
        done.refuse([Refused(name, error.message)])
        return
    done.objects += 1


def _index_again(source: Repository, target: Storage, known: _native.Known, name: str) -> None:
    """Put a pack that the target has into its index: whoever copied it died before."""
    import os

    try:
        fd = target.open(name)
    except NotFound:
        return
    identity = bytes.fromhex(name[-64:])
    try:
        known.add_pack(source.names.intern(identity), _native.pack_records(fd, identity, source.id))
    except (_native.DamagedError, OSError):
        return  # A check of the copy tells; a pack that is not in the index costs space alone.
    finally:
        os.close(fd)


def _segment(source: Repository, target: Storage, known: _native.Known, done: _Done) -> None:
    data = known.segment(source.id)
    if data is not None:
        index.put_anew(target, data)
        known.forget()
        done.objects += 1


def _commit(source: Repository, target: Storage, todo: SyncPlan, done: _Done) -> None:
    """Make the sets exist, oldest first; those that a damaged pack hurts stay out."""
    hurt = _hurt(source, todo, done)

    def lacks(set_id: str, why: str) -> None:
        # Before the sets that came after it: else the copy would look as if somebody had taken it away.
        absent.note(target, source.config.repository, set_id, f"not copied: {why}")

    for set_id in todo.absent:
        lacks(set_id, "another choice of sets")
    for set_id in todo.sets:
        if set_id in hurt:
            done.refuse([Refused(SETS + set_id, f"it is not whole in the source: {hurt[set_id]}")])
            lacks(set_id, "it is not whole in the source")
            continue
        try:
            raw = source.storage.read(SETS + set_id, 0, MAX_MANIFEST + 1)
        except NotFound:
            done.notes.append(f"image set {set_id} was deleted in the source meanwhile")
            lacks(set_id, "it was deleted in the source meanwhile")
            continue
        if is_abort_mark(raw) or not is_sealed(source, raw):
            done.refuse([Refused(SETS + set_id, "its manifest is another than it was a moment ago")])
            lacks(set_id, "its manifest is damaged in the source")
            continue
        parse_public(raw, set_id, source.config.repository)
        copy_small(target, SETS + set_id, raw)
        # After the set: an announcement without one would look like a writer at work.
        _object(source, target, SESSIONS + set_id, done)
        if set_id not in done.sets:
            done.sets.append(set_id)
            done.objects += 1
    for name in todo.objects:
        # Of sets that were there: a sync died before it came to their announcement.
        if name.startswith(SESSIONS) and name.removeprefix(SESSIONS) not in todo.sets:
            _object(source, target, name, done)


def _hurt(source: Repository, todo: SyncPlan, done: _Done) -> dict[str, str]:
    """The sets to which a pack that is damaged in the source belongs, and why."""
    wanted = {*todo.packs, *todo.maps, *todo.renamed}
    failed = {name: reason for name, reason in done.bad.items() if name in wanted}
    if not failed:
        return {}
    planning = sync_plan.begin_reading(source)
    hurt: dict[str, str] = {}
    for set_id in todo.sets:
        needs = sync_plan.needs_of(planning, set_id)
        for name in sorted((needs.packs | needs.maps) & set(failed)):
            hurt[set_id] = f"{name}: {failed[name]}"
            break
    return hurt


def _verify(source: Repository, target: Storage, done: _Done, reporter: Reporter) -> int:
    """Read back every pack that was copied. Raises `IntegrityError`."""
    import os

    names = [*done.packs, *done.maps]
    reporter.phase("reading back", None)
    for name in names:
        fd = target.open(name)
        try:
            report = _native.check_pack(fd, bytes.fromhex(name[-64:]), source.id)
        finally:
            os.close(fd)
        if not report.ok:
            raise IntegrityError(
                f"{name} of {target.url} is not what was written: {report.problem or 'damaged records'}",
                hint="check its disk; then: imager check --read-data --repair there, and sync again",
            )
        reporter.advance(0)
    reporter.end()
    return len(names)
