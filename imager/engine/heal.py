"""Healing a repository from whatever still has what it lost: a copy, another repository, the live device.

Invariant: only content whose keyed hash is the id that is looked for is
stored, so a source can be old, changed or hostile: it helps or it does not.
What is whole is never touched, and what could not be healed stays named.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from imager import _native
from imager._native import DATA
from imager.errors import IntegrityError, Locked, SourceError, UsageError
from imager.events import Reporter
from imager.repository import heal, imageset, index, sessions
from imager.repository.announce import Announcement
from imager.repository.check import Summary, check
from imager.repository.credentials import Credentials
from imager.repository.format import FOOTER, KIND_DATA, KIND_MAP, PACK_TARGET, RECORD_HEAD, TRAILER_ENTRY
from imager.repository.heal import Healed, RecordCopier, Wanted
from imager.repository.keyless import is_keyless, open_keyless
from imager.repository.pages import BadPage, Seen, pages
from imager.repository.repository import Repository
from imager.repository.session import Session
from imager.storage.base import Storage
from imager.storage.errors import Gone, StorageError
from imager.storage.location import open_storage
from imager.units import MIB

_BATCH = 16 * MIB
Connect: TypeAlias = Callable[[str], Storage]
"What finds the storage of a source."


class Spot(Struct, frozen=True):
    """Where a lost block lies: its bytes in the image, and its record, as the map says."""

    offset: int
    length: int
    block_size: int
    record: tuple[int, int, int]


def is_device(place: str) -> bool:
    """Whether a source is a device or an image file, and not the place of a repository."""
    try:
        mode = os.stat(place).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISBLK(mode) or stat.S_ISREG(mode)


def execute(
    repository: Repository,
    found: Summary,
    sources: Sequence[str],
    credentials: Credentials,
    reporter: Reporter,
    connect: Connect = open_storage,
) -> list[str]:
    """Heal what a check with repair has found, from each source in turn; what was done, in lines.

    `credentials` open a source that is another repository, `connect` finds it. Raises `UsageError`,
    `WrongKey`, `SourceError`, `StorageError`, `Locked` where this was declared dead by a prune meanwhile.
    """
    for source in sources:
        if is_device(source) and is_keyless(repository):
            raise UsageError(
                "without a key the blocks of a device cannot be told apart",
                hint="leave --keyless away, or heal from a copy of the repository",
            )
    lines: list[str] = []
    reporter.phase("healing", None)
    repository.look_anew()
    with Announcement.begin(repository.config, repository.storage, "heal") as session:
        copier = RecordCopier(repository, session)
        for source in sources:
            if not is_device(source):
                lines += _whole_objects(repository, found, source, connect)
        lines += _salvage(repository, copier).lines("packs that were set aside")
        for source in sources:
            if is_device(source):
                lines += _from_device(repository, source).lines(source)
            else:
                lines += _from_repository(repository, copier, source, credentials, connect).lines(source)
        if _alone(repository, session.id) and not heal.wanted(repository):
            lines += heal.retire(repository)
        if session.fenced():
            raise Locked(
                "this repair was declared dead while it ran", hint="run it again: it goes on where it stopped"
            )
    reporter.end()
    return lines


def _alone(repository: Repository, session: str) -> bool:
    """Whether no writer is at work who may have referred to packs before they were set aside.

    Asked before it is looked what sets need: who has committed by then is among them.
    """
    found = sessions.open_sessions(repository.storage, repository.config.repository)
    return all(one.id == session or (one.told is not None and sessions.is_gone(one.told)) for one in found)


def repaired(
    repository: Repository,
    found: Summary,
    sources: Sequence[str],
    credentials: Credentials,
    reporter: Reporter,
    connect: Connect = open_storage,
) -> Summary:
    """Heal after a check with repair, then check again: what that finds, and all that was done.

    Raises what `execute` raises.
    """
    lines = execute(repository, found, sources, credentials, reporter, connect)
    repository.look_anew()
    again = check(repository, reporter)
    return replace(
        again,
        repaired=(*found.repaired, *lines),
        packs_read=found.packs_read,
        bytes_read=found.bytes_read + again.bytes_read,
        seconds=round(found.seconds + again.seconds, 3),
        ages=found.ages,
    )


def _whole_objects(repository: Repository, found: Summary, place: str, connect: Connect) -> list[str]:
    with open_keyless(connect(place)) as source:
        if source.config != repository.config:
            return []
        done = heal.put_back_objects(repository, source, found.problems)
        packs = heal.put_back_packs(repository, source, heal.lost_packs(repository))
        return [*done.lines(place), *packs.lines(place)]


# --- records as they are -------------------------------------------------------------------------


def _salvage(repository: Repository, copier: RecordCopier) -> Healed:
    """Bring the healthy records of packs that were set aside into packs that count."""
    done = _copy_records(
        repository, repository, copier, heal.wanted(repository), heal.aside_origins(repository)
    )
    if is_keyless(repository):
        return done
    # Where a frame is damaged only the ids vouch for what is in it, and those need the key.
    with _Storing(repository, spots(repository)) as storing:
        for identity, spot in list(storing.spots.items()):
            number, offset, length = spot.record
            for content in _read(repository, number, spot.length, [(identity, offset, length)]):
                storing.offer(content, spot.length)
        more = storing.finish()
    return Healed(records=done.records + more.records, bytes=done.bytes + more.bytes)


def _copy_records(
    repository: Repository,
    source: Repository,
    copier: RecordCopier,
    want: Wanted,
    aside: dict[bytes, heal.Origin] | None = None,
) -> Healed:
    """Copy records as they are, until no page that came back shows more that is lost."""
    total = Healed()
    while want:
        before = len(want), total.records
        for kind, ids in ((KIND_MAP, want.pages), (KIND_DATA, want.blocks)):
            if aside is not None:
                origins = {identity: aside[identity] for identity in ids if identity in aside}
            else:
                origins = heal.copy_origins(source, ids, kind)
            done = copier.copy(source, origins, kind)
            total.records += done.records
            total.bytes += done.bytes
        if total.records == before[1]:
            break
        want = heal.wanted(repository)
    return total


def _from_repository(
    repository: Repository, copier: RecordCopier, place: str, credentials: Credentials, connect: Connect
) -> Healed:
    with open_keyless(connect(place)) as source:
        if source.config == repository.config:
            return _copy_records(repository, source, copier, heal.wanted(repository))
        if source.id == repository.id:
            raise IntegrityError(f"{place} has another config for the same repository; it heals nothing")
    if is_keyless(repository):
        raise UsageError(
            f"{place} is another repository: only with the keys of both can their blocks be compared",
            hint="leave --keyless away",
        )
    with open_keyless(connect(place)) as source:
        opened = source if not source.sealed else Repository.open(source.storage, credentials)
        with opened, _Storing(repository, spots(repository)) as storing:
            for length, content in _contents(opened, {spot.length for spot in storing.spots.values()}):
                storing.offer(content, length)
            return storing.finish()


# --- content ------------------------------------------------------------------------------------


def spots(repository: Repository) -> dict[bytes, Spot]:
    """Blocks that sets refer to and no listed pack holds, and where they lie in the images."""
    listed = {repository.names.intern(name) for name in repository.pack_names(KIND_DATA)}
    found: dict[bytes, Spot] = {}
    seen: Seen = set()
    for manifest in imageset.list_sets(repository).sets:
        for image in manifest.images:
            for page in pages(repository, image, seen):
                if isinstance(page, BadPage) or page.level:
                    continue
                for at in range(len(page.slots)):
                    kind, identity, pack, offset, length = page.slots.get(at)
                    if kind == DATA and pack not in listed and identity not in found:
                        start = (page.first + at) * image.block_size
                        size = min(image.block_size, image.size - start)
                        found[identity] = Spot(start, size, image.block_size, (pack, offset, length))
    for identity in repository.locator.find_all(found, KIND_DATA):
        del found[identity]
    return found


class _Storing:
    """Stores blocks again whose ids are looked for. Use it as a context manager."""

    def __init__(self, repository: Repository, wanted_spots: dict[bytes, Spot]) -> None:
        self.repository = repository
        self.spots = wanted_spots
        self._session: Session | None = None
        self._pack: _native.PackWriter | None = None
        self._known = _native.Known(repository.names)
        self._waiting: dict[tuple[int, int], list[bytes]] = {}
        self._size = 0
        self._healed = Healed()

    def offer(self, content: bytes, length: int) -> bool:
        """Take a block if its id is one of those that are looked for."""
        if len(content) != length:
            return False
        spot = self.spots.pop(self.repository.vault.block_id(content), None)
        if spot is None:
            return False
        self._waiting.setdefault((spot.block_size, length), []).append(content)
        self._size += length
        if self._size >= _BATCH:
            self._write()
        return True

    def _write(self) -> None:
        for (block_size, length), contents in self._waiting.items():
            whole = length == block_size
            for part in [b"".join(contents)] if whole else contents:
                self._store(part, block_size)
        self._waiting, self._size = {}, 0

    def _store(self, data: bytes, block_size: int) -> None:
        if self._session is None:
            self._session = Session.begin(self.repository)
        if self._pack is None:
            self._pack = self._session.new_data_pack()
        done = _native.scan(
            self.repository.vault,
            data,
            [(0, -(-len(data) // block_size))],
            image_size=len(data),
            block_size=block_size,
            base=None,
            pack=self._pack,
            known=self._known,
        )
        self._healed.records += done.new
        self._healed.bytes += done.stored
        if self._pack.size >= PACK_TARGET:
            self._session.seal(self._pack)
            self._pack = None

    def finish(self) -> Healed:
        """Make all of it durable, and the index name it. Raises `StorageError`."""
        self._write()
        if self._session is not None:
            if self._pack is not None:
                self._session.seal(self._pack)
            index.write_segment(self._session, self._known)
            self._session.drain()
        return self._healed

    def __enter__(self) -> _Storing:
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._session.abandon()


def _from_device(repository: Repository, path: str) -> Healed:
    """Read the places of lost blocks on a device or in an image file; what has the id is stored again."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    try:
        with _Storing(repository, spots(repository)) as storing:
            for spot in sorted(storing.spots.values(), key=lambda spot: spot.offset):
                try:
                    content = os.pread(fd, spot.length, spot.offset)
                except OSError:
                    continue  # A bad sector there heals nothing.
                storing.offer(content, spot.length)
            return storing.finish()
    finally:
        os.close(fd)


def _contents(source: Repository, lengths: set[int]) -> Iterator[tuple[int, bytes]]:
    """The blocks of these lengths that another repository holds, decrypted: (length, content)."""
    for name in sorted(source.pack_names(KIND_DATA)):
        number = source.names.intern(name)
        for length, places in _by_length(source, number, name).items():
            if length not in lengths:
                continue
            step = max(1, _BATCH // length)
            for at in range(0, len(places), step):
                yield from ((length, one) for one in _read(source, number, length, places[at : at + step]))


def _by_length(source: Repository, number: int, name: bytes) -> dict[int, list[tuple[bytes, int, int]]]:
    """(id, offset, length of the record) of a pack's records, by the plain length of the block."""
    found: dict[int, list[tuple[bytes, int, int]]] = {}
    try:
        fd, _ = source.pack_reader(number)
        records = _native.pack_records(fd, name, source.id)
        size = len(records) * TRAILER_ENTRY
        trailer = os.pread(fd, size, os.fstat(fd).st_size - FOOTER - size)
    except Gone:
        raise
    except (IntegrityError, StorageError, _native.DamagedError, OSError):
        return found
    for at, (_, identity, offset, length) in enumerate(records):
        head = trailer[at * TRAILER_ENTRY : at * TRAILER_ENTRY + RECORD_HEAD]
        found.setdefault(int.from_bytes(head[8:12], "little"), []).append((identity, offset, length))
    return found


def _read(
    source: Repository, number: int, length: int, places: Sequence[tuple[bytes, int, int]]
) -> Iterator[bytes]:
    """The contents of some records of one plain length; damaged ones are left out."""
    block_size = 4096
    while block_size < length:
        block_size *= 2
    whole = block_size == length
    for part in [places] if whole else [[place] for place in places]:
        yield from _read_part(source, number, block_size, length, part)


def _read_part(
    source: Repository, number: int, block_size: int, length: int, places: Sequence[tuple[bytes, int, int]]
) -> Iterator[bytes]:
    gather = _native.Gather()
    for at, (identity, offset, size) in enumerate(places):
        slot = _native.Slots(1)
        slot.set_data(0, identity, number, offset, size)
        gather.add(at, slot)
    gather.sort()
    try:
        got = _native.read_blocks(
            source.vault,
            {number: source.pack_reader(number)},
            gather,
            image_size=length * len(places),
            block_size=block_size,
        )
    except (_native.DamagedError, IntegrityError, OSError):
        if len(places) > 1:
            for place in places:
                yield from _read_part(source, number, block_size, length, [place])
        return
    yield from (content for _, content in got)
