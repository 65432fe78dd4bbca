"""The tiers below the base set: which blocks the repository holds already, and where.

Invariant: an index segment is a hint. A damaged or missing one costs space
(blocks are stored again), never data, and never stops a backup.
"""

from __future__ import annotations

import os

from imager import _native
from imager.errors import IntegrityError
from imager.events import Reporter
from imager.repository.format import INDEX, KIND_DATA, is_pack_name, pack_object
from imager.repository.frames import open_frame
from imager.repository.repository import Repository
from imager.repository.session import Session
from imager.storage.errors import Gone, NotFound, StorageError

SEGMENT_ENTRIES = 1 << 20
"Write a segment once this many entries are pending: 32 MiB of them."


def segment_names(repository: Repository) -> list[str]:
    """Object names of all index segments. Raises `StorageError`."""
    return [name for name in repository.storage.list_names(INDEX) if is_pack_name(name.removeprefix(INDEX))]


def load(repository: Repository, reporter: Reporter | None = None) -> _native.Known:
    """All that the segments know, mapped into memory. Damaged segments are left out with a warning.

    Call `Repository.packs_present` before a writer looks anything up: an
    entry counts only if its pack is there. Raises `StorageError`.
    """
    known = _native.Known(repository.names)
    for name in segment_names(repository):
        try:
            load_one(repository, known, name)
        except NotFound:
            continue  # deleted since it was listed
        except Gone:
            raise
        except (IntegrityError, StorageError) as error:
            if reporter is not None:
                reporter.warn(
                    error.message,
                    hint="nothing is lost, but blocks may be stored twice; imager check --repair mends it",
                )
    return known


def load_one(repository: Repository, known: _native.Known, name: str) -> int:
    """Map one segment into memory; its number of entries.

    Raises `IntegrityError`, `NotFound`, `StorageError`.
    """
    fd = repository.storage.open(name)
    try:
        return known.load(fd, repository.id)
    except _native.DamagedError as error:
        raise IntegrityError(f"index segment {name.removeprefix(INDEX)} is damaged: {error}") from error
    except OSError as error:
        if not error.errno:
            raise IntegrityError(f"index segment {name.removeprefix(INDEX)} is cut short") from error
        raise StorageError(f"reading {name} failed: {error.strerror}") from error
    finally:
        os.close(fd)


def segment_name(data: bytes) -> str:
    """Object name of an index segment."""
    return INDEX + _native.blake3(b"imager index v1" + data).hex()


def write_segment(session: Session, known: _native.Known, *, reload: bool = False) -> str | None:
    """Hand the pending entries to the session as a segment: its object name, None where nothing is pending.

    `reload` frees their memory: it waits until the segment is durable, and
    searches that instead. Every pack that is named must have been sealed.
    Raises `StorageError`.
    """
    data = known.segment(session.repository.id)
    if data is None:
        return None
    name = segment_name(data)
    session.create(name, data)
    if reload:
        session.drain()
        load_one(session.repository, known, name)
        known.forget()
    return name


def rebuild(repository: Repository, reporter: Reporter) -> tuple[list[str], list[str]]:
    """Make segments anew from the trailers of all data packs, then drop the older ones: (made, dropped).

    A pack whose trailer is damaged is left out with a warning. A backup that
    runs meanwhile keeps its own new segments. Raises `StorageError`.
    """
    storage = repository.storage
    old = segment_names(repository)
    known = _native.Known(repository.names)
    made: list[str] = []

    def write() -> None:
        data = known.segment(repository.id)
        if data is not None:
            name = segment_name(data)
            if name not in old and not storage.exists(name):
                storage.create(name, data)
            made.append(name)
            known.forget()

    names = sorted(repository.pack_names(KIND_DATA))
    reporter.phase("rebuilding the index", None)
    for name in names:
        fd = open_frame(storage, pack_object(KIND_DATA, name))
        try:
            known.add_pack(repository.names.intern(name), _native.pack_records(fd, name, repository.id))
        except (_native.DamagedError, OSError) as error:
            reporter.warn(f"pack {name.hex()} is left out of the index: {error}")
        finally:
            os.close(fd)
        if known.pending >= SEGMENT_ENTRIES:
            write()
    write()
    reporter.end()
    dropped = [name for name in old if name not in made]
    for stale in dropped:
        try:
            storage.delete(stale)
        except NotFound:
            continue
    return made, dropped
