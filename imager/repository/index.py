"""The tiers below the base set: which blocks the repository holds already, and where.

Invariant: an index segment is a hint. A damaged or missing one costs space
(blocks are stored again), never data, and never stops a backup.
"""

from __future__ import annotations

import os

from imager import _native
from imager.errors import IntegrityError, Locked
from imager.events import Reporter
from imager.repository import merging, sessions
from imager.repository.format import INDEX, KIND_DATA, pack_object
from imager.repository.frames import open_frame
from imager.repository.packs import PackAccess
from imager.repository.segments import SegmentCache, cache_of, packs_named, segment_name, segment_names
from imager.repository.session import Session
from imager.storage.base import Storage
from imager.storage.errors import Gone, NotFound, StorageError

__all__ = [
    "load", "load_one", "look_around", "packs_named", "put_anew", "rebuild", "segment_name", "segment_names",
    "thin", "write_segment",
]  # fmt: skip

SEGMENT_ENTRIES = 1 << 18
"Write a segment once this many entries are pending: 8 MiB of them, in about 40 MiB of memory."
_LISTINGS = 8
_PAGE = 4096
_LOT = slice(16, 32)
"Bytes of an index page that say nothing: `put_anew` makes a name unique by those of the first."


def look_around(session: Session, reporter: Reporter | None = None) -> _native.Known:
    """List the packs that a writer may refer to, and load the index of their blocks.

    What a prune has condemned counts as absent. The session is announced, so what it
    sees here stays until it ends. Raises `IntegrityError`, `Locked`, `StorageError`.
    """
    repository = session.repository
    session.known = known = load(repository, reporter)
    # After the index, so that of what that names nothing is too new to be listed. Whoever condemns
    # something later than it is looked for here sees this session, and waits for its end.
    for _ in range(_LISTINGS):
        listing = repository.list_far()
        condemned = sessions.condemned_packs(repository.storage, repository.config.repository, listing)
        if condemned is not None:
            break
    else:
        raise Locked(
            "prunes end here one after the other, too many to tell which packs stay",
            hint="run it again when they have ended",
        )
    session.condemned = condemned
    repository.packs_present(without=condemned, listed=True)
    return known


def load(repository: PackAccess, reporter: Reporter | None = None) -> _native.Known:
    """All that the segments know, to be searched where it lies. Damaged ones are left out with a warning.

    A segment that is gone when it is to be opened was merged into another: they are listed again.
    Call `Repository.packs_present` before a writer looks anything up: an
    entry counts only if its pack is there. Raises `StorageError`.
    """
    known = _native.Known(repository.names)
    cache = cache_of(repository)
    seen: set[str] = set()
    for _ in range(_LISTINGS):
        names = segment_names(repository)
        if not _load_all(repository, known, [name for name in names if name not in seen], cache, reporter):
            if cache is not None:
                cache.keep_only(names)
            break
        seen.update(names)
    return known


def _load_all(
    repository: PackAccess,
    known: _native.Known,
    names: list[str],
    cache: SegmentCache | None,
    reporter: Reporter | None,
) -> bool:
    """Load these segments; whether one of them was gone."""
    gone = False
    for name in names:
        try:
            load_one(repository, known, name, cache)
        except NotFound:
            gone = True
        except Gone:
            raise
        except (IntegrityError, StorageError) as error:
            if reporter is not None:
                reporter.warn(
                    error.message,
                    hint="nothing is lost, but blocks may be stored twice; imager check --repair mends it",
                )
    return gone


def load_one(
    repository: PackAccess, known: _native.Known, name: str, cache: SegmentCache | None = None
) -> int:
    """Search one more segment; its number of entries. `cache`: where it may be kept on this machine.

    Raises `IntegrityError`, `NotFound`, `StorageError`.
    """
    if cache is not None and (fd := cache.get(name)) is not None:
        try:
            return known.load(fd, repository.id, bytes.fromhex(name.removeprefix(INDEX)))
        except (_native.DamagedError, OSError):
            cache.drop(name)  # Whatever became of it: the storage has it.
        finally:
            os.close(fd)
    storage = repository.storage
    fd = cache.fetch(storage, name) if cache is not None else storage.open(name)
    try:
        return known.load(fd, repository.id, bytes.fromhex(name.removeprefix(INDEX)))
    except _native.DamagedError as error:
        raise IntegrityError(f"index segment {name.removeprefix(INDEX)} is damaged: {error}") from error
    except OSError as error:
        if not error.errno:
            raise IntegrityError(f"index segment {name.removeprefix(INDEX)} is cut short") from error
        raise StorageError(f"reading {name} failed: {error.strerror}") from error
    finally:
        os.close(fd)


def write_segment(
    session: Session, known: _native.Known, reporter: Reporter | None = None, *, reload: bool = False
) -> str | None:
    """Hand the pending entries to the session as a segment: its object name, None where nothing is pending.

    `reload` frees their memory: it waits until the segment is durable, and
    searches that instead; and it merges what a long run has written, if that is due, `reporter` being told
    what goes wrong with that. Every pack that is named must have been sealed. Raises `StorageError`.
    """
    repository = session.repository
    data = known.segment(repository.id)
    if data is None:
        return None
    name = segment_name(data)
    session.create(name, data)
    cache = cache_of(repository)
    if cache is not None:
        cache.put(data, name)
    del data
    if reload:
        session.drain()
        load_one(repository, known, name, cache)
        known.forget()
        if reporter is not None:
            merging.tend(repository, known, reporter, stored=session.stored)
    return name


def thin(repository: PackAccess, reporter: Reporter) -> merging.Merged:
    """Rewrite the segments that name packs which are gone, without them: they were deleted on purpose.

    Packs that no segment names are taken in: a writer died before it came to that, or all that is in them
    was known in another pack, which may be gone now.

    A damaged segment is left alone, with a warning. May run beside anything. Raises `StorageError`,
    `IntegrityError`.
    """
    known = load(repository, reporter)
    # After the segments: whatever those name was there before them, unless it is gone.
    repository.packs_present()
    done = merging.forget(repository, known, repository.names.absent())
    strange = _native.Known(repository.names)
    for name in sorted(repository.pack_names(KIND_DATA)):
        if not known.naming([name]):
            _take_in(repository, strange, name, reporter)
    data = strange.segment(repository.id)
    if data is not None:
        put_anew(repository.storage, data)
    return done


def put_anew(storage: Storage, data: bytes) -> str:
    """Create a segment under a name that no process can know yet: its object name. Raises `StorageError`.

    For what tells of packs that were there before, and so may be the same as a segment that once was:
    that one may have been merged, and the merger may be asleep before it deletes it.
    """
    pages = int.from_bytes(data[24:32], "little")
    page = bytearray(data[pages : pages + _PAGE])
    page[_LOT] = os.urandom(16)
    page[:8] = _native.xxh3(bytes(page[8:])).to_bytes(8, "little")
    made = b"".join((data[:pages], page, data[pages + _PAGE :]))
    name = segment_name(made)
    storage.create(name, made)
    return name


def _take_in(repository: PackAccess, known: _native.Known, name: bytes, reporter: Reporter) -> None:
    """What a data pack's trailer says; nothing where it is gone or damaged. Raises `StorageError`."""
    try:
        fd = open_frame(repository.storage, pack_object(KIND_DATA, name))
    except NotFound:
        return  # A prune has deleted it since it was listed.
    try:
        known.add_pack(repository.names.intern(name), _native.pack_records(fd, name, repository.id))
    except (_native.DamagedError, OSError) as error:
        reporter.warn(f"pack {name.hex()} is left out of the index: {error}")
    finally:
        os.close(fd)


def rebuild(repository: PackAccess, reporter: Reporter) -> tuple[list[str], list[str]]:
    """Make segments anew from the trailers of all data packs, then drop the older ones: (made, dropped).

    A pack whose trailer is damaged is left out with a warning. A backup that
    runs meanwhile keeps its own new segments. What is made has new names, so that of a merge which
    sleeps in the middle of its deletes none can hit it. Raises `StorageError`.
    """
    storage = repository.storage
    old = segment_names(repository)
    known = _native.Known(repository.names)
    made: list[str] = []

    def write() -> None:
        data = known.segment(repository.id)
        if data is not None:
            made.append(put_anew(storage, data))
            known.forget()

    names = sorted(repository.pack_names(KIND_DATA))
    reporter.phase("rebuilding the index", None)
    for name in names:
        _take_in(repository, known, name, reporter)
        if known.pending >= SEGMENT_ENTRIES:
            write()
    write()
    reporter.end()
    for stale in old:
        try:
            storage.delete(stale)
        except NotFound:
            continue
    return made, old
