"""Descriptors of packs of which only a part is needed: the frame, or some records.

Invariant: what a caller gets can be read as the pack itself wherever it was asked for; of a storage
that is far away no other bytes are fetched (but those of small gaps), and several packs at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from imager import _native
from imager.errors import IntegrityError, StorageError
from imager.repository.format import FOOTER, MAX_PACK, MAX_RECORDS, PACK_HEADER, TRAILER_ENTRY
from imager.storage.base import Storage

_GUESS = 4096
"Bytes of a header that are fetched at first: one with many session keys is longer."
_GAP = 16 << 10
_RUN = 4 << 20
_AT_ONCE = 16

Task = TypeVar("Task")
Result = TypeVar("Result")


def is_far(storage: Storage) -> bool:
    """Whether opening an object of this storage means to copy it."""
    return not getattr(storage, "local", True)


def frame(storage: Storage, name: str) -> int:
    """A descriptor of a pack whose header and trailer can be read, the caller's to close.

    Raises `NotFound`, `StorageError`.
    """
    return _frame(storage, name)[0] if is_far(storage) else storage.open(name)


def records(storage: Storage, name: str, repository: bytes, offsets: Sequence[int]) -> int:
    """A descriptor of a pack whose frame and the records at `offsets` (ascending) can be read.

    Raises `IntegrityError` for a damaged frame, `NotFound`, `StorageError`.
    """
    if not is_far(storage):
        return storage.open(name)
    fd, _ = _frame(storage, name)
    try:
        lengths = {offset: length for _, _, offset, length in _native.pack_records(fd, None, repository)}
        for start, end in _runs(
            (offset, offset + lengths[offset]) for offset in offsets if offset in lengths
        ):
            _put(fd, storage.read(name, start, end - start), start)
        return fd
    except _native.DamagedError as error:
        os.close(fd)
        raise IntegrityError(f"{name} is damaged: {error}") from error
    except BaseException:
        os.close(fd)
        raise


def _frame(storage: Storage, name: str) -> tuple[int, int]:
    size = storage.size(name)
    if size > MAX_PACK:
        raise StorageError(f"{name} has {size} bytes, which is more than a pack can have")
    footer = storage.read(name, max(0, size - FOOTER), FOOTER)
    count = int.from_bytes(footer[8:12], "little")
    # Whatever these numbers say: who reads the frame checks it, and misses what was not fetched.
    start = max(0, size - FOOTER - min(count, MAX_RECORDS, size // TRAILER_ENTRY) * TRAILER_ENTRY)
    fd = os.memfd_create("pack", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        header = storage.read(name, 0, min(_GUESS, size))
        wanted = min(int.from_bytes(header[12:16], "little"), size)
        if _GUESS < wanted < 1 << 20:
            header += storage.read(name, len(header), wanted - len(header))
        _put(fd, header[: max(wanted, PACK_HEADER)], 0)
        _put(fd, storage.read(name, start, size - FOOTER - start) + footer, start)
        return fd, size
    except BaseException:
        os.close(fd)
        raise


def _put(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, at)
        view, at = view[done:], at + done


def _runs(extents: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbours joined, and small gaps between them closed."""
    last: tuple[int, int] | None = None
    for start, end in extents:
        if (
            last is not None
            and start - last[1] <= min(_GAP, (last[1] - last[0]) // 16)
            and end - last[0] <= _RUN
        ):
            last = (last[0], end)
            continue
        if last is not None:
            yield last
        last = (start, end)
    if last is not None:
        yield last


def at_once(storage: Storage, work: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """`map(work, tasks)`, of a far storage several at a time; in order. Raises what a failing one does.

    Not more than a few results wait to be taken, so that memory stays bounded.
    """
    if not is_far(storage) or len(tasks) < 2:
        yield from map(work, tasks)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for start in range(0, len(tasks), _AT_ONCE):
            yield from pool.map(work, tasks[start : start + _AT_ONCE])
