"""Object locks of a repository in S3: extended for what its image sets need, by a process of its own.

Invariant: a lock is only ever made longer. Where anything looks as if somebody had
deleted or overwritten what is made once and never changed, nothing is left
out: every object is locked for longer, those that are hidden too, so that no lock runs out
while a person looks. No key of the repository takes part, and nothing is deleted or written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from msgspec import Struct

from imager.errors import IntegrityError, NoRepository, StorageError, UsageError
from imager.events import Reporter
from imager.repository import partial, tombstones
from imager.repository.format import (
    ABSENT,
    CONFIG,
    DAMAGED,
    EPOCHS,
    FORGOTTEN,
    INDEX,
    MAPS,
    PACKS,
    PINS,
    REVOKED,
    SETS,
    SLOTS,
    is_id,
)
from imager.repository.keyless import open_keyless
from imager.repository.manifest import is_abort_mark
from imager.repository.marking import Marker, look
from imager.repository.prune_plan import describe_damage
from imager.repository.repository import Repository
from imager.storage.base import Storage
from imager.storage.object_versions import Lock, Mode, ObjectVersions, Version, versions_of
from imager.units import format_size, format_time

__all__ = ["RetainPlan", "RetainSummary", "Target", "execute", "plan"]

_ONCE = (CONFIG, SLOTS, EPOCHS, SETS, PACKS, MAPS, REVOKED, FORGOTTEN)
"Names that are never used again: of their versions the first is the true one."
_WHOLE = (CONFIG, SLOTS, EPOCHS, SETS, REVOKED, FORGOTTEN, PINS, ABSENT, INDEX, DAMAGED)
"What is needed as long as it is there. Announcements, condemnations and records of reads are not."
_SECOND = 1_000_000


class Target(Struct, frozen=True):
    """A version, and the lock that it gets."""

    version: Version
    lock: Lock


class RetainPlan(Struct, frozen=True):
    """What is going to be locked. `until` and `soonest` in microseconds since 1970, by the store's clock.

    `objects` are needed, of `bytes`; `unlocked` of them have no lock at all, and `soonest` is when the first
    lock on one of the others runs out (None: there is none). `suspicions`: what looks like an
    attack; where there are any, everything is needed.
    """

    location: str
    until: int
    objects: int
    bytes: int
    unlocked: int
    soonest: int | None
    targets: tuple[Target, ...]
    suspicions: tuple[str, ...]

    def describe(self) -> list[str]:
        """The plan in lines for a person."""
        lines = [f"NOTICED: {one}" for one in self.suspicions]
        what = "everything that was ever there" if self.suspicions else "what image sets need"
        state = f"{self.unlocked} without a lock"
        if self.soonest is not None:
            state += f", the first of the others runs out {format_time(self.soonest / 1e6)}"
        lines.append(f"{what}: {self.objects} objects, {format_size(self.bytes)}; {state}")
        lines.append(f"{len(self.targets)} to lock until {format_time(self.until / 1e6)}")
        return lines


class RetainSummary(Struct, frozen=True):
    """What was locked. See `RetainPlan`; `extended`: objects that were locked, or for longer."""

    location: str
    until: int
    objects: int
    bytes: int
    extended: int
    suspicions: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing looks like an attack."""
        return not self.suspicions


class _History(Struct, frozen=True):
    """What a name holds now (`newest`), and what it held first; None: nothing but marks of deletion."""

    newest: Version
    data: Version | None
    "The newest version that has bytes."
    first: Version | None

    @property
    def overwritten(self) -> bool:
        """Whether the name holds other bytes than the first."""
        return (
            self.data is not None
            and self.first is not None
            and (self.data.size, self.data.etag) != (self.first.size, self.first.etag)
        )


def plan(
    storage: Storage,
    reporter: Reporter,
    *,
    span: int | None = None,
    until: int | None = None,
    mode: Mode | None = None,
) -> RetainPlan:
    """What has to be locked so that all that image sets need is locked `until` then, or for `span` from now.

    Both in microseconds. `mode`: of objects that have no lock yet; None: as the bucket does it. A lock that
    is there keeps its mode. A repository that can't be read any more is a suspicion. Raises
    `NoRepository` where there never was one, `UsageError`, `StorageError`.
    """
    versions = versions_of(storage)
    locking = versions.locking()
    if locking is None:
        raise StorageError(
            f"the bucket of {storage.url} has no object lock",
            hint="it is chosen when a bucket is made; imager sync copies the repository to such a one",
        )
    wanted = until if until is not None else locking.now + (span or 0)
    wanted -= wanted % _SECOND
    if wanted <= locking.now:
        raise UsageError(
            "that time is over: a lock ends in the future", hint="write --for 30d, or a later date"
        )
    reporter.phase("looking at versions", None)
    found = _histories(versions)
    reporter.end()
    needed, suspicions = _needed(storage, versions, found, reporter)
    chosen = [*_chosen(found, None if suspicions else needed)]
    reporter.phase("looking at locks", None)
    locks = list(partial.at_once(storage, versions.lock_of, chosen))
    reporter.end()
    fresh: Mode = mode or locking.mode or "GOVERNANCE"
    return RetainPlan(
        location=storage.url,
        until=wanted,
        objects=len(chosen),
        bytes=sum(one.size for one in chosen),
        unlocked=sum(lock is None for lock in locks),
        soonest=min((lock.until for lock in locks if lock is not None), default=None),
        targets=tuple(
            Target(one, Lock(lock.mode if lock else fresh, wanted))
            for one, lock in zip(chosen, locks, strict=True)
            if lock is None or lock.until < wanted
        ),
        suspicions=tuple(suspicions),
    )


def execute(storage: Storage, plan: RetainPlan, reporter: Reporter) -> RetainSummary:
    """Lock what the plan says. Can be interrupted and done again. Raises `StorageError`, `UsageError`."""
    begun = time.monotonic()
    versions = versions_of(storage)
    reporter.phase("locking", None)
    for _ in partial.at_once(storage, lambda one: versions.lock(one.version, one.lock), plan.targets):
        pass
    reporter.end()
    return RetainSummary(
        location=plan.location,
        until=plan.until,
        objects=plan.objects,
        bytes=plan.bytes,
        extended=len(plan.targets),
        suspicions=plan.suspicions,
        seconds=round(time.monotonic() - begun, 3),
    )


# --- what is needed -----------------------------------------------------------------------


def _needed(
    storage: Storage, versions: ObjectVersions, found: dict[str, _History], reporter: Reporter
) -> tuple[frozenset[str], list[str]]:
    """Names of the packs that image sets refer to, and what looks like an attack."""
    since = _begun(found)
    overwritten = [
        f"{name} was overwritten"
        for name, history in found.items()
        if history.overwritten
        and history.data is not None
        and history.data.modified > since
        and name.startswith(_ONCE)
    ]
    try:
        with open_keyless(storage) as repository:
            packs, troubles = _marked(repository, reporter)
            return packs, [*troubles, *overwritten, *_deleted(repository, versions, found)]
    except (NoRepository, IntegrityError) as error:
        if CONFIG not in found:
            raise
        return frozenset(), [f"it cannot be read: {error.message}", *overwritten]


def _begun(found: dict[str, _History]) -> int:
    """When the repository came to be: an init that was interrupted before may have left things."""
    config = found.get(CONFIG)
    return config.first.modified if config is not None and config.first is not None else 0


def _marked(repository: Repository, reporter: Reporter) -> tuple[frozenset[str], list[str]]:
    """Names of the packs that image sets refer to, and what is damaged or missing."""
    reporter.phase("marking what lives", None)
    view = look(repository)
    marker = Marker(repository, view, reporter)
    try:
        marked = marker.mark(view.sets)
    finally:
        marker.close()
    reporter.end()
    names = (repository.names.name(number) for number in marked.marks.packs())
    troubles = describe_damage(view.damaged, marked)
    if marked.marks.lost:
        troubles.append(f"{marked.marks.lost} references to blocks lead nowhere: their packs are missing")
    return frozenset(name.hex() for name in names if name is not None), troubles


def _histories(versions: ObjectVersions) -> dict[str, _History]:
    found: dict[str, _History] = {}
    for one in versions.versions():
        if not one.name.startswith(_ONCE) and not one.name.startswith(_WHOLE):
            continue
        data = None if one.deleted else one
        before = found.get(one.name)
        if before is None:
            found[one.name] = _History(one, data, data)
        elif data is not None:
            found[one.name] = _History(before.newest, before.data or data, data)
    return found


def _deleted(repository: Repository, versions: ObjectVersions, found: dict[str, _History]) -> list[str]:
    """What is gone that nobody takes away but by hand, or to do harm."""
    lines: list[str] = []
    slots = [
        history for name, history in found.items() if name.startswith(SLOTS) and is_id(name[len(SLOTS) :])
    ]
    if slots and all(history.newest.deleted for history in slots):
        lines.append("every key slot was deleted: the last one never is")
    since = _begun(found)
    for name, history in found.items():
        if history.first is None or not history.newest.deleted or history.newest.modified <= since:
            continue
        if name.startswith((EPOCHS, REVOKED, FORGOTTEN)):
            lines.append(f"{name} was deleted")
        elif name.startswith(SETS) and _vanished(repository, versions, history.first):
            lines.append(f"image set {name.removeprefix(SETS)} was deleted, and never forgotten")
    return lines


def _vanished(repository: Repository, versions: ObjectVersions, manifest: Version) -> bool:
    """Whether an image set is gone that nobody forgot, as far as a signed tombstone says."""
    set_id = manifest.name.removeprefix(SETS)
    if not is_id(set_id) or is_abort_mark(versions.read(manifest, 0, 8)):
        return False
    try:
        return tombstones.read_tombstone(repository, set_id) is None
    except IntegrityError:
        return True


def _chosen(found: dict[str, _History], needed: frozenset[str] | None) -> Iterator[Version]:
    """The versions to lock; `needed`: names of packs, None: lock all that has ever been there."""
    for name, history in found.items():
        if history.first is None or history.data is None:
            continue
        if needed is not None:
            if history.newest.deleted:
                continue
            if name.startswith((PACKS, MAPS)) and name[-64:] not in needed:
                continue
        # A true object that is back under its name is the one that the bucket shows.
        yield history.data
        if history.overwritten and name.startswith(_ONCE):
            yield history.first
