"""Prune: what no image set needs any more goes; what lives in sparse packs moves together.

Invariant: a pack is deleted only when it has been condemned, when every session
that may not know of that has ended, and when, as marked after that, each record
that lives in it is in a pack that can be relied upon, and the index says where. So no
backup waits for a prune, and none loses anything by it, whenever either of them is
killed, or sleeps for days (docs/design/locking.md). No clock takes part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence

from msgspec import Struct, field

from imager import _native
from imager.errors import IntegrityError, Locked, StorageError, UsageError
from imager.events import Reporter
from imager.repository import index, partial, prune_plan, sessions
from imager.repository.format import (
    CONDEMNED,
    KIND_DATA,
    KIND_MAP,
    PACK_TARGET,
    SESSIONS,
    SETS,
    is_id,
    now,
    pack_object,
)
from imager.repository.marking import Marked, Marker, View, look
from imager.repository.prune_plan import Pack, PruneOptions, PrunePlan, PruneSummary, describe_damage
from imager.repository.repository import Repository
from imager.repository.session import writing_failed
from imager.repository.sessions import Condemnation
from imager.storage.errors import AlreadyExists, Gone, NotFound, Retained
from imager.units import count

__all__ = ["Prune", "PruneOptions", "PrunePlan", "PruneSummary"]

_MOST_SOURCES = 128
_ROUNDS = 3
"How often a prune looks again where others change what it saw; then it leaves the rest to the next."


class _Counts(Struct):
    deleted: int = 0
    freed: int = 0
    rewritten: int = 0
    written: int = 0
    read: int = 0
    bytes_written: int = 0
    damaged: list[str] = field(default_factory=list)


class _Group(Struct):
    """Records that go into one new pack."""

    kind: int
    sources: list[tuple[Pack, list[int]]] = field(default_factory=list)
    bytes: int = 0

    def full(self) -> bool:
        return self.bytes >= PACK_TARGET or len(self.sources) >= _MOST_SOURCES


class Prune:
    """One run of prune. Use it as a context manager: `plan`, then `execute`.

    No key takes part: the repository may be one that was opened without any.
    `dry_run`: nothing is written, not even the announcement; there is only `plan`.
    """

    def __init__(
        self, repository: Repository, options: PruneOptions, reporter: Reporter, *, dry_run: bool = False
    ) -> None:
        self.repository = repository
        self.options = options
        self.reporter = reporter
        self.dry_run = dry_run
        self._identity = os.urandom(16)
        self.id = self._identity.hex()
        self._view: View | None = None
        self._marker: Marker | None = None
        self._marked = Marked()
        self._copied: dict[int, frozenset[int]] = {}
        "Offsets of the records that this run has moved, by the pack they were in."
        self._written: set[bytes] = set()
        "Names of the packs that this run has written."
        self._retained: set[bytes] = set()
        "Names of condemned packs that the storage still locks."
        self._sequence = 0
        self._counts = _Counts()
        self._fenced: tuple[str, ...] = ()

    def __enter__(self) -> Prune:
        prune_plan.parse_limit(self.options.max_unused)
        if not self.dry_run:
            self._sweep_staging()  # It may be all the room that there is.
            sessions.announce(
                self.repository.storage,
                self.repository.config.repository,
                self.id,
                host=os.uname().nodename,
                kind="prune",
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._marker is not None:
            self._marker.close()
        if not self.dry_run:
            try:
                # It has ended, whatever it came to: nobody needs to wait for it.
                sessions.end(self.repository.storage, self.id)
            except StorageError:
                pass  # Then the next one declares it dead; the error that led here is the one to tell.

    # --- planning ----------------------------------------------------------------------

    def plan(self) -> PrunePlan:
        """See what lives, and choose. Declares sessions dead that are, unless it is a dry run.

        Raises `IntegrityError` where it cannot be told what lives, `UsageError`, `StorageError`.
        """
        self._fenced = self._fence()
        self.reporter.phase("marking what lives", None)
        view = self._look()
        self.reporter.end()
        return prune_plan.make(
            self.repository,
            view,
            self._marked,
            self.options,
            me=None if self.dry_run else self.id,
            fenced=self._fenced,
        )

    def _fence(self) -> tuple[str, ...]:
        """Declare dead who is known to be gone, or was asked for."""
        storage, name = self.repository.storage, self.repository.config.repository
        wanted = list(self.options.fence)
        found: list[str] = []
        for one in sessions.open_sessions(storage, name):
            if one.id == self.id:
                continue
            asked = [text for text in wanted if len(text) >= 4 and one.id.startswith(text.lower())]
            reason = None
            if asked:
                reason = "a person said so"
                wanted = [text for text in wanted if text not in asked]
            elif one.told is not None and sessions.is_gone(one.told):
                reason = "its process is gone"
            elif self.options.fence_idle is not None and one.told is not None:
                # A clock only says whom to fence. To fence is safe whoever it hits.
                reason = "it began long ago" if now() - one.told.created > self.options.fence_idle else None
            if reason is not None and (self.dry_run or sessions.fence(storage, one.id, reason)):
                found.append(f"{one}: {reason}")
        if wanted:
            raise UsageError(
                f"there is no session {wanted[0]!r} without an outcome",
                hint="imager prune --dry-run shows the sessions that there are",
            )
        return tuple(found)

    def _look(self) -> View:
        """See what there is and mark what lives. Raises `IntegrityError` where that cannot be told."""
        view = look(self.repository)
        for _ in range(_ROUNDS):
            self._mark(view)
            damage = describe_damage(view.damaged, self._marked)
            if not damage:
                break
            # Sets may have been forgotten meanwhile, and pages moved: what is damaged stays so.
            before, view = view, look(self.repository)
            if before == view:
                break
        else:
            raise Locked(
                "others forget and prune here at the same time, too much to tell what lives",
                hint="run it again when they have ended",
            )
        if damage and not self.options.despite_damage:
            raise IntegrityError(
                f"it cannot be told what lives: {damage[0]}"
                + (f", and {len(damage) - 1} more" if len(damage) > 1 else ""),
                hint="imager check names the damage; with --despite-damage, what hangs on it is given up",
            )
        for line in damage:
            self.reporter.warn(f"given up: {line}")
        if lost := self._marked.marks.lost:
            self.reporter.warn(
                f"{count(lost, 'reference', 'to a block leads', 'to blocks lead')} nowhere: "
                "the packs are missing",
                hint="imager check tells which image sets that concerns",
            )
        return view

    def _mark(self, view: View) -> None:
        if self._marker is not None:
            self._marker.close()
        self._view = view
        self._marker = Marker(self.repository, view, self.reporter)
        self._marked = self._marker.mark(view.sets)

    # --- carrying out -----------------------------------------------------------------------

    def execute(self, plan: PrunePlan) -> PruneSummary:
        """Move, condemn, sweep. Can be killed at any time; the next run goes on.

        Raises `StorageError`, `IntegrityError`; nothing that lives is lost by it.
        """
        begun = time.monotonic()
        assert not self.dry_run
        # What is dead goes first: it makes room for what is copied.
        self._condemn(plan.drop)
        waiting, left = self._sweep()
        moved = 0
        for batch in prune_plan.batches(plan.rewrite):
            minutes = self.options.max_minutes
            if minutes is not None and time.monotonic() - begun > minutes * 60:
                break
            done = self._rewrite(batch)
            moved += len(done)
            self._condemn(done)
            waiting, left = self._sweep()
        if not self._marked.marks.lost:
            # Otherwise the index is what still knows of packs that were lost.
            index.thin(self.repository, self.reporter)
        self._tidy()
        counts = self._counts
        return PruneSummary(
            packs_deleted=counts.deleted,
            packs_rewritten=moved,
            packs_written=counts.written,
            bytes_deleted=counts.freed,
            bytes_read=counts.read,
            bytes_written=counts.bytes_written,
            pages=self._marked.marks.pages,
            bytes_of_pages=self._marked.marks.read,
            condemned=left,
            retained=len(self._retained),
            waiting=waiting,
            fenced=self._fenced,
            damaged=tuple(counts.damaged),
            seconds=round(time.monotonic() - begun, 3),
        )

    def _condemn(self, packs: Sequence[Pack]) -> None:
        """From now on no writer that starts counts on these packs."""
        if not packs:
            return
        made = sessions.condemn(
            self.repository.storage,
            self.repository.config.repository,
            [pack.name for pack in packs if pack.kind == KIND_DATA],
            [pack.name for pack in packs if pack.kind == KIND_MAP],
        )
        assert self._view is not None
        self._view.condemned |= {one.id: one for one in made}

    def _rewrite(self, packs: Sequence[Pack]) -> list[Pack]:
        """Copy what lives in these packs together; those of which all was copied."""
        marks = self._marked.marks
        self.reporter.phase("moving what lives", sum(pack.live for pack in packs))
        # What the newest sets need stays together, apart from what dies with older ones.
        groups = {(kind, new): _Group(kind) for kind in (KIND_DATA, KIND_MAP) for new in (True, False)}
        for pack in packs:
            for newest in (True, False):
                if offsets := marks.offsets(pack.number, newest):
                    _, live, new = marks.extent(pack.number)
                    group = groups[pack.kind, newest]
                    group.sources.append((pack, offsets))
                    group.bytes += new if newest else live - new
                    if group.full():
                        groups[pack.kind, newest] = _Group(pack.kind)
                        self._merge(group)
        for group in groups.values():
            self._merge(group)
        self._write_index()
        self.reporter.end()
        return [pack for pack in packs if not self._stranded(pack.number)]

    def _stranded(self, number: int) -> list[int]:
        """Offsets of the records that live in a pack and were not moved, in order."""
        copied = self._copied.get(number, frozenset())
        marks = self._marked.marks
        offsets = {*marks.offsets(number, True), *marks.offsets(number, False)}
        return sorted(offsets - copied)

    def _merge(self, group: _Group) -> None:
        """Write one new pack; more where one cannot hold the records of so many sessions."""
        if not group.sources:
            return
        repository = self.repository
        files: list[tuple[int, bytes, list[int]]] = []
        staged = repository.storage.stage()
        try:
            opened = partial.at_once(repository.storage, self._open, group.sources)
            failed: list[Exception] = []
            for (pack, offsets), one in zip(group.sources, opened, strict=True):
                if isinstance(one, Exception):
                    failed.append(one)
                else:
                    files.append((one, pack.name, offsets))
            if failed:
                raise failed[0]
            merged = _native.merge_packs(
                staged.fd,
                files,
                kind=group.kind,
                repository=repository.id,
                session=self._identity,
                sequence=self._sequence,
            )
            self._sequence += 1
            if merged.name is not None:
                staged.publish(pack_object(group.kind, merged.name))
        except (ValueError, IntegrityError) as error:
            if len(group.sources) > 1:
                half = len(group.sources) // 2
                self._merge(_Group(group.kind, group.sources[:half]))
                self._merge(_Group(group.kind, group.sources[half:]))
                return
            # One pack alone: its frame is damaged, so nothing of it can be moved.
            self._damaged(group.sources[0][0], str(error))
            return
        except _native.WriteError as error:
            raise writing_failed(repository, error) from error
        except NotFound:
            return  # Another prune has deleted one of them; what lives was moved by it.
        except OSError as error:
            raise StorageError(f"reading packs to rewrite failed: {error.strerror}") from error
        finally:
            staged.discard()
            for fd, _, _ in files:
                os.close(fd)
        self._take_in(group, merged)

    def _open(self, source: tuple[Pack, list[int]]) -> int | Exception:
        pack, offsets = source
        try:
            return partial.records(self.repository.storage, pack.object, self.repository.id, offsets)
        except (IntegrityError, StorageError) as error:
            return error  # The descriptors of the others are to be closed first.

    def _take_in(self, group: _Group, merged: _native.Merged) -> None:
        bad: dict[int, set[int]] = {}
        for at, offset in merged.damaged:
            bad.setdefault(at, set()).add(offset)
        for at, (pack, offsets) in enumerate(group.sources):
            whole = frozenset(offsets) - bad.get(at, set())
            self._copied[pack.number] = self._copied.get(pack.number, frozenset()) | whole
            if at in bad:
                self._damaged(pack, f"{len(bad[at])} of its records are damaged")
        self._counts.read += merged.read
        self.reporter.advance(sum(length for _, _, _, length in merged.records), stored=merged.size)
        if merged.name is None:
            return
        self._counts.written += 1
        self._counts.bytes_written += merged.size
        self._written.add(merged.name)
        number = self.repository.names.reserve()
        self.repository.names.resolve(number, merged.name)
        assert self._marker is not None
        self._marker.known.add_pack(number, merged.records)
        if self._marker.known.pending >= index.SEGMENT_ENTRIES:
            self._write_index()

    def _damaged(self, pack: Pack, reason: str) -> None:
        self._counts.damaged.append(f"{pack.object}: {reason}")
        self.reporter.warn(
            f"{pack.object} stays: {reason}", hint="imager check --read-data names what that costs"
        )

    def _write_index(self) -> None:
        """Make it durable where the records went."""
        assert self._marker is not None
        data = self._marker.known.segment(self.repository.id)
        if data is not None:
            try:
                self.repository.storage.create(index.segment_name(data), data)
            except AlreadyExists:
                pass  # Its name is the digest of its content.

    # --- sweeping ---------------------------------------------------------------------------

    def _sweep(self) -> tuple[tuple[str, ...], int]:
        """Delete condemned packs that nobody can count on: (sessions waited for, packs still condemned)."""
        storage, name = self.repository.storage, self.repository.config.repository
        for _ in range(_ROUNDS):
            view = self._view
            assert view is not None
            condemned = sessions.read_condemned(storage, name)
            # After the condemned: what is missing in both listings was swept meanwhile.
            listed = {*self.repository.pack_names(KIND_DATA), *self.repository.pack_names(KIND_MAP)}
            waiting = [one for one in sessions.open_sessions(storage, name) if one.id != self.id]
            sets = {path.removeprefix(SETS) for path in storage.list_names(SETS)}
            grown = (
                condemned.keys() - view.condemned.keys()
                or {one for one in sets if is_id(one)} - view.outcomes
            )
            if not grown and listed.issuperset(self._relied_upon(view)):
                break
            view = self._look()
            # Of what this run has copied nothing may be left, if it was taken for dead: the marks tell.
            self._copied.clear()
            self._written.intersection_update({*view.packs, *view.maps})
        else:
            self.reporter.note("others are busy here: the next prune deletes what is condemned")
            return (), sum(len(one.packs) + len(one.maps) for one in condemned.values())
        left = 0
        blockers: set[str] = set()
        self.reporter.phase("deleting", None)
        for one in condemned.values():
            unaware = [session for session in waiting if one.id not in session.seen]
            if unaware:
                blockers |= {str(session) for session in unaware}
                left += len(listed.intersection(one.packs | one.maps))
            else:
                left += self._delete(one, listed)
        self.reporter.end()
        return tuple(sorted(blockers)), left

    def _relied_upon(self, view: View) -> set[bytes]:
        """Packs that hold, as it was marked, what lives, and those that this run has written."""
        names = (self.repository.names.name(number) for number in self._marked.marks.packs())
        marked = {name for name in names if name is not None and (name in view.packs or name in view.maps)}
        return marked | self._written

    def _delete(self, one: Condemnation, listed: set[bytes]) -> int:
        """Delete condemned packs, once what lives in them has been moved; how many had to stay."""
        names = self.repository.names
        there = [
            Pack(name, names.intern(name), kind, 0, 0, 0, 0)
            for kind, packs in ((KIND_DATA, one.packs), (KIND_MAP, one.maps))
            for name in sorted(packs & listed)
        ]
        for kind in (KIND_DATA, KIND_MAP):
            self._rescue([pack for pack in there if pack.kind == kind], kind)
        self._write_index()
        stay = 0
        for pack in there:
            if self._stranded(pack.number):
                stay += 1
                continue
            try:
                size = self.repository.storage.size(pack.object)
                self.repository.storage.delete(pack.object)
            except NotFound:
                continue  # Another prune was quicker.
            except Retained:
                stay += 1  # It stays condemned, and goes once its lock has run out.
                self._retained.add(pack.name)
                continue
            self._counts.deleted += 1
            self._counts.freed += size
        if not stay:
            try:
                self.repository.storage.delete(CONDEMNED + one.id)
            except NotFound:
                pass
        return stay

    def _rescue(self, packs: Iterable[Pack], kind: int) -> None:
        """Move what came to live in condemned packs: a backup that knew nothing of it refers to it."""
        group = _Group(kind)
        for pack in packs:
            if offsets := self._stranded(pack.number):
                group.sources.append((pack, offsets))
                group.bytes += self._marked.marks.extent(pack.number)[1]
                if group.full():
                    self._merge(group)
                    group = _Group(kind)
        self._merge(group)

    def _tidy(self) -> None:
        """Announcements of sessions that were declared dead say nothing that the mark does not say."""
        storage = self.repository.storage
        assert self._view is not None
        announced = {path.removeprefix(SESSIONS) for path in storage.list_names(SESSIONS)}
        for session in announced & self._view.marks:
            sessions.end(storage, session)

    def _sweep_staging(self) -> None:
        try:
            self.repository.storage.sweep()
        except Gone:
            raise
        except StorageError:
            pass  # Staged files hurt nobody; a backup removes them too.
