"""Secrets, the slots that open them, and the envelopes of session keys.

Invariant: a secret is in memory only; none is printed, logged, cached on
disk or handed to another program. Which part of a key was wrong is never
told: a slot opens, or it does not.
"""

from __future__ import annotations

import os

import msgspec
from msgspec import Struct

from imager import _native
from imager.errors import IntegrityError, UsageError, WrongKey
from imager.repository.format import (
    CIPHER_AES,
    CIPHER_CHACHA,
    CONTEXT_BODY,
    CONTEXT_KEYFILE,
    CONTEXT_SESSION,
    ENVELOPE,
    Certificate,
    Epoch,
    Kdf,
    Slot,
    canonical,
    epoch_message,
    now,
    parse,
    shape,
    unhex,
)

ARGON2_MEMORY_KIB, ARGON2_PASSES, ARGON2_LANES = 65536, 3, 4
_MAX_MEMORY_KIB, _MAX_PASSES, _MAX_LANES = 1 << 20, 16, 16
MIN_KEYFILE, MAX_KEYFILE = 32, 1 << 20
_ZERO_NONCE = bytes(12)
_KINDS = ("passphrase", "keyfile", "recovery")
FULL, READ, WRITE = "full", "read", "write"
ROLES = (FULL, READ, WRITE)
_MAX_EPOCH = (1 << 32) - 1


class Secret(Struct, frozen=True):
    """What a person gives to open a repository. kind: passphrase, keyfile or recovery."""

    kind: str
    value: bytes

    def __repr__(self) -> str:
        return "Secret(...)"


class Secrets(Struct, frozen=True):
    """What a repository's records are made and opened with (section 4).

    Role full: `signing_seed` is the repository's own. Role write: it is the writer's,
    which `writer` certifies, and `epochs` (number -> X25519 private key) is empty.
    Role read: there is none. Without encryption there is nothing but `id_key`.
    """

    id_key: bytes
    signing_seed: bytes
    epochs: dict[int, bytes]
    verify_key: bytes = b""
    "The repository's public key, as the slot has it; empty with role full, whose seed tells."
    writer: Certificate | None = None
    floor: int = 0
    "An epoch that there was when a slot of role write was made."

    def __repr__(self) -> str:
        return "Secrets(...)"

    @property
    def role(self) -> str:
        """full, read or write."""
        return FULL if not self.verify_key else WRITE if self.writer is not None else READ

    @property
    def newest(self) -> int:
        """The newest epoch that the key knows of: the repository has that one at least."""
        return max(self.floor, *self.epochs, 0)


def passphrase(text: str) -> Secret:
    """A passphrase in normal form NFC. Raises `UsageError` for an empty one."""
    if not text:
        raise UsageError("the passphrase is empty", hint="an empty passphrase protects nothing")
    import unicodedata

    try:
        return Secret("passphrase", unicodedata.normalize("NFC", text).encode())
    except UnicodeEncodeError as error:
        raise UsageError("the passphrase is not valid UTF-8") from error


def keyfile(content: bytes) -> Secret:
    """A keyfile's content. Raises `UsageError` where it is too short or too long."""
    if not MIN_KEYFILE <= len(content) <= MAX_KEYFILE:
        raise UsageError(
            f"a keyfile has {MIN_KEYFILE} bytes to 1 MiB; this one has {len(content)}",
            hint="name another file, or leave it to init to make one",
        )
    return Secret("keyfile", content)


def recovery(key: bytes) -> Secret:
    """A recovery key, 20 bytes (`recovery_key` has them as text)."""
    return Secret("recovery", key)


def new_secrets() -> Secrets:
    """Fresh random secrets of a new repository, with key epoch 1."""
    return Secrets(os.urandom(32), os.urandom(32), {1: os.urandom(32)})


# --- signatures ------------------------------------------------------------------


def public_key(seed: bytes) -> bytes:
    """The Ed25519 public key of a signing seed."""
    return _native.ed25519_public(seed)


def sign(seed: bytes, message: bytes) -> bytes:
    """An Ed25519 signature, 64 bytes."""
    return _native.ed25519_sign(seed, message)


def is_signed(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether the signature is that of the message by the key whose public part is given."""
    return _native.ed25519_verify(public, signature, message)


# --- slots -------------------------------------------------------------------------


def _slot_data(repository: bytes, slot: bytes, kind: str, role: str) -> bytes:
    return b"imager slot v1" + repository + slot + kind.encode() + b"\0" + role.encode()


def _key_of_slot(kdf: Kdf, secret: Secret, what: str) -> bytes:
    salt = unhex(kdf.salt, 16, what)
    if kdf.name == "blake3" and secret.kind != "passphrase":
        return _native.blake3_derive(CONTEXT_KEYFILE, salt + secret.value)
    if kdf.name != "argon2id" or secret.kind != "passphrase":
        raise IntegrityError(f"{what} is damaged: no way to make a key called {kdf.name!r}")
    if not (
        8 * kdf.lanes <= kdf.memory_kib <= _MAX_MEMORY_KIB
        and 1 <= kdf.passes <= _MAX_PASSES
        and 1 <= kdf.lanes <= _MAX_LANES
    ):
        raise IntegrityError(f"{what} is damaged: its costs are out of bounds")
    from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

    derive = Argon2id(
        salt=salt, length=32, iterations=kdf.passes, lanes=kdf.lanes, memory_cost=kdf.memory_kib
    ).derive
    return derive(secret.value)


def new_slot(repository: bytes, secrets: Secrets, secret: Secret, *, label: str = "") -> tuple[str, bytes]:
    """A slot that opens `secrets` with `secret`, in the role that they have: (slot id, object)."""
    slot, salt, nonce = os.urandom(16), os.urandom(16).hex(), os.urandom(12)
    if secret.kind == "passphrase":
        kdf = Kdf("argon2id", salt, ARGON2_MEMORY_KIB, ARGON2_PASSES, ARGON2_LANES)
    else:
        kdf = Kdf("blake3", salt)
    role = secrets.role
    payload: dict[str, object] = {
        "id_key": secrets.id_key,
        "epochs": {str(number): key for number, key in secrets.epochs.items()},
    }
    if role != READ:
        payload["signing_seed"] = secrets.signing_seed
    if role != FULL:
        payload["verify_key"] = secrets.verify_key
    if role == WRITE:
        payload["floor"] = secrets.floor
    key = _key_of_slot(kdf, secret, "the new slot")
    sealed = _native.wrap(key, nonce, canonical(payload), _slot_data(repository, slot, secret.kind, role))
    body = Slot(
        slot.hex(),
        repository.hex(),
        secret.kind,
        role,
        label,
        now(),
        kdf,
        nonce.hex(),
        sealed.hex(),
        reads=tuple(sorted(secrets.epochs)),
        writer=secrets.writer,
    )
    return slot.hex(), canonical(body)


def for_reading(secrets: Secrets) -> Secrets:
    """Of the secrets of role full, those of role read: they open everything and sign nothing."""
    return Secrets(secrets.id_key, b"", secrets.epochs, public_key(secrets.signing_seed))


def for_writing(secrets: Secrets, seed: bytes, writer: Certificate) -> Secrets:
    """Of the secrets of role full, those of a writer that has been certified: they open nothing."""
    verify_key = public_key(secrets.signing_seed)
    return Secrets(secrets.id_key, seed, {}, verify_key, writer, floor=secrets.newest)


def parse_slot(raw: bytes, name: str, repository: bytes) -> Slot:
    """The slot of the object `slots/<name>`. Raises `IntegrityError`."""
    what = f"key slot {name}"
    slot = shape(parse(raw, what), Slot, what)
    if slot.slot != name or slot.repository != repository.hex():
        raise IntegrityError(f"{what} is damaged: it belongs to another name or repository")
    if slot.kind not in _KINDS or slot.role not in ROLES:
        raise IntegrityError(f"{what} is damaged: unknown kind or role")
    if (slot.role == WRITE) != (slot.writer is not None):
        raise IntegrityError(f"{what} is damaged: its role does not go with a certificate, or lacks one")
    return slot


def open_slot(slot: Slot, secret: Secret) -> Secrets | None:
    """The secrets in a slot; None where `secret` is not that of the slot. Raises `IntegrityError`.

    Whether they are those of the repository is for its opening to tell.
    """
    what = f"key slot {slot.slot}"
    if slot.kind != secret.kind:
        return None
    data = _slot_data(unhex(slot.repository, 16, what), unhex(slot.slot, 16, what), slot.kind, slot.role)
    nonce, sealed = unhex(slot.nonce, 12, what), unhex(slot.sealed, None, what)
    payload = _native.unwrap(_key_of_slot(slot.kdf, secret, what), nonce, sealed, data)
    if payload is None:
        return None
    return _secrets(shape(parse(payload, what), _Payload, what), slot, what)


class _Payload(msgspec.Struct, frozen=True):
    """What is sealed in a slot, in hexadecimal."""

    id_key: str
    epochs: dict[str, str]
    signing_seed: str = ""
    verify_key: str = ""
    floor: int = 0


def _secrets(payload: _Payload, slot: Slot, what: str) -> Secrets:
    """The secrets in a slot's payload, as its role has them. Raises `IntegrityError`."""
    epochs: dict[int, bytes] = {}
    for text, key in payload.epochs.items():
        if not (text.isascii() and text.isdecimal() and text[0] != "0" and int(text[:11]) <= _MAX_EPOCH):
            raise IntegrityError(f"{what} holds the key of an epoch that cannot be")
        epochs[int(text)] = unhex(key, 32, what)
    secrets = Secrets(
        unhex(payload.id_key, 32, what),
        unhex(payload.signing_seed, 0 if slot.role == READ else 32, what),
        epochs,
        unhex(payload.verify_key, 0 if slot.role == FULL else 32, what),
        slot.writer if slot.role == WRITE else None,
        payload.floor,
    )
    if secrets.role != slot.role or (slot.role == WRITE) == bool(epochs):
        raise IntegrityError(f"{what} holds keys of another role")
    if not 0 <= payload.floor <= _MAX_EPOCH:
        raise IntegrityError(f"{what} holds the number of an epoch that cannot be")
    return secrets


# --- epochs and envelopes -------------------------------------------------------------


def epoch_public(private: bytes) -> bytes:
    """The X25519 public key of an epoch's private key."""
    return _native.x25519_public(private)


def new_epoch(repository: bytes, epoch: int, private: bytes, signing_seed: bytes) -> bytes:
    """The object `epochs/<epoch>` of a private key."""
    public = epoch_public(private)
    signature = sign(signing_seed, epoch_message(repository, epoch, public))
    return canonical(Epoch(epoch, public.hex(), repository.hex(), signature.hex()))


def epoch_name(epoch: int) -> str:
    """Object name of a key epoch, without its folder: 8 hexadecimal digits."""
    return f"{epoch:08x}"


def parse_epoch(raw: bytes, name: str, repository: bytes, verify_key: bytes) -> tuple[int, bytes]:
    """(number, X25519 public key) of the object `epochs/<name>`, its signature checked.

    Raises `IntegrityError`.
    """
    what = f"key epoch {name}"
    epoch = shape(parse(raw, what), Epoch, what)
    public = unhex(epoch.public, 32, what)
    in_bounds = 1 <= epoch.epoch < 1 << 32
    if not in_bounds or name != epoch_name(epoch.epoch) or epoch.repository != repository.hex():
        raise IntegrityError(f"{what} is damaged: it belongs to another name or repository")
    signature = unhex(epoch.signature, 64, what)
    if not is_signed(verify_key, signature, epoch_message(repository, epoch.epoch, public)):
        raise IntegrityError(
            f"{what} is not signed by this repository's key",
            hint="somebody may have put a key of their own there; nothing was encrypted to it",
        )
    return epoch.epoch, public


def _wrapping_key(shared: bytes, ephemeral: bytes, public: bytes, repository: bytes) -> bytes:
    return _native.blake3_derive(CONTEXT_SESSION, shared + ephemeral + public + repository)


def seal_session_key(
    key: bytes, *, cipher: int, epoch: int, public: bytes, session: bytes, repository: bytes
) -> bytes:
    """An envelope of 104 bytes that only the holder of the epoch's private key opens."""
    private = os.urandom(32)
    ephemeral = _native.x25519_public(private)
    shared = _native.x25519(private, public)
    head = bytes((cipher, 1, 0, 0)) + epoch.to_bytes(4, "little") + session + ephemeral
    wrap = _wrapping_key(shared, ephemeral, public, repository)
    # The nonce may be fixed: the wrapping key comes from a fresh ephemeral key and is used once.
    return head + _native.wrap(wrap, _ZERO_NONCE, key, head)


def open_envelope(envelope: bytes, secrets: Secrets, repository: bytes) -> tuple[int, bytes]:
    """(cipher, session key). Raises `WrongKey` where we lack the epoch's private key, `IntegrityError`."""
    damaged = "the envelope of a session key is damaged"
    if len(envelope) != ENVELOPE or envelope[1:4] != b"\1\0\0":
        raise IntegrityError(damaged)
    cipher, epoch = envelope[0], int.from_bytes(envelope[4:8], "little")
    if cipher not in (CIPHER_AES, CIPHER_CHACHA):
        raise IntegrityError(f"{damaged}: unknown cipher {cipher}")
    private = secrets.epochs.get(epoch)
    if private is None:
        if not secrets.epochs:
            raise WrongKey(
                "this key can back up, but not read what is stored", hint="use a key with the full role"
            )
        raise WrongKey(
            f"this key does not have key epoch {epoch}", hint="use a key that was made after that rotation"
        )
    ephemeral = envelope[24:56]
    try:
        shared = _native.x25519(private, ephemeral)
    except _native.DamagedError as error:
        raise IntegrityError(damaged) from error
    wrap = _wrapping_key(shared, ephemeral, _native.x25519_public(private), repository)
    key = _native.unwrap(wrap, _ZERO_NONCE, envelope[56:], envelope[:56])
    if key is None:
        raise IntegrityError(damaged)
    return cipher, key


def body_key(session_key: bytes) -> bytes:
    """The key of a manifest's body."""
    return _native.blake3_derive(CONTEXT_BODY, session_key)


def seal_body(session_key: bytes, plain: bytes, data: bytes) -> bytes:
    """A manifest's body as stored: nonce, ciphertext, tag. `data`: the public part's bytes."""
    nonce = os.urandom(12)
    return nonce + _native.wrap(body_key(session_key), nonce, plain, data)


def open_body(session_key: bytes, stored: bytes, data: bytes) -> bytes | None:
    """The body that `seal_body` sealed; None where it is not whole."""
    if len(stored) < 28:
        return None
    return _native.unwrap(body_key(session_key), stored[:12], stored[12:], data)
