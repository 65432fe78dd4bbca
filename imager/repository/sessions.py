"""Who is at work: announcements and outcomes of sessions, and the packs that are condemned.

Invariant: a session announces itself durably before it looks at what there is,
and treats as absent what was condemned by then; so whoever condemns something
later sees every session that may count on it. A session has ended once it has
an outcome (a manifest or an abort mark, of which exactly one can be made) or has
taken its announcement back. No decision here compares clocks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import msgspec
from msgspec import Struct

from imager.errors import IntegrityError
from imager.repository.format import (
    ABORT_MAGIC,
    CONDEMNED,
    MAX_JSON,
    MAX_SMALL_JSON,
    SESSIONS,
    SETS,
    AbortMark,
    Condemned,
    SessionObject,
    canonical,
    is_id,
    is_pack_name,
    now,
    parse,
    parse_session,
    session_digest,
    shape,
)
from imager.storage.base import Storage
from imager.storage.errors import AlreadyExists, NotFound

__all__ = [
    "Condemnation", "Open", "announce", "announce_again", "condemn", "condemned_packs", "end", "fence",
    "is_gone", "open_sessions", "read_condemned", "this_process",
]  # fmt: skip

MAX_CONDEMNED = 200_000
"Packs of one condemnation, so that its object stays within bounds."


class Condemnation(Struct, frozen=True):
    """Packs that a prune is going to delete: names of data packs and of map packs."""

    id: str
    packs: frozenset[bytes]
    maps: frozenset[bytes]


class Open(Struct, frozen=True):
    """A session without an outcome. `told`: its announcement, None where that is damaged."""

    id: str
    told: SessionObject | None

    @property
    def seen(self) -> frozenset[str]:
        """Ids of the condemnations that it is known to have seen."""
        return frozenset(self.told.condemned) if self.told is not None else frozenset()

    def __str__(self) -> str:
        if self.told is None:
            return f"session {self.id} (its announcement is damaged)"
        return f"{self.told.kind} {self.id[:8]} of {self.told.host}, process {self.told.pid}"


# --- announcing -----------------------------------------------------------------------


def this_process() -> str:
    """Which process this is, on which running kernel, in which namespace; empty where it cannot be told."""
    try:
        return f"{_kernel()}:{os.getpid()}:{_started(os.getpid())}"
    except (OSError, ValueError):
        return ""


def _kernel() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return f"{file.read().strip()}:{os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str:
    """When a process began, in ticks since the kernel started. Raises OSError, ValueError."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rsplit(b")", 1)[1].split()[19].decode()


def is_gone(told: SessionObject) -> bool:
    """Whether the process that announced this ran on this very kernel, and runs no more."""
    if not told.process:
        return False
    try:
        kernel, _, started = told.process.rsplit(":", 2)
        if kernel != _kernel():
            return False  # of another machine, another boot, or another container: who knows
        try:
            return _started(told.pid) != started
        except (FileNotFoundError, ProcessLookupError):
            return True
    except (OSError, ValueError, IndexError):
        return False


def announce(
    storage: Storage, repository: str, session: str, *, host: str, epoch: int = 0, kind: str = "backup"
) -> None:
    """Make a session known, durably. Raises `StorageError`.

    Only what is listed after this may be counted on; see `condemned_packs`.
    """
    seen = tuple(sorted(_condemned_ids(storage)))
    told = SessionObject(session, repository, now(), epoch, host, os.getpid(), seen, this_process(), kind)
    value = msgspec.to_builtins(told)
    value["digest"] = session_digest(value)
    storage.create(SESSIONS + session, canonical(value))


def announce_again(storage: Storage, repository: str, session: str) -> bool:
    """Put an announcement into the place of one that a set's writer is known to have made; whether it did.

    It decides nothing, for the session has its outcome. Raises `StorageError`.
    """
    told = SessionObject(session, repository, now(), 0, "", 0, (), "", "backup")
    value = msgspec.to_builtins(told)
    value["digest"] = session_digest(value)
    try:
        storage.create(SESSIONS + session, canonical(value))
    except AlreadyExists:
        return False
    if not storage.exists(SETS + session):
        end(storage, session)  # The set was forgotten meanwhile: nothing may look like a writer at work.
        return False
    return True


def end(storage: Storage, session: str) -> None:
    """Take an announcement back: the session has ended, and nothing more will come of it."""
    try:
        storage.delete(SESSIONS + session)
    except NotFound:
        pass


# --- condemned packs --------------------------------------------------------------------


def _condemned_ids(storage: Storage, listing: Sequence[str] | None = None) -> list[str]:
    listed = storage.list_names(CONDEMNED) if listing is None else listing
    names = (name.removeprefix(CONDEMNED) for name in listed if name.startswith(CONDEMNED))
    return [name for name in names if is_id(name)]


def read_condemned(
    storage: Storage, repository: str, listing: Sequence[str] | None = None
) -> dict[str, Condemnation]:
    """All condemnations there are, by id. Raises `IntegrityError` for a damaged one, `StorageError`."""
    found: dict[str, Condemnation] = {}
    for name in _condemned_ids(storage, listing):
        what = f"{CONDEMNED}{name}"
        try:
            raw = storage.read(what, 0, MAX_JSON + 1)
        except NotFound:
            continue  # all of its packs are deleted
        value = shape(parse(raw, what, MAX_JSON), Condemned, what)
        if value.condemned != name or value.repository != repository:
            raise IntegrityError(f"{what} is damaged: it belongs to another name or repository")
        if not all(map(is_pack_name, (*value.packs, *value.maps))):
            raise IntegrityError(f"{what} is damaged: it holds what is no name of a pack")
        packs, maps = (frozenset(map(bytes.fromhex, names)) for names in (value.packs, value.maps))
        found[name] = Condemnation(name, packs, maps)
    return found


def condemned_packs(
    storage: Storage, repository: str, listing: Sequence[str] | None = None
) -> frozenset[bytes] | None:
    """Names of the packs that a writer must treat as absent. Call it once the session is announced.

    Packs are to be listed after this; or in `listing`, names of all objects, listed once the session was
    announced. None: a condemnation of the listing is gone, and with it packs that are still in the
    listing; list again. Raises `IntegrityError`, `StorageError`.
    """
    found = read_condemned(storage, repository, listing)
    if listing is not None and found.keys() != set(_condemned_ids(storage, listing)):
        return None
    return frozenset[bytes]().union(*(one.packs | one.maps for one in found.values()))


def condemn(
    storage: Storage, repository: str, packs: Iterable[bytes], maps: Iterable[bytes]
) -> list[Condemnation]:
    """Condemn packs, durably. Writers that start from now on treat them as absent. Raises `StorageError`."""
    made: list[Condemnation] = []
    waiting = [(name, True) for name in sorted(packs)] + [(name, False) for name in sorted(maps)]
    for start in range(0, len(waiting), MAX_CONDEMNED):
        part = waiting[start : start + MAX_CONDEMNED]
        one = Condemnation(
            os.urandom(16).hex(),
            frozenset(name for name, data in part if data),
            frozenset(name for name, data in part if not data),
        )
        names = (tuple(sorted(name.hex() for name in names)) for names in (one.packs, one.maps))
        storage.create(CONDEMNED + one.id, canonical(Condemned(one.id, repository, now(), *names)))
        made.append(one)
    return made


# --- outcomes -----------------------------------------------------------------------------


def open_sessions(storage: Storage, repository: str) -> list[Open]:
    """Sessions that are announced and have no outcome, by id. Raises `StorageError`."""
    announced = [name.removeprefix(SESSIONS) for name in storage.list_names(SESSIONS)]
    ended = {name.removeprefix(SETS) for name in storage.list_names(SETS)}
    found: list[Open] = []
    for session in sorted(name for name in announced if is_id(name) and name not in ended):
        try:
            raw = storage.read(SESSIONS + session, 0, MAX_SMALL_JSON + 1)
            found.append(Open(session, parse_session(raw, session, repository)))
        except NotFound:
            continue  # It has just ended.
        except IntegrityError:
            found.append(Open(session, None))
    return found


def fence(storage: Storage, session: str, reason: str) -> bool:
    """Declare a session dead: it can not commit any more. False where it has an outcome already.

    Safe at any time; a writer that still lives loses what it did. Raises `StorageError`.
    """
    mark = ABORT_MAGIC + canonical(AbortMark(session, now(), reason))
    try:
        storage.create(SETS + session, mark)
    except AlreadyExists:
        return False
    end(storage, session)  # The mark says it all.
    return True
