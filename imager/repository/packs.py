"""The bytes of packs: descriptors that stay open for a while, and pages read ahead.

Invariant: what is read is bounded before memory is taken for it; a
descriptor that is handed out stays that of its pack for as long as the
method that gave it says. Of a far storage no more is read than is needed: heads
of packs and pieces of maps by themselves, records by `imager.repository.ahead`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from imager import _native
from imager.errors import IntegrityError, WrongKey
from imager.repository.format import (
    DAMAGED,
    ENVELOPE,
    KIND_DATA,
    KIND_MAP,
    MAPS,
    MAX_ENVELOPES,
    MAX_PAGE,
    PACK_HEADER,
    PACKS,
    RECORD_HEAD,
    is_pack_name,
    pack_object,
)
from imager.storage.base import Storage
from imager.storage.errors import NotFound, StorageError

if TYPE_CHECKING:
    from concurrent.futures import Future

Reader = tuple[int, Sequence[int | None]]
"A pack's descriptor, and the handles of its session keys by envelope number (None: a key that is not held)."

_OPEN_PACKS = 64
_OPEN_COPIES = 4
"The same for copies of far packs, which take room."
_CHUNK = 256 << 10
_CHUNKS = 32
_FAR_CHUNKS = 128
_NEXT_CHUNKS = 4
_LOCATED = 1 << 14
_HEADER = 4096


class Located(Struct, frozen=True):
    """Where a far pack lies: its object's name, and the handles of its keys by envelope number."""

    name: str
    keys: Sequence[int | None]


class PackAccess(ABC):
    """What reads packs of one repository. Safe to use from several threads; close it to free descriptors."""

    def __init__(self, storage: Storage, repository: bytes) -> None:
        self.storage = storage
        self.id = repository
        self.names = _native.Names()
        self._lock = RLock()
        self._listing: list[str] | None = None
        "All names that `packs_present` saw in a far storage, until they are asked for once more."
        self._readers: OrderedDict[int, Reader] = OrderedDict()
        self._pinned: dict[int, int] = {}
        self._chunks: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._coming: dict[tuple[int, int], Future[bytes]] = {}
        self._located: OrderedDict[int, Located] = OrderedDict()

    @abstractmethod
    def session_key(self, envelope: bytes) -> int:
        """The vault's handle of an envelope's session key. Raises `WrongKey`, `IntegrityError`."""

    def pack_names(self, kind: int, listing: Sequence[str] | None = None) -> list[bytes]:
        """Names of all packs of a kind that the storage lists, or `listing` has. Raises `StorageError`."""
        prefix = PACKS if kind == KIND_DATA else MAPS
        at = len(prefix) + 3
        names = self.storage.list_names(prefix) if listing is None else listing
        return [
            bytes.fromhex(name[at:])
            for name in names
            if name.startswith(f"{prefix}{name[at : at + 2]}/") and is_pack_name(name[at:])
        ]

    def list_far(self) -> list[str] | None:
        """All names of a far storage, in one call that is hardly longer than for the packs alone; None of a
        local one. `packs_present` and `set_aside` go by it. Raises `StorageError`."""
        if not self.storage.local:
            self._listing = self.storage.list_names("")
        return self._listing

    def packs_present(self, *, without: Collection[bytes] = (), listed: bool = False) -> int:
        """List the packs and tell `names` which there are; returns how many. Raises `StorageError`.

        `without`: packs that count as absent, for they are condemned. `listed`: `list_far` was called
        just now.
        """
        if not listed:
            self.list_far()
        present = self.pack_names(KIND_DATA, self._listing) + self.pack_names(KIND_MAP, self._listing)
        if without:
            present = [name for name in present if name not in without]
        self.names.set_present(present)
        return len(present)

    def set_aside(self) -> list[str]:
        """Names of the objects below `damaged/`; of a far storage as `packs_present` saw them just before."""
        listing, self._listing = self._listing, None
        if listing is None:
            return self.storage.list_names(DAMAGED)
        return [name for name in listing if name.startswith(DAMAGED)]

    def pack_label(self, number: int) -> str:
        """How to name a pack in a message."""
        name = self.names.name(number)
        return f"pack {name.hex()}" if name is not None else f"the pack being written (number {number})"

    def pack_reader(self, number: int, kind: int = KIND_DATA) -> Reader:
        """(descriptor, key handles by envelope number) of a pack; `kind`: as what it is looked for first.

        The descriptor stays open until 64 other packs have been asked for;
        `packs` keeps a larger number. Packs set aside by a repair are found too,
        their healthy records are still good. Raises `IntegrityError` naming a
        pack that is missing or has a damaged header, `WrongKey`, `StorageError`.
        """
        with self._lock:
            reader = self._readers.get(number)
            if reader is not None:
                self._readers.move_to_end(number)
                return reader
            reader = self._open_pack(number, kind)
            self._readers[number] = reader
            self._close_some()
            return reader

    @contextmanager
    def packs(self, numbers: Sequence[int]) -> Iterator[dict[int, Reader]]:
        """Readers of many packs, as `_native.fetch` wants them; all stay open within the `with`."""
        with self._lock:
            pinned: dict[int, Reader] = {}
            try:
                for number in numbers:
                    self._pinned[number] = self._pinned.get(number, 0) + 1
                    try:
                        reader = self.pack_reader(number)
                        self.require_key(number, reader[1])
                        pinned[number] = reader
                    except BaseException:
                        self._unpin(number)
                        raise
            except BaseException:
                for number in pinned:
                    self._unpin(number)
                raise
        try:
            yield pinned
        finally:
            with self._lock:
                for number in pinned:
                    self._unpin(number)
                self._close_some()

    def _unpin(self, number: int) -> None:
        self._pinned[number] -= 1
        if not self._pinned[number]:
            del self._pinned[number]

    def _close_some(self) -> None:
        excess = len(self._readers) - (_OPEN_PACKS if self.storage.local else _OPEN_COPIES)
        if excess <= 0:
            return
        for number in [number for number in self._readers if number not in self._pinned][:excess]:
            os.close(self._readers.pop(number)[0])

    def open_object(self, number: int, kind: int = KIND_DATA) -> int:
        """A descriptor of a pack's object, the caller's to close. Raises `IntegrityError`, `StorageError`.

        `kind`: as what it is looked for first; each place costs a call of the storage.
        """
        for name in self._places(number, kind):
            try:
                return self.storage.open(name)
            except NotFound:
                continue
        raise self._missing(number)

    def _places(self, number: int, kind: int) -> Iterator[str]:
        """Names that a pack's object may have, the likeliest first."""
        name = self.names.name(number)
        if name is None:
            raise IntegrityError(f"{self.pack_label(number)} cannot be read yet")
        other = KIND_MAP if kind == KIND_DATA else KIND_DATA
        for prefix, one in (("", kind), (DAMAGED, kind), ("", other), (DAMAGED, other)):
            yield prefix + pack_object(one, name)

    def _missing(self, number: int) -> IntegrityError:
        return IntegrityError(
            f"{self.pack_label(number)} is missing", hint="imager check tells which image sets that concerns"
        )

    def pack_keys(self, number: int, kind: int = KIND_DATA) -> Sequence[int | None]:
        """The handles of a pack's session keys. Raises as `pack_reader` does."""
        found = self.pack_reader(number, kind)[1] if self.storage.local else self.locate(number, kind).keys
        self.require_key(number, found)
        return found

    def require_key(self, number: int, keys: Sequence[int | None]) -> None:
        """Raises `WrongKey` where a pack's records are encrypted and none of its keys is held."""
        if keys and all(key is None for key in keys):
            raise WrongKey(
                f"this key does not open {self.pack_label(number)}",
                hint="use a key that reads (imager key list), made after the last rotation",
            )

    def locate(self, number: int, kind: int = KIND_DATA) -> Located:
        """Find a far pack and read its head. Raises `IntegrityError`, `WrongKey`, `StorageError`."""
        with self._lock:
            found = self._located.get(number)
        if found is not None:
            return found
        for name in self._places(number, kind):
            try:
                # The first piece of a map comes along with its head.
                head = self.storage.read(name, 0, _CHUNK if kind == KIND_MAP else _HEADER)
            except NotFound:
                continue
            wanted = header_length(head)
            if wanted > len(head):
                head = self.storage.read(name, 0, wanted)
            found = Located(name, self._keys_in(number, head[:wanted]))
            with self._lock:
                self._located[number] = found
                if len(self._located) > _LOCATED:
                    self._located.popitem(last=False)
                if kind == KIND_MAP:
                    self._keep(number, 0, head[:_CHUNK])
            return found
        raise self._missing(number)

    def _open_pack(self, number: int, kind: int) -> Reader:
        fd = self.open_object(number, kind)
        try:
            return fd, self._keys_in(number, read_header(fd))
        except OSError as error:
            os.close(fd)
            raise StorageError(f"reading {self.pack_label(number)} failed: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise

    def _keys_in(self, number: int, header: bytes) -> tuple[int | None, ...]:
        """The key handles of the pack that begins with `header`. Raises `IntegrityError`, `WrongKey`."""
        try:
            envelopes = _native.pack_envelopes(header, self.id)
        except _native.DamagedError as error:
            raise IntegrityError(f"{self.pack_label(number)} is damaged: {error}") from error
        return self._handles_of(envelopes)

    def _handles_of(self, envelopes: Sequence[bytes]) -> tuple[int | None, ...]:
        """Handles of session keys. Raises `WrongKey` where not one of them is to be had."""
        handles: list[int | None] = []
        lacking: WrongKey | None = None
        for envelope in envelopes:
            try:
                handles.append(self.session_key(envelope))
            except WrongKey as error:
                handles.append(None)
                lacking = error
        if lacking is not None and not any(handle is not None for handle in handles):
            raise lacking
        return tuple(handles)

    def read_page(self, number: int, offset: int, length: int) -> bytes:
        """A map page's record. Neighbours are read along with it, for pages lie one after the other.

        Raises `IntegrityError` where the pack is missing or ends before, `StorageError`.
        """
        if not RECORD_HEAD <= length <= RECORD_HEAD + MAX_PAGE:
            raise IntegrityError(f"no map page has {length} bytes (in {self.pack_label(number)})")
        first, last = offset // _CHUNK, (offset + length - 1) // _CHUNK
        data = self._chunk(number, first)
        if last != first:
            data += self._chunk(number, last)
        start = offset - first * _CHUNK
        record = data[start : start + length]
        if len(record) != length:
            raise IntegrityError(f"{self.pack_label(number)} ends before its page at {offset}")
        return record

    def expect_page(self, number: int, offset: int, length: int) -> None:
        """Say that a page will be read soon: of a far storage it is asked for now."""
        if not self.storage.local and RECORD_HEAD <= length <= RECORD_HEAD + MAX_PAGE:
            for index in range(offset // _CHUNK, (offset + length - 1) // _CHUNK + 1):
                self._ask(number, index)

    def _chunk(self, number: int, index: int) -> bytes:
        key = (number, index)
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                self._chunks.move_to_end(key)
                return chunk
            if self.storage.local:
                fd, _ = self.pack_reader(number, KIND_MAP)
                try:
                    chunk = os.pread(fd, _CHUNK, index * _CHUNK)
                except OSError as error:
                    said = f"reading {self.pack_label(number)} failed: {error.strerror}"
                    raise StorageError(said) from error
                self._keep(number, index, chunk)
                return chunk
            in_order = (number, index - 1) in self._chunks
        coming = self._ask(number, index)
        if in_order:
            for more in range(1, _NEXT_CHUNKS + 1):
                self._ask(number, index + more)
        return coming.result()

    def _keep(self, number: int, index: int, chunk: bytes) -> None:
        self._chunks[number, index] = chunk
        if len(self._chunks) > (_CHUNKS if self.storage.local else _FAR_CHUNKS):
            self._chunks.popitem(last=False)

    def _ask(self, number: int, index: int) -> Future[bytes]:
        """A piece of a far map pack, on its way. What fails is forgotten: the next to ask tries again."""
        from concurrent.futures import Future

        from imager.storage import spool

        key = (number, index)
        with self._lock:
            chunk = self._chunks.get(key)
            if chunk is not None:
                there: Future[bytes] = Future()
                there.set_result(chunk)
                return there
            coming = self._coming.get(key)
            if coming is None:
                coming = self._coming[key] = spool.threads().submit(self._far_chunk, number, index)
            return coming

    def _far_chunk(self, number: int, index: int) -> bytes:
        try:
            name = self.locate(number, KIND_MAP).name
            with self._lock:
                chunk = self._chunks.get((number, index))
            if chunk is None:
                chunk = self.storage.read(name, index * _CHUNK, _CHUNK)
            with self._lock:
                self._keep(number, index, chunk)
            return chunk
        finally:
            with self._lock:
                self._coming.pop((number, index), None)

    def __del__(self) -> None:
        # Descriptors are bare numbers: whoever drops a repository without closing it must not leak them.
        if hasattr(self, "_chunks"):
            self.close()

    def close(self) -> None:
        """Close the descriptors of packs."""
        with self._lock:
            coming = [*self._coming.values()]
        if coming:
            from imager.storage import spool

            spool.settle(coming)
        with self._lock:
            for fd, _ in self._readers.values():
                os.close(fd)
            self._readers.clear()
            self._chunks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def header_length(header: bytes) -> int:
    """How long a pack's header says that it is; the length of `header` where that cannot be."""
    wanted = int.from_bytes(header[12:16], "little")
    return wanted if PACK_HEADER <= wanted <= PACK_HEADER + ENVELOPE * MAX_ENVELOPES else len(header)


def read_header(fd: int) -> bytes:
    """The header of a pack, or as much of one as there is. Raises OSError."""
    header = os.pread(fd, _HEADER, 0)
    # A pack written by one session has one envelope; only a merged one may have more than fit here.
    wanted = header_length(header)
    return header[:wanted] if wanted <= len(header) else os.pread(fd, wanted, 0)
