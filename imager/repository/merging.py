"""Merging index segments, so that there are few of them however many backups there were.

Invariant: a segment is deleted only after another is durable that holds all that was of use in it.
So several processes may merge at once, beside any number of backups, and be killed at any moment:
what remains is at worst told twice. Whoever finds a segment gone lists them anew.

Segments are merged by size. Eight of about one size become one, eight times as large: each entry is
written once for each factor of eight that the index grows by, and there are at most fifteen
segments of a size.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence

from msgspec import Struct

from imager import _native
from imager.errors import IntegrityError
from imager.events import Reporter
from imager.repository.format import INDEX
from imager.repository.packs import PackAccess
from imager.repository.segments import cache_of, is_whole
from imager.storage.errors import AlreadyExists, NotFound, StorageError, refusal

Segment = tuple[bytes, int]
"Name and bytes of a segment."

_turn = threading.Lock()
"Of the threads of one process one merges at a time; the others need not wait for it."
MAX_INPUTS = 128
"Segments of one merge: each takes 256 KiB of memory."


class Policy(Struct, frozen=True):
    """When to merge. `base`: bytes below which a segment is of the smallest size; `fan`: how many of
    a size become one; `cap`: bytes that a merged segment has at most (those of half are final)."""

    base: int = 1 << 20
    fan: int = 8
    cap: int = 3 << 30

    def tier(self, size: int) -> int:
        """0 below `base`, then one more for each factor of `fan`."""
        tier, bound = 0, self.base
        while size >= bound:
            tier, bound = tier + 1, bound * self.fan
        return tier


POLICY = Policy()
MIN_BUDGET = 64 << 20
"Bytes that a backup may merge however little it stored."
BUDGET = 4
"It may merge so many times what it stored."


class Merged(Struct, frozen=True):
    """What merging came to: segments read and written, bytes written, entries dropped, pages damaged."""

    read: int = 0
    written: int = 0
    bytes_written: int = 0
    dropped: int = 0
    damaged: int = 0

    def __add__(self, other: Merged) -> Merged:
        return Merged(
            self.read + other.read,
            self.written + other.written,
            self.bytes_written + other.bytes_written,
            self.dropped + other.dropped,
            self.damaged + other.damaged,
        )


def choose(segments: Iterable[Segment], budget: int, policy: Policy = POLICY) -> list[Segment]:
    """Segments to merge into one now; none where no size has its number full.

    Smaller sizes are merged along with larger ones where they would only fill those. `budget`:
    bytes of all that is chosen; it is exceeded only where a size has twice its number.
    """
    tiers: dict[int, list[Segment]] = {}
    for segment in sorted(segments, key=lambda segment: (segment[1], segment[0])):
        if segment[1] <= policy.cap // 2:
            tiers.setdefault(policy.tier(segment[1]), []).append(segment)
    chosen: list[Segment] = []
    total = 0
    for tier in range(max(tiers, default=-1) + 1):
        own = tiers.get(tier, [])
        arriving = bool(chosen) and policy.tier(total) == tier
        if len(own) + arriving < policy.fan:
            continue
        taken, size = list(chosen), total
        for segment in own:
            if size + segment[1] > policy.cap or len(taken) >= MAX_INPUTS:
                break
            taken.append(segment)
            size += segment[1]
        if size > budget and len(own) < 2 * policy.fan:
            break
        chosen, total = taken, size
    return chosen if len(chosen) > 1 else []


def tend(
    repository: PackAccess,
    known: _native.Known,
    reporter: Reporter,
    *,
    stored: int,
    policy: Policy = POLICY,
) -> Merged:
    """Merge what is due of the segments that `known` has loaded. `stored`: bytes that this run has stored.

    Does nothing where the storage keeps all that it ever got. What goes wrong is told as a warning:
    the index is a hint, and stays what it was.
    """
    done = Merged()
    if getattr(repository.storage, "append_only", False) or not _turn.acquire(blocking=False):
        return done
    budget = max(BUDGET * stored, MIN_BUDGET)
    try:
        while chosen := choose(((name, size) for name, _, size in known.loaded), budget, policy):
            budget -= sum(size for _, size in chosen)
            one = merge(repository, known, [name for name, _ in chosen])
            done += one
            if not one.read:
                break  # Another process is at it.
    except (IntegrityError, StorageError) as error:
        reporter.warn(f"the index was not merged: {error.message}", hint="nothing is lost; a later run does")
    finally:
        _turn.release()
    if done.damaged:
        reporter.warn(
            f"{done.damaged} pages of the index are damaged: what they said is lost",
            hint="nothing else is, but blocks may be stored twice; imager check --repair mends it",
        )
    return done


def forget(repository: PackAccess, known: _native.Known, packs: Collection[bytes]) -> Merged:
    """Rewrite every segment that names one of `packs`, without them: they were deleted on purpose.

    Call `Repository.packs_present` before, and load the index: entries of other packs that are not
    listed are dropped too, but those packs stay named, as a loss must stay known of.
    Raises `IntegrityError`, `StorageError`.
    """
    done = Merged()
    sizes = {name: size for name, _, size in known.loaded}
    wanted = known.naming(list(packs))
    for group in _groups([(name, sizes[name]) for name in wanted], POLICY.cap):
        done += merge(repository, known, group, packs)
    return done


def _groups(segments: Sequence[Segment], cap: int) -> Iterator[list[bytes]]:
    """Groups that fit into one segment each."""
    group: list[bytes] = []
    total = 0
    for name, size in sorted(segments, key=lambda segment: (segment[1], segment[0])):
        if group and (total + size > cap or len(group) >= MAX_INPUTS):
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    if group:
        yield group


def merge(
    repository: PackAccess, known: _native.Known, names: Sequence[bytes], forgotten: Collection[bytes] = ()
) -> Merged:
    """Merge these segments, which `known` has loaded, into one; it searches that instead.

    Raises `IntegrityError`, `StorageError`; then no segment was deleted.
    """
    storage = repository.storage
    staged = storage.stage()
    copy = -1
    try:
        # In the order of their names, so that who merges the same makes the same.
        job = known.merge(sorted(names), staged.fd, repository.id, list(forgotten))
        while job.step():
            pass
        name, entries, packs, size, dropped, damaged = job.outcome()
        if entries or packs:
            copy = os.dup(staged.fd)
            made = True
            try:
                staged.publish(INDEX + name.hex())
            except AlreadyExists:
                made = False  # Another process has merged the same.
            if not _take(repository, known, name, copy, made):
                return Merged()
    except OSError as error:
        raise refusal(error, "merging the index", storage.url) from error
    except (ValueError, OverflowError) as error:
        raise IntegrityError(f"the index cannot be merged: {error}") from error
    finally:
        staged.discard()
        if copy >= 0:
            os.close(copy)
    old = [other for other in names if other != name]
    known.unload(old)
    for other in old:
        try:
            storage.delete(INDEX + other.hex())
        except NotFound:
            continue  # Another process has merged it too.
    return Merged(len(names), int(bool(entries or packs)), size, dropped, damaged)


def _take(repository: PackAccess, known: _native.Known, name: bytes, copy: int, made: bool) -> bool:
    """Search a merged segment. One that this process has not `made` must be whole before others go.

    False where it is gone again: another process had made the same, and has merged it further.
    """
    path = INDEX + name.hex()
    try:
        fd = repository.storage.open(path) if not made else copy
    except NotFound:
        return False
    try:
        if not made and not is_whole(fd, path):
            raise IntegrityError(f"{path} is not the one its name says: damaged or swapped")
        if cache := cache_of(repository):
            cache.keep(copy, path)
        if all(name != other for other, _, _ in known.loaded):
            known.load(fd, repository.id, name)
    finally:
        if fd != copy:
            os.close(fd)
    return True
