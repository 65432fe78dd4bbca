"""Bringing back what damage cost, from a copy of the same repository: without any key.

Invariant: what is put back was bound by a pack's name, a digest or a
signature before it counts; what is healthy is never replaced. A record keeps
its id, so maps find it again wherever it lies now.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct, field

from imager import _native
from imager.errors import IntegrityError
from imager.repository import imageset, index, missing, sync_objects, sync_plan
from imager.repository.announce import Announcement
from imager.repository.findings import Problem
from imager.repository.format import (
    DAMAGED,
    EPOCHS,
    HEALED,
    KIND_DATA,
    KIND_MAP,
    MAPS,
    MAX_JSON,
    PACK_TARGET,
    PACKS,
    REVOKED,
    SESSIONS,
    SETS,
    SLOTS,
    is_pack_name,
    pack_object,
)
from imager.repository.manifest import is_abort_mark, is_sealed, parse_public
from imager.repository.public import PublicPage, PublicReader, walk
from imager.repository.repository import Repository
from imager.repository.transfer import copy_pack
from imager.storage.errors import AlreadyExists, NotFound, StorageError, refusal

Origin = tuple[str, int, int]
"Object name of a pack, offset and length of a record in it."
_SMALL = {"slot": SLOTS, "epoch": EPOCHS, "revocation": REVOKED, "session": SESSIONS, "set": SETS}


class Wanted(Struct):
    """Ids of records that sets refer to and no listed pack holds."""

    pages: set[bytes] = field(default_factory=set)
    blocks: set[bytes] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.pages or self.blocks)

    def __len__(self) -> int:
        return len(self.pages) + len(self.blocks)


class Healed(Struct):
    """What came back. `packs`, `objects`: whole, under their own names; `records`: in new packs."""

    packs: list[str] = field(default_factory=list)
    objects: list[str] = field(default_factory=list)
    records: int = 0
    bytes: int = 0

    def lines(self, where: str) -> Iterator[str]:
        """What to tell a person."""
        for what, names in (("pack", self.packs), ("object", self.objects)):
            if names:
                plural = "" if len(names) == 1 else "s"
                yield f"put {len(names)} {what}{plural} back from {where}"
        if self.records:
            yield f"stored {self.records} record{'' if self.records == 1 else 's'} again from {where}"


def wanted(repository: Repository) -> Wanted:
    """What sets refer to and no listed pack holds. Below a page that is lost nothing is known yet."""
    found = Wanted()
    maps = set(repository.pack_names(KIND_MAP))
    packs = set(repository.pack_names(KIND_DATA))
    stray: set[bytes] = set()

    def leaf(page: PublicPage) -> None:
        gone = {name for name in page.packs if name not in packs}
        if gone:
            stray.update(target.id for target in page.targets if target.pack in gone)

    reader, seen = PublicReader(repository), set[bytes]()
    for manifest in imageset.list_sets(repository).sets:
        reach = walk(reader, manifest.public.roots, seen, leaf, listed=maps)
        found.pages.update(place.id for place, _ in reach.lost)
        found.pages.update(place.id for place in reach.astray)
    found.blocks = stray - repository.locator.find_all(stray, KIND_DATA).keys()
    found.pages -= repository.locator.find_all(found.pages, KIND_MAP).keys()
    return found


# --- whole objects of a copy ------------------------------------------------------------------


def put_back_objects(repository: Repository, copy: Repository, problems: Iterable[Problem]) -> Healed:
    """Replace damaged slots, epochs, announcements and manifests by the whole ones of a copy.

    The damaged ones are kept below `damaged/`. Raises `StorageError`.
    """
    healed = Healed()
    damaged: list[str] = []
    for problem in problems:
        prefix = _SMALL.get(problem.kind, "?")
        if problem.object == prefix:  # All of them are gone.
            damaged += copy.storage.list_names(prefix)
        elif problem.object.startswith(prefix):
            damaged.append(problem.object)
    for name in damaged:
        try:
            raw = copy.storage.read(name, 0, 3 * MAX_JSON)
            _is_whole(copy, name, raw)
        except (NotFound, IntegrityError):
            continue
        _out_of_the_way(repository, name)
        try:
            repository.storage.create(name, raw)
        except AlreadyExists:
            continue
        healed.objects.append(name)
    return healed


def _is_whole(copy: Repository, name: str, raw: bytes) -> None:
    """Raises `IntegrityError` where the object of a copy is damaged itself."""
    own = name.rpartition("/")[2]
    if name.startswith(SETS):
        parse_public(raw, own, copy.config.repository)
        if is_abort_mark(raw) or not is_sealed(copy, raw):
            raise IntegrityError(f"image set {own} is damaged")
    else:
        sync_objects.verify_small(copy, name, raw)


def _out_of_the_way(repository: Repository, name: str) -> None:
    """Move a damaged object below `damaged/`, whatever was put there before it."""
    for number in range(100):
        try:
            repository.storage.move(name, DAMAGED + name + (f".{number}" if number else ""))
            return
        except NotFound:
            return
        except AlreadyExists:
            continue


def put_back_packs(repository: Repository, copy: Repository, aside: Iterable[str]) -> Healed:
    """Take packs that are missing or set aside (by object name) from a copy, where it has them whole.

    Raises `StorageError`.
    """
    healed = Healed()
    storage = repository.storage
    doomed = sync_plan.condemned(storage, repository.config.repository)
    for name in aside:
        if name in doomed or storage.exists(name) or not copy.storage.exists(name):
            continue
        copied = copy_pack(copy.storage, storage, name, repository.id)
        if copied.problem is not None or copied.gone:
            continue
        healed.packs.append(name)
        healed.bytes += copied.size
        if name.startswith(PACKS) and copied.records is not None:
            known = _native.Known(repository.names)
            known.add_pack(repository.names.intern(bytes.fromhex(name[-64:])), copied.records)
            _index(repository, known)
    for name in aside:
        if storage.exists(name):
            _forget_aside(repository, name)
    return healed


def _forget_aside(repository: Repository, name: str) -> None:
    """Remove the damaged twin of a pack that is whole in its place, and the mark that it was missing."""
    for other in (DAMAGED + name, missing.MISSING + name[-64:]):
        try:
            repository.storage.delete(other)
        except NotFound:
            continue


def retire(repository: Repository) -> list[str]:
    """Where sets need nothing any more of what a repair set aside: put that where nobody reads it.

    Nothing is deleted but marks of packs that were missing. What was done, in lines. Raises `StorageError`.
    """
    lines: list[str] = []
    for path in repository.storage.list_names(DAMAGED):
        name = path.removeprefix(DAMAGED)
        try:
            if path.startswith(missing.MISSING):
                repository.storage.delete(path)
            elif name.startswith((PACKS, MAPS)) and is_pack_name(name[-64:]):
                repository.storage.move(path, HEALED + name)
                lines.append(f"moved {path} to {HEALED}: no set needs it any more; it may be deleted")
        except (NotFound, AlreadyExists):
            continue
    return lines


def lost_packs(repository: Repository) -> list[str]:
    """Object names of the packs that a repair set aside or found missing."""
    found: set[str] = set()
    for path in repository.storage.list_names(DAMAGED):
        name = path.removeprefix(DAMAGED)
        if path.startswith(missing.MISSING) and is_pack_name(path[-64:]):
            identity = bytes.fromhex(path[-64:])
            found |= {pack_object(KIND_DATA, identity), pack_object(KIND_MAP, identity)}
        elif name.startswith((PACKS, MAPS)) and is_pack_name(name[-64:]):
            found.add(name)
    return sorted(found)


# --- records ------------------------------------------------------------------------------------


def aside_origins(repository: Repository) -> dict[bytes, Origin]:
    """Records of packs that a repair has set aside, by id, where their frames are whole."""
    found: dict[bytes, Origin] = {}
    for path in repository.storage.list_names(DAMAGED):
        if path.removeprefix(DAMAGED).startswith((PACKS, MAPS)) and is_pack_name(path[-64:]):
            for _, identity, offset, length in _records(repository, path):
                found[identity] = (path, offset, length)
    return found


def copy_origins(copy: Repository, ids: Iterable[bytes], kind: int) -> dict[bytes, Origin]:
    """Where a copy of the repository has records."""
    found: dict[bytes, Origin] = {}
    for identity, (number, offset, length) in copy.locator.find_all(ids, kind).items():
        name = copy.names.name(number)
        if name is not None:
            found[identity] = (pack_object(kind, name), offset, length)
    return found


def _records(repository: Repository, path: str) -> list[tuple[int, bytes, int, int]]:
    try:
        fd = repository.storage.open(path)
    except NotFound:
        return []
    try:
        return _native.pack_records(fd, bytes.fromhex(path[-64:]), repository.id)
    except (_native.DamagedError, OSError):
        return []
    finally:
        os.close(fd)


class RecordCopier:
    """Copies records as they are into new packs of a repository, under one session."""

    def __init__(self, repository: Repository, session: Announcement) -> None:
        self._repository = repository
        self._session = session
        self._number = 0

    def copy(self, source: Repository, origins: Mapping[bytes, Origin], kind: int) -> Healed:
        """Copy records of a repository of the same id; damaged ones are left out. Raises `StorageError`."""
        healed = Healed()
        batch: dict[str, list[int]] = {}
        size = 0
        for path, offset, length in sorted(set(origins.values())):
            batch.setdefault(path, []).append(offset)
            size += length
            if size >= PACK_TARGET:
                self._merge(source, batch, kind, healed)
                batch, size = {}, 0
        if batch:
            self._merge(source, batch, kind, healed)
        return healed

    def _merge(self, source: Repository, batch: dict[str, list[int]], kind: int, healed: Healed) -> None:
        repository, parts, fds = self._repository, [], []
        try:
            for path, offsets in batch.items():
                try:
                    fds.append(source.storage.open(path))
                except NotFound:
                    continue
                parts.append((fds[-1], bytes.fromhex(path[-64:]), offsets))
            if not parts:
                return
            staged = repository.storage.stage()
            try:
                merged = _native.merge_packs(
                    staged.fd,
                    parts,
                    kind=kind,
                    repository=repository.id,
                    session=bytes.fromhex(self._session.id),
                    sequence=self._number,
                )
                if merged.name is None:
                    return
                self._number += 1
                staged.publish(pack_object(kind, merged.name))
            except _native.WriteError as error:
                where = repository.storage.url
                raise refusal(OSError(error.errno, error.strerror), "writing a pack", where) from error
            except (_native.DamagedError, OSError) as error:
                if isinstance(error, StorageError):
                    raise
                return  # The frame of one of them is damaged by now: nothing of it is believed.
            finally:
                staged.discard()
        finally:
            for fd in fds:
                os.close(fd)
        healed.records += len(merged.records)
        healed.bytes += merged.size
        known = _native.Known(repository.names)
        known.add_pack(repository.names.intern(merged.name), merged.records)
        _index(repository, known)


def _index(repository: Repository, known: _native.Known) -> None:
    data = known.segment(repository.id)
    if data is not None:
        index.put_anew(repository.storage, data)


__all__ = [
    "Healed", "RecordCopier", "Wanted", "aside_origins", "copy_origins", "lost_packs",
    "put_back_objects", "put_back_packs", "retire", "wanted",
]  # fmt: skip
