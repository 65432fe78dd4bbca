"""Making a repository, opening it, and the keys of the one that is open.

Invariant: nothing is read from a repository whose config is not whole and
whose features are not all known; and `init` never replaces a repository, nor
takes its keys away from data that is there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from imager import _native
from imager.errors import ImagerError, IntegrityError, NoRepository, UsageError, WrongKey
from imager.repository import keys, writers
from imager.repository.credentials import Credentials
from imager.repository.format import (
    CONFIG,
    EPOCHS,
    INDEX,
    MAPS,
    MAX_JSON,
    MAX_SMALL_JSON,
    PACKS,
    PLAIN,
    REVOKED,
    SEALED,
    SESSIONS,
    SETS,
    SLOTS,
    VERSION,
    Config,
    Features,
    Slot,
    canonical,
    check_features,
    config_message,
    is_block_size,
    is_id,
    now,
    numbered,
    parse_config,
)
from imager.repository.keymemory import KeyMemory, PlaceMemory
from imager.repository.keys import Secrets
from imager.repository.packs import PackAccess, Reader
from imager.repository.unlocking import Unlocking, in_order
from imager.storage.base import Storage
from imager.storage.errors import AlreadyExists, Gone, NotFound

if TYPE_CHECKING:
    from imager.repository.locator import Locator

__all__ = ["Opening", "Reader", "Repository"]


_MOST_EPOCHS = 64


def read_config(storage: Storage, *, writing: bool) -> tuple[Config, dict[str, object]]:
    """A repository's config, and the object it came from. Without encryption its digest is checked.

    Raises `NoRepository` (none there, or features unknown; `writing` asks for those of a
    writer too), `IntegrityError`, `StorageError`.
    """
    try:
        raw = storage.read(CONFIG, 0, MAX_SMALL_JSON + 1)
    except (NotFound, Gone) as error:
        if isinstance(error, Gone) and not storage.local:
            raise NoRepository(error.message, hint=error.hint) from error
        hint = f"create one: imager init {storage.url}"
        if storage.url.startswith("s3://"):
            hint += f"; if there was one, '{storage.url}?as-of=TIME' shows it where the bucket keeps versions"
        raise NoRepository(f"there is no repository in {storage.url}", hint=hint) from error
    config, value = parse_config(raw)
    check_features(config, writing=writing)
    if config.encryption != SEALED and bytes.fromhex(config.seal) != config_message(value):
        raise IntegrityError("config is damaged: its digest is another")
    return config, value


class Opening:
    """A repository whose config is read and whose key slots are being tried in the background."""

    def __init__(self, storage: Storage, credentials: Credentials, *, writing: bool) -> None:
        self.storage = storage
        self.config, self._object = read_config(storage, writing=writing)
        self.id = bytes.fromhex(self.config.repository)
        self._unlocking: Unlocking | None = None
        self.secret: keys.Secret | None = None
        "What was given to open it; None without encryption."
        if self.config.encryption == SEALED:
            self._unlocking = self._start(credentials)

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
        self.secret = credentials.obtain({slot.kind for slot in slots})
        fitting = [slot for slot in slots if slot.kind == self.secret.kind]
        return Unlocking(in_order(fitting, KeyMemory(self.id).slot), self.secret)

    @staticmethod
    def slot_ids(storage: Storage) -> list[str]:
        """Ids of all key slots, sorted. Raises `StorageError`."""
        names = (name.removeprefix(SLOTS) for name in storage.list_names(SLOTS))
        return sorted(name for name in names if is_id(name))

    def unlock(self) -> Repository:
        """Wait for the keys. Raises `WrongKey`, `IntegrityError`."""
        place = PlaceMemory(self.storage.url)
        if self._unlocking is None:
            if before := place.encrypted:
                raise IntegrityError(
                    f"the repository in {self.storage.url} was encrypted when this machine used it last, and "
                    "this one is not: its config was replaced, and nothing was stored in the open",
                    hint=f"put config of {before[:8]} back from a copy; if you made another repository there "
                    f"on purpose, delete {place.path}",
                )
            return Repository(self.storage, self.config, Secrets(bytes.fromhex(self.config.id_key), b"", {}))
        secrets = self._unlocking.result()
        verify_key = bytes.fromhex(self.config.verify_key)
        seal = bytes.fromhex(self.config.seal)
        trusted = secrets.verify_key or keys.public_key(secrets.signing_seed)
        if trusted != verify_key or not keys.is_signed(verify_key, seal, config_message(self._object)):
            raise IntegrityError(
                "config is damaged or was replaced: its signature is not by this repository's key"
            )
        slot = self._unlocking.opened
        if secrets.writer is not None and (
            keys.public_key(secrets.signing_seed).hex() != secrets.writer.public
            or not writers.is_certified(self.id, verify_key, secrets.writer)
        ):
            raise IntegrityError(f"key slot {slot.slot} has the certificate of another writer")
        KeyMemory(self.id).opened(slot.slot)
        place.saw(self.config.repository)
        return Repository(self.storage, self.config, secrets, slot)


class Repository(PackAccess):
    """An open repository. Safe to use from several threads; close it to free its descriptors."""

    def __init__(self, storage: Storage, config: Config, secrets: Secrets, slot: Slot | None = None) -> None:
        super().__init__(storage, bytes.fromhex(config.repository))
        self.config = config
        self.secrets = secrets
        self.slot = slot
        "The key slot that opened; None without encryption, and after `init`."
        self.vault = _native.Vault(self.id, secrets.id_key)
        self._handles: dict[bytes, int] = {}
        self._session_keys: dict[bytes, tuple[int, bytes]] = {}
        self._revoked: writers.Revoked | None = None
        self.revocation_problems: list[tuple[str, str]] = []
        "Revocations that do not count, or are gone: (object name, what is wrong). `revoked` fills it."

    @cached_property
    def locator(self) -> Locator:
        """Finds records that are not where a map says."""
        from imager.repository.locator import Locator

        return Locator(self)

    def look_anew(self) -> None:
        """Forget where things were found: this very process has moved some of them."""
        self.close()
        self.__dict__.pop("locator", None)

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
        refuse_used(storage)
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
            refuse_used(storage)
            if not storage.local:
                from imager.storage.probe import refuse_unfit

                refuse_unfit(storage)
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
        place = PlaceMemory(storage.url)
        place.saw(config.repository) if sealed else place.forget()
        return Repository(storage, config, secrets)

    @property
    def place(self) -> str:
        """A name of this repository at this place, for what a machine remembers: a copy has the same id."""
        return place_of(self.id, self.storage.url)

    @property
    def sealed(self) -> bool:
        """Whether the repository is encrypted."""
        return self.config.encryption == SEALED

    # --- keys ------------------------------------------------------------------------

    @property
    def verify_key(self) -> bytes:
        """The public key of all that the repository signs; empty without encryption."""
        return bytes.fromhex(self.config.verify_key)

    def epoch(self, number: int) -> bytes:
        """The X25519 public key of a key epoch. Raises `NotFound`, `IntegrityError`."""
        name = keys.epoch_name(number)
        raw = self.storage.read(EPOCHS + name, 0, MAX_SMALL_JSON + 1)
        return keys.parse_epoch(raw, name, self.id, self.verify_key)[1]

    def newest_epoch(self) -> tuple[int, bytes]:
        """(number, X25519 public key) of the newest key epoch that the repository's key signed.

        Raises `IntegrityError` where there is none, or an older one than was there before.
        """
        memory = KeyMemory(self.id)
        floor = max(self.secrets.newest, memory.epoch)
        problem: ImagerError | None = None
        for number in sorted(numbered(self.storage.list_names(EPOCHS)), reverse=True)[:_MOST_EPOCHS]:
            try:
                public = self.epoch(number)
            except (IntegrityError, NotFound) as error:
                problem = error  # Anybody who can write can put one there; it says nothing of the others.
                continue
            if number < floor and floor in self.secrets.epochs and self.secrets.role == keys.FULL:
                # Deleted, or a rotation was killed before it published it: it is made again, bit for bit.
                return floor, self._publish_epoch(floor)
            if number < floor:
                raise IntegrityError(
                    f"key epoch {floor} is gone, and the one before it would be used again: "
                    "it was deleted, or an older state of the repository was put in its place",
                    hint=f"restore {EPOCHS}{keys.epoch_name(floor)} from a copy; nothing was encrypted",
                )
            memory.saw_epoch(number)
            return number, public
        raise problem or IntegrityError(
            "the repository has no key epoch left", hint="restore epochs/ from a copy"
        )

    def _publish_epoch(self, number: int) -> bytes:
        raw = keys.new_epoch(self.id, number, self.secrets.epochs[number], self.secrets.signing_seed)
        try:
            self.storage.create(EPOCHS + keys.epoch_name(number), raw)
        except AlreadyExists:
            pass  # What is there now is looked at like any other.
        return self.epoch(number)

    def revoked(self) -> writers.Revoked:
        """The writers that are revoked, read once. Raises `StorageError`."""
        with self._lock:
            if self._revoked is None:
                self._revoked = self._read_revocations()
            return self._revoked

    def forget_revocations(self) -> None:
        """Read the revocations again when they are needed next."""
        with self._lock:
            self._revoked = None
            self.revocation_problems.clear()

    def _read_revocations(self) -> writers.Revoked:
        memory = KeyMemory(self.id)
        found: dict[str, frozenset[bytes]] = {}
        texts: dict[str, str] = {}
        for name in self.storage.list_names(REVOKED):
            writer = name.removeprefix(REVOKED)
            try:
                raw = self.storage.read(name, 0, MAX_JSON + 1)
                revocation = writers.parse_revocation(raw, writer, self.id, self.verify_key)
            except (IntegrityError, NotFound) as error:
                self.revocation_problems.append((name, error.message))
                continue
            found[writer], texts[writer] = writers.kept(revocation), raw.decode()
        for writer, text in memory.revoked.items():
            if writer in found:
                continue
            try:
                revocation = writers.parse_revocation(text.encode(), writer, self.id, self.verify_key)
            except IntegrityError:
                continue  # The memory is damaged; it is only a second guard.
            found[writer] = writers.kept(revocation)
            self.revocation_problems.append(
                (REVOKED + writer, "it is gone: this machine saw that writer's key being revoked")
            )
        memory.saw_revocations(texts)
        return found

    def can_open(self, envelope: bytes) -> bool:
        """Whether this key has the private key of an envelope's epoch."""
        return int.from_bytes(envelope[4:8], "little") in self.secrets.epochs

    def open_envelope(self, envelope: bytes) -> tuple[int, bytes]:
        """(cipher, session key), remembered. Raises `WrongKey`, `IntegrityError`."""
        with self._lock:
            found = self._session_keys.get(envelope)
            if found is None:
                try:
                    found = keys.open_envelope(envelope, self.secrets, self.id)
                except IntegrityError:
                    self.refuse_stray_epoch(int.from_bytes(envelope[4:8], "little"))
                    raise
                self._session_keys[envelope] = found
            return found

    def refuse_stray_epoch(self, number: int) -> None:
        """Raises `WrongKey` where the key holds another private key of the epoch than the repository's."""
        private = self.secrets.epochs.get(number)
        try:
            stray = private is not None and keys.epoch_public(private) != self.epoch(number)
        except (IntegrityError, NotFound):
            return
        if stray:
            raise WrongKey(
                f"this key holds a private key of epoch {number} that the repository never used",
                hint="a rotation was interrupted beside another one; use a slot that was made after them",
            )

    def _handles_of(self, envelopes: Sequence[bytes]) -> tuple[int | None, ...]:
        try:
            return super()._handles_of(envelopes)
        except WrongKey:
            if not self.sealed:
                raise
            # Who cannot read follows public parts all the same; `pack_keys` and `packs` refuse to open.
            return tuple(self._handles.get(envelope) for envelope in envelopes)

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


def place_of(repository: bytes, url: str) -> str:
    """A file name for what is remembered of a repository at a place."""
    return f"{repository.hex()}-{_native.blake3(url.encode(errors='surrogateescape'))[:8].hex()}"


def _builtins(config: Config) -> dict[str, object]:
    import msgspec

    value: dict[str, object] = msgspec.to_builtins(config)
    return value


def refuse_used(storage: Storage) -> None:
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
