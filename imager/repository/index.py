"""The tiers below the base set: which blocks the repository holds already, and where.

Invariant: an index segment is a hint. A damaged or missing one costs space
(blocks are stored again), never data, and never stops a backup.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator

from imager import _native
from imager.errors import IntegrityError
from imager.events import Reporter
from imager.repository import sessions
from imager.repository.format import INDEX, KIND_DATA, KIND_MAP, is_pack_name, pack_object
from imager.repository.frames import open_frame
from imager.repository.packs import PackAccess
from imager.repository.repository import Repository
from imager.repository.session import Session
from imager.storage.errors import AlreadyExists, Gone, NotFound, StorageError

_HEADER = struct.Struct("<8sHHIQQ16sQQQ")
_ENTRY = struct.Struct("<20sIII")
_PAGE, _PER_PAGE, _AT_ONCE = 4096, 127, 256

SEGMENT_ENTRIES = 1 << 20
"Write a segment once this many entries are pending: 32 MiB of them."


def segment_names(repository: PackAccess) -> list[str]:
    """Object names of all index segments. Raises `StorageError`."""
    return [name for name in repository.storage.list_names(INDEX) if is_pack_name(name.removeprefix(INDEX))]


def look_around(session: Session, reporter: Reporter | None = None) -> _native.Known:
    """List the packs that a writer may refer to, and load the index of their blocks.

    What a prune has condemned counts as absent. The session is announced, so what it
    sees here stays until it ends. Raises `IntegrityError`, `StorageError`.
    """
    repository = session.repository
    condemned = sessions.condemned_packs(repository.storage, repository.config.repository)
    session.condemned = condemned
    session.known = known = load(repository, reporter)
    # After the index, so that of what that names nothing is too new to be listed.
    repository.packs_present(without=condemned)
    return known


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


def load_one(repository: PackAccess, known: _native.Known, name: str) -> int:
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
        try:
            fd = open_frame(storage, pack_object(KIND_DATA, name))
        except NotFound:
            continue  # A prune has deleted it since it was listed.
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


# --- upkeep -------------------------------------------------------------------------------


def _names_in(repository: PackAccess, segment: str) -> list[bytes]:
    """The packs that a segment names. Raises `IntegrityError`, `NotFound`, `StorageError`."""
    header = repository.storage.read(segment, 0, _HEADER.size)
    what = f"index segment {segment.removeprefix(INDEX)}"
    if len(header) < _HEADER.size or _native.xxh3(header[:-8]) != int.from_bytes(header[-8:], "little"):
        raise IntegrityError(f"{what} is damaged: its header is")
    magic, _, _, count, *_ = _HEADER.unpack(header)
    listed = repository.storage.read(segment, _PAGE, 32 * count + 8)
    names, check = listed[:-8], listed[-8:]
    if (
        magic != b"IMGRINDX"
        or len(names) != 32 * count
        or _native.xxh3(names) != int.from_bytes(check, "little")
    ):
        raise IntegrityError(f"{what} is damaged: its list of packs is")
    return [names[at : at + 32] for at in range(0, len(names), 32)]


def packs_named(repository: PackAccess) -> frozenset[bytes]:
    """The packs that index segments name. Damaged segments are left out. Raises `StorageError`."""
    found: set[bytes] = set()
    for segment in segment_names(repository):
        try:
            found.update(_names_in(repository, segment))
        except (IntegrityError, NotFound):
            continue
    return frozenset(found)


def thin(repository: Repository, reporter: Reporter) -> tuple[int, int]:
    """Write segments that name packs which are gone anew without them: (segments dropped, made).

    A damaged segment is left alone, with a warning. May run beside anything. Raises `StorageError`.
    """
    storage = repository.storage
    segments = segment_names(repository)
    # After the segments: whatever those name was there before them, unless it is gone.
    present = {*repository.pack_names(KIND_DATA), *repository.pack_names(KIND_MAP)}
    stale: list[str] = []
    for segment in segments:
        try:
            if not present.issuperset(_names_in(repository, segment)):
                stale.append(segment)
        except NotFound:
            continue
        except IntegrityError as error:
            reporter.warn(error.message, hint="nothing is lost; imager check --repair makes the index anew")
    made: set[str] = set()
    dropped: list[str] = []
    names = _native.Names()
    known = _native.Known(names)

    def write() -> None:
        data = known.segment(repository.id)
        if data is not None:
            name = segment_name(data)
            try:
                storage.create(name, data)
            except AlreadyExists:
                pass  # Its name is the digest of its content.
            made.add(name)
            known.forget()

    for segment in stale:
        try:
            for pack, records in _entries(repository, segment, present):
                known.add_pack(names.intern(pack), records)
        except NotFound:
            continue
        except IntegrityError as error:
            reporter.warn(error.message, hint="nothing is lost; imager check --repair makes the index anew")
            continue
        dropped.append(segment)
        if known.pending >= SEGMENT_ENTRIES:
            write()
    write()
    for segment in dropped:
        if segment not in made:
            try:
                storage.delete(segment)
            except NotFound:
                continue
    return len(dropped), len(made)


def _entries(
    repository: Repository, segment: str, present: Collection[bytes]
) -> Iterator[tuple[bytes, list[tuple[int, bytes, int, int]]]]:
    """The entries of packs that are there, by pack, some pages at a time.

    Raises `IntegrityError`, `StorageError`.
    """
    names = _names_in(repository, segment)
    what = f"index segment {segment.removeprefix(INDEX)} is damaged"
    count, start = _HEADER.unpack(repository.storage.read(segment, 0, _HEADER.size))[4:6]
    pages = -(-count // _PER_PAGE)
    for first in range(0, pages, _AT_ONCE):
        wanted = min(_AT_ONCE, pages - first) * _PAGE
        data = repository.storage.read(segment, start + first * _PAGE, wanted)
        if len(data) != wanted:
            raise IntegrityError(f"{what}: it is cut short")
        found: dict[bytes, list[tuple[int, bytes, int, int]]] = {}
        for at in range(0, wanted, _PAGE):
            page = data[at : at + _PAGE]
            check, entries = int.from_bytes(page[:8], "little"), int.from_bytes(page[8:10], "little")
            if check != _native.xxh3(page[8:]) or entries > _PER_PAGE:
                raise IntegrityError(f"{what}: a page of it is")
            for key, pack, offset, length in _ENTRY.iter_unpack(page[32 : 32 + 32 * entries]):
                if pack < len(names) and (name := names[pack]) in present:
                    # An index keeps 20 bytes of an id, and asks for no more.
                    found.setdefault(name, []).append((1, key + bytes(12), offset, length))
        yield from found.items()
