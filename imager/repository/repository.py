"""A repository that is open: its keys, the names of its packs, and their bytes.

Invariant: nothing is read from a repository whose config is not whole and
whose features are not all known; what is read from packs is bounded, and
that it is what was stored is told by the record's own id, not by its place.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import RLock

from imager import _native
from imager.errors import ImagerError, IntegrityError, NoRepository, UsageError, WrongKey
from imager.repository import keys
from imager.repository.credentials import Credentials
from imager.repository.format import (
    CONFIG,
    DAMAGED,
    ENVELOPE,
    EPOCHS,
    INDEX,
    KIND_DATA,
    KIND_MAP,
    MAPS,
    MAX_ENVELOPES,
    MAX_PAGE,
    MAX_SMALL_JSON,
    PACK_HEADER,
    PACKS,
    PLAIN,
    RECORD_HEAD,
    SEALED,
    SESSIONS,
    SETS,
    SLOTS,
    VERSION,
    Config,
    Features,
    canonical,
    check_features,
    config_message,
    is_block_size,
    is_id,
    is_pack_name,
    now,
    numbered,
    pack_object,
    parse_config,
)
from imager.repository.keys import Secrets, Unlocking
from imager.storage.base import Storage
from imager.storage.errors import AlreadyExists, Gone, NotFound, StorageError

Reader = tuple[int, Sequence[int | None]]
"A pack's descriptor, and the handles of its session keys by envelope number (None: a key that is not held)."

_OPEN_PACKS = 64
_CHUNK = 256 << 10
_CHUNKS = 32


class Opening:
    """A repository whose config is read and whose key slots are being tried in the background."""

    def __init__(self, storage: Storage, credentials: Credentials, *, writing: bool) -> None:
        try:
            raw = storage.read(CONFIG, 0, MAX_SMALL_JSON + 1)
        except (NotFound, Gone) as error:
            raise NoRepository(
                f"there is no repository in {storage.url}", hint=f"create one: imager init {storage.url}"
            ) from error
        self.storage = storage
        self.config, self._object = parse_config(raw)
        self.id = bytes.fromhex(self.config.repository)
        check_features(self.config, writing=writing)
        self._unlocking: Unlocking | None = None
        if self.config.encryption == SEALED:
            self._unlocking = self._start(credentials)
        elif bytes.fromhex(self.config.seal) != config_message(self._object):
            raise IntegrityError("config is damaged: its digest is another")

    def _start(self, credentials: Credentials) -> Unlocking:
        slots = []
        damaged: ImagerError | None = None
        for slot_id in self.slot_ids(self.storage):
            try:
                raw = self.storage.read(SLOTS + slot_id, 0, MAX_SMALL_JSON + 1)
                slots.append(keys.parse_slot(raw, slot_id, self.id))
            except (IntegrityError, NotFound) as error:
                damaged = error
        if not slots:
            raise damaged or IntegrityError(
                "the repository has no key slot left",
                hint="without one it cannot be opened; restore slots/ from a copy of the repository",
            )
        secret = credentials.obtain({slot.kind for slot in slots})
        return Unlocking([slot for slot in slots if slot.kind == secret.kind], secret)

    @staticmethod
    def slot_ids(storage: Storage) -> list[str]:
        """Ids of all key slots, sorted. Raises `StorageError`."""
        names = (name.removeprefix(SLOTS) for name in storage.list_names(SLOTS))
        return sorted(name for name in names if is_id(name))

    def unlock(self) -> Repository:
        """Wait for the keys. Raises `WrongKey`, `IntegrityError`."""
        if self._unlocking is None:
            secrets = Secrets(bytes.fromhex(self.config.id_key), b"", {})
        else:
            secrets = self._unlocking.result()
            verify_key = bytes.fromhex(self.config.verify_key)
            seal = bytes.fromhex(self.config.seal)
            if keys.public_key(secrets.signing_seed) != verify_key or not keys.is_signed(
                verify_key, seal, config_message(self._object)
            ):
                raise IntegrityError(
                    "config is damaged or was replaced: its signature is not by this repository's key"
                )
        return Repository(self.storage, self.config, secrets)


class Repository:
    """An open repository. Safe to use from several threads; close it to free its descriptors."""

    def __init__(self, storage: Storage, config: Config, secrets: Secrets) -> None:
        self.storage = storage
        self.config = config
        self.secrets = secrets
        self.id = bytes.fromhex(config.repository)
        self.names = _native.Names()
        self.vault = _native.Vault(self.id, secrets.id_key)
        self._lock = RLock()
        self._handles: dict[bytes, int] = {}
        self._session_keys: dict[bytes, tuple[int, bytes]] = {}
        self._readers: OrderedDict[int, Reader] = OrderedDict()
        self._pinned: dict[int, int] = {}
        self._chunks: OrderedDict[tuple[int, int], bytes] = OrderedDict()

    # --- from place to repository ------------------------------------------------

    @staticmethod
    def begin(storage: Storage, credentials: Credentials, *, writing: bool = False) -> Opening:
        """Start to open: `unlock()` of what this returns waits for the keys.

        Raises `NoRepository` (none there, or features unknown; `writing` asks for
        those of a writer too), `WrongKey` where no secret is offered, `IntegrityError`.
        """
        return Opening(storage, credentials, writing=writing)

    @staticmethod
    def open(storage: Storage, credentials: Credentials, *, writing: bool = False) -> Repository:
        """Open a repository. Raises `NoRepository`, `WrongKey`, `IntegrityError`, `StorageError`."""
        return Opening(storage, credentials, writing=writing).unlock()

    @staticmethod
    def init(
        storage: Storage, credentials: Credentials, *, encryption: str = "passphrase", block_size: int = 0
    ) -> Repository:
        """Create a repository.

        encryption: passphrase, keyfile or none. block_size: bytes, for every image; 0 leaves it to each
        lineage. Raises `UsageError` where the place is in use or the wishes make no sense,
        `StorageError`, `Locked`.
        """
        if encryption not in ("passphrase", "keyfile", "none"):
            raise UsageError(f"unknown encryption {encryption!r}", hint="choose passphrase, keyfile or none")
        if block_size and not is_block_size(block_size):
            raise UsageError(
                f"{block_size} bytes is no block size", hint="choose a power of two from 4KiB to 4MiB"
            )
        _refuse_used(storage)
        sealed = encryption != "none"
        repository = os.urandom(16)
        secrets = keys.new_secrets() if sealed else Secrets(os.urandom(32), b"", {})
        secret = credentials.choose(encryption) if sealed else None
        bare = Config(
            format="imager",
            version=VERSION,
            repository=repository.hex(),
            created=now(),
            encryption=SEALED if sealed else PLAIN,
            block_size=block_size,
            features=Features(),
            id_key="" if sealed else secrets.id_key.hex(),
            verify_key=keys.public_key(secrets.signing_seed).hex() if sealed else "",
        )
        value = _builtins(bare)
        message = config_message(value)
        value["seal"] = (keys.sign(secrets.signing_seed, message) if sealed else message).hex()
        config, _ = parse_config(raw := canonical(value))
        with storage.initializing():
            _refuse_used(storage)
            for name in [*storage.list_names(SLOTS), *storage.list_names(EPOCHS)]:
                storage.delete(name)  # An init was interrupted: no config, no data, so nobody needs these.
            if secret is not None:
                slot, content = keys.new_slot(repository, secrets, secret, label=encryption)
                storage.create(SLOTS + slot, content)
                for number, private in secrets.epochs.items():
                    epoch = keys.new_epoch(repository, number, private, secrets.signing_seed)
                    storage.create(EPOCHS + keys.epoch_name(number), epoch)
            try:
                storage.create(CONFIG, raw)
            except AlreadyExists as error:
                raise UsageError(f"there is a repository in {storage.url} already") from error
        return Repository(storage, config, secrets)

    @property
    def sealed(self) -> bool:
        """Whether the repository is encrypted."""
        return self.config.encryption == SEALED

    # --- keys ------------------------------------------------------------------------

    def newest_epoch(self) -> tuple[int, bytes]:
        """(number, X25519 public key) of the newest key epoch. Raises `IntegrityError`."""
        numbers = numbered(self.storage.list_names(EPOCHS))
        if not numbers:
            raise IntegrityError("the repository has no key epoch left", hint="restore epochs/ from a copy")
        name = keys.epoch_name(max(numbers))
        raw = self.storage.read(EPOCHS + name, 0, MAX_SMALL_JSON + 1)
        verify_key = bytes.fromhex(self.config.verify_key)
        return keys.parse_epoch(raw, name, self.id, verify_key)

    def open_envelope(self, envelope: bytes) -> tuple[int, bytes]:
        """(cipher, session key), remembered. Raises `WrongKey`, `IntegrityError`."""
        with self._lock:
            found = self._session_keys.get(envelope)
            if found is None:
                found = keys.open_envelope(envelope, self.secrets, self.id)
                self._session_keys[envelope] = found
            return found

    def session_key(self, envelope: bytes) -> int:
        """The vault's handle of an envelope's session key. Raises `WrongKey`, `IntegrityError`."""
        with self._lock:
            handle = self._handles.get(envelope)
            if handle is None:
                handle = self._handles[envelope] = self.vault.add_key(*self.open_envelope(envelope))
            return handle

    def adopt_key(self, envelope: bytes, cipher: int, key: bytes) -> int:
        """The vault's handle of a session key that this process made: even a key that can't read knows it."""
        with self._lock:
            self._session_keys[envelope] = (cipher, key)
            handle = self._handles[envelope] = self.vault.add_key(cipher, key)
            return handle

    # --- packs -----------------------------------------------------------------------

    def pack_names(self, kind: int) -> list[bytes]:
        """Names of all packs of a kind that the storage lists. Raises `StorageError`."""
        prefix = PACKS if kind == KIND_DATA else MAPS
        at = len(prefix) + 3
        return [
            bytes.fromhex(name[at:])
            for name in self.storage.list_names(prefix)
            if is_pack_name(name[at:]) and name[at - 3 : at] == f"{name[at : at + 2]}/"
        ]

    def packs_present(self) -> int:
        """List the packs and tell `names` which there are; returns how many. Raises `StorageError`."""
        present = self.pack_names(KIND_DATA) + self.pack_names(KIND_MAP)
        self.names.set_present(present)
        return len(present)

    def pack_label(self, number: int) -> str:
        """How to name a pack in a message."""
        name = self.names.name(number)
        return f"pack {name.hex()}" if name is not None else f"the pack being written (number {number})"

    def pack_reader(self, number: int) -> Reader:
        """(descriptor, key handles by envelope number) of a pack, data or map.

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
            reader = self._open_pack(number)
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
                        pinned[number] = self.pack_reader(number)
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
        excess = len(self._readers) - _OPEN_PACKS
        if excess <= 0:
            return
        for number in [number for number in self._readers if number not in self._pinned][:excess]:
            os.close(self._readers.pop(number)[0])

    def open_object(self, number: int) -> int:
        """A descriptor of a pack's object, the caller's to close. Raises `IntegrityError`, `StorageError`."""
        name = self.names.name(number)
        if name is None:
            raise IntegrityError(f"{self.pack_label(number)} cannot be read yet")
        for kind in (KIND_DATA, KIND_MAP):
            for prefix in ("", DAMAGED):
                try:
                    return self.storage.open(prefix + pack_object(kind, name))
                except NotFound:
                    continue
        raise IntegrityError(
            f"pack {name.hex()} is missing", hint="imager check tells which image sets that concerns"
        )

    def _open_pack(self, number: int) -> Reader:
        fd = self.open_object(number)
        try:
            header = read_header(fd)
            try:
                envelopes = _native.pack_envelopes(header, self.id)
            except _native.DamagedError as error:
                raise IntegrityError(f"{self.pack_label(number)} is damaged: {error}") from error
            return fd, self._handles_of(envelopes)
        except OSError as error:
            os.close(fd)
            raise StorageError(f"reading {self.pack_label(number)} failed: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise

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
        with self._lock:
            first, last = offset // _CHUNK, (offset + length - 1) // _CHUNK
            data = self._chunk(number, first)
            if last != first:
                data += self._chunk(number, last)
        start = offset - first * _CHUNK
        record = data[start : start + length]
        if len(record) != length:
            raise IntegrityError(f"{self.pack_label(number)} ends before its page at {offset}")
        return record

    def _chunk(self, number: int, index: int) -> bytes:
        key = (number, index)
        chunk = self._chunks.get(key)
        if chunk is not None:
            self._chunks.move_to_end(key)
            return chunk
        fd, _ = self.pack_reader(number)
        try:
            chunk = os.pread(fd, _CHUNK, index * _CHUNK)
        except OSError as error:
            raise StorageError(f"reading {self.pack_label(number)} failed: {error.strerror}") from error
        self._chunks[key] = chunk
        if len(self._chunks) > _CHUNKS:
            self._chunks.popitem(last=False)
        return chunk

    def close(self) -> None:
        """Close the descriptors of packs."""
        with self._lock:
            for fd, _ in self._readers.values():
                os.close(fd)
            self._readers.clear()
            self._chunks.clear()

    def __enter__(self) -> Repository:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_header(fd: int) -> bytes:
    """The header of a pack, or as much of one as there is. Raises OSError."""
    header = os.pread(fd, 4096, 0)
    # A pack written by one session has one envelope; only a merged one may have more than fit here.
    wanted = int.from_bytes(header[12:16], "little")
    if len(header) < wanted <= PACK_HEADER + ENVELOPE * MAX_ENVELOPES:
        header = os.pread(fd, wanted, 0)
    return header[:wanted] if wanted >= PACK_HEADER else header


def _builtins(config: Config) -> dict[str, object]:
    import msgspec

    value: dict[str, object] = msgspec.to_builtins(config)
    return value


def _refuse_used(storage: Storage) -> None:
    """Raises `UsageError` where a new repository would be in the way of something."""
    if storage.exists(CONFIG):
        raise UsageError(f"there is a repository in {storage.url} already", hint="choose another folder")
    strangers = storage.strangers()
    if strangers:
        raise UsageError(
            f"{storage.url} is not empty: it holds {', '.join(strangers[:3])}", hint="choose an empty folder"
        )
    try:
        used = [prefix for prefix in (SESSIONS, SETS, PACKS, MAPS, INDEX) if storage.list_names(prefix)]
    except Gone:
        return  # Nothing there to list yet.
    if used:
        raise UsageError(
            f"{storage.url} holds the data of a repository whose config is gone ({', '.join(used)})",
            hint="restore config, slots/ and epochs/ from a copy, or choose another folder",
        )
