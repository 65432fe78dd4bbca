"""Copying objects from one storage to another, many at a time, each checked on its way.

Invariant: a pack gets its name in the target only after the very bytes that
will bear it were read back and are what the name says, record for record.
What is in flight is bounded by the number of workers, whatever the size of
the repository; an object that is there already is left as it is.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from msgspec import Struct

from imager import _native
from imager.repository.format import KIND_DATA, KIND_MAP, MAPS, pack_object
from imager.storage.base import Storage
from imager.storage.errors import AlreadyExists, NotFound, refusal

IN_FLIGHT = 16
"So many packs are under way at once."
_CHUNK = 1 << 20

T = TypeVar("T")

Records = list[tuple[int, bytes, int, int]]


class Copied(Struct, frozen=True):
    """How the copy of a pack went. `problem`: why there is none; `gone`: the source has it no more.

    `records`: from its trailer, as `_native.pack_records` gives them.
    """

    name: str
    size: int = 0
    problem: str | None = None
    gone: bool = False
    records: Records | None = None


class _Unreadable(Exception):
    """The source could not be read."""


def copy_packs(
    source: Storage, target: Storage, names: Sequence[str], repository: bytes, *, workers: int = IN_FLIGHT
) -> Iterator[Copied]:
    """Copy packs, in any order; yields how each went. Raises `StorageError` where the target refuses."""
    jobs = [partial(copy_pack, source, target, name, repository) for name in names]
    yield from in_parallel(jobs, workers)


def rename_packs(
    source: Storage, target: Storage, names: Sequence[str], repository: bytes, session: str, *, workers: int
) -> Iterator[Copied]:
    """Copy packs under other names, those of a session. Raises `StorageError` where the target refuses."""
    jobs = [
        partial(copy_records, source, target, name, repository, session, number)
        for number, name in enumerate(names)
    ]
    yield from in_parallel(jobs, workers)


def in_parallel(jobs: Sequence[Callable[[], T]], workers: int = IN_FLIGHT) -> Iterator[T]:
    """Do jobs in parallel; yields what each returns, in their order.

    After an error, or when the caller stops listening, what is under way is finished or
    discarded before this returns.
    """
    with ThreadPoolExecutor(max_workers=min(workers, max(1, len(jobs))), thread_name_prefix="sync") as pool:
        waiting: deque[Future[T]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) >= 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def copy_pack(source: Storage, target: Storage, name: str, repository: bytes) -> Copied:
    """Copy one pack, checked. Raises `StorageError` where the target refuses."""
    try:
        fd = source.open(name)
    except NotFound:
        return Copied(name, gone=True)
    try:
        staged = target.stage()
        try:
            size = _pour(fd, staged.fd, name, target.url)
            identity = bytes.fromhex(name[-64:])
            report = _native.check_pack(staged.fd, identity, repository, 1)
            if report.problem is not None:
                return Copied(name, problem=report.problem)
            if not report.ok:
                return Copied(
                    name, problem=f"{len(report.damaged)} of its {report.records} records are damaged"
                )
            records = _native.pack_records(staged.fd, identity, repository)
            try:
                staged.publish(name)
            except AlreadyExists:
                return Copied(name, 0, records=records)  # Somebody else was quicker: names bind bytes.
            return Copied(name, size, records=records)
        except _Unreadable as error:
            return Copied(name, problem=str(error))
        finally:
            staged.discard()
    finally:
        os.close(fd)


def copy_records(
    source: Storage, target: Storage, name: str, repository: bytes, session: str, number: int
) -> Copied:
    """Copy all records of a pack into one of another name: the target is about to delete this one.

    They lie at the same offsets there. `number`: of the new pack within the session, hexadecimal.
    Raises `StorageError` where the target refuses.
    """
    try:
        fd = source.open(name)
    except NotFound:
        return Copied(name, gone=True)
    try:
        identity, kind = bytes.fromhex(name[-64:]), KIND_MAP if name.startswith(MAPS) else KIND_DATA
        staged = target.stage()
        try:
            places = [record[2] for record in _native.pack_records(fd, identity, repository)]
            merged = _native.merge_packs(
                staged.fd,
                [(fd, identity, places)],
                kind=kind,
                repository=repository,
                session=bytes.fromhex(session),
                sequence=number,
            )
            if merged.damaged or merged.name is None:
                return Copied(name, problem=f"{len(merged.damaged)} of its {len(places)} records are damaged")
            path = pack_object(kind, merged.name)
            staged.publish(path)
            return Copied(path, merged.size, records=merged.records)
        except _native.DamagedError as error:
            return Copied(name, problem=str(error))
        except _native.WriteError as error:
            raise refusal(OSError(error.errno, error.strerror), f"writing {name}", target.url) from error
        except OSError as error:
            return Copied(name, problem=f"it cannot be read: {error.strerror}")
        finally:
            staged.discard()
    finally:
        os.close(fd)


def _pour(fd: int, out: int, name: str, place: str) -> int:
    """Copy all bytes; how many. Raises `_Unreadable`, `StorageError`."""
    at = 0
    while True:
        try:
            chunk = os.pread(fd, _CHUNK, at)
        except OSError as error:
            raise _Unreadable(f"it cannot be read: {error.strerror}") from error
        if not chunk:
            return at
        view = memoryview(chunk)
        try:
            while view:
                written = os.pwrite(out, view, at)
                view, at = view[written:], at + written
        except OSError as error:
            raise refusal(error, f"writing {name}", place) from error


def copy_small(target: Storage, name: str, raw: bytes) -> None:
    """Create a small object; one that is there already stays. Raises `StorageError`."""
    try:
        target.create(name, raw)
    except AlreadyExists:
        pass
