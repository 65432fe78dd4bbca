"""The words of the repository format: constants, canonical JSON, the small objects.

Invariant: docs/design/repository-format.md is the contract and this module
its only spelling in Python. What is read is bounded before it is parsed,
must be canonical, and must hold only known values.
"""

from __future__ import annotations

import re
import time
from typing import Any, TypeVar

import msgspec

from imager import _native
from imager.errors import IntegrityError, NoRepository

VERSION = 1
CONFIG = "config"
SLOTS, EPOCHS, SESSIONS, SETS, REVOKED = "slots/", "epochs/", "sessions/", "sets/", "revoked/"
PACKS, MAPS, INDEX, CONDEMNED, DAMAGED = "packs/", "maps/", "index/", "condemned/", "damaged/"
ABSENT, CHECKED, HEALED = "absent/", "checked/", "damaged/healed/"
FORGOTTEN, PINS = "forgotten/", "pins/"

KIND_DATA, KIND_MAP = 1, 2
CIPHER_AES, CIPHER_CHACHA = 1, 2
NOT_ENCRYPTED = 0xFFFF
RECORD_HEAD = 64
PACK_HEADER, ENVELOPE, MAX_ENVELOPES = 72, 104, 1024
TRAILER_ENTRY, FOOTER = 96, 32
PACK_TARGET = 64 << 20
MAX_RECORDS = 1 << 21
"Records of a pack at most."
MAX_PACK = (1 << 32) - 1
PAGE_SLOTS = 256
MAX_PAGE = 64 << 10
MIN_BLOCK, MAX_BLOCK = 4 << 10, 4 << 20
MAX_JSON = 64 << 20
MAX_SMALL_JSON = 1 << 20
"Bound of config, slots, epochs and sessions, far above what any of them needs."

_NUMBERED = r"[a-z]+/([0-9a-f]{8})"

SET_MAGIC, ABORT_MAGIC = b"IMGRSET1", b"IMGRABRT"
SEALED, PLAIN = "sealed", "none"

KNOWN_READ_FEATURES: frozenset[str] = frozenset()
KNOWN_WRITE_FEATURES: frozenset[str] = frozenset()
KNOWN_SET_FEATURES: frozenset[str] = frozenset()

CONTEXT_KEYFILE = "imager 2026-11 keyfile slot v1"
CONTEXT_SESSION = "imager 2026-11 session key v1"
CONTEXT_BODY = "imager 2026-11 manifest body v1"
CONTEXT_LINEAGE = "imager 2026-11 lineage v1"


class Features(msgspec.Struct, frozen=True):
    """Names of features that a reader, or a writer, must know."""

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()


class Config(msgspec.Struct, frozen=True, omit_defaults=True):
    """The object `config` (section 3)."""

    format: str
    version: int
    repository: str
    created: int
    encryption: str
    block_size: int
    features: Features
    seal: str = ""
    id_key: str = ""
    verify_key: str = ""


class Epoch(msgspec.Struct, frozen=True):
    """Public key of a key epoch (section 4)."""

    epoch: int
    public: str
    repository: str
    signature: str


class Kdf(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a slot's key comes from its secret. Costs are zero where the name is blake3."""

    name: str
    salt: str
    memory_kib: int = 0
    passes: int = 0
    lanes: int = 0


class Certificate(msgspec.Struct, frozen=True):
    """The repository's word that a key which can write only may sign image sets (section 4).

    `writer`: the key's id; `host`: the one machine whose sets it may sign, `*` for any.
    """

    writer: str
    host: str
    label: str
    public: str
    signature: str


class Revocation(msgspec.Struct, frozen=True):
    """A writer's key is not to be believed any more but for the sets of these digests (section 4)."""

    writer: str
    repository: str
    created: int
    sets: tuple[str, ...]
    signature: str


class Slot(msgspec.Struct, frozen=True, omit_defaults=True):
    """One way to open the secrets (section 4). `reads`: numbers of the epochs in it, as its maker said."""

    slot: str
    repository: str
    kind: str
    role: str
    label: str
    created: int
    kdf: Kdf
    nonce: str
    sealed: str
    reads: tuple[int, ...] = ()
    writer: Certificate | None = None


class SessionObject(msgspec.Struct, frozen=True):
    """A writer announced itself (section 9). `condemned`: ids of the condemnations that it had seen."""

    session: str
    repository: str
    created: int
    epoch: int
    host: str
    pid: int
    condemned: tuple[str, ...] = ()
    process: str = ""
    "Which process of which machine, as `sessions.this_process` says it; a hint for whom to fence."
    kind: str = "backup"
    digest: str = ""
    "Of the object without it; the first sessions had none."


class Condemned(msgspec.Struct, frozen=True):
    """Packs that a prune is going to delete (section 9); names in hexadecimal, ascending."""

    condemned: str
    repository: str
    created: int
    packs: tuple[str, ...]
    maps: tuple[str, ...]


class Tombstone(msgspec.Struct, frozen=True):
    """An image set was forgotten on purpose (section 9). `digest`: of its whole manifest."""

    set: str
    repository: str
    lineage: str
    sequence: int
    digest: str
    created: int
    host: str
    reason: str
    signature: str = ""


class Pin(msgspec.Struct, frozen=True):
    """An image set is to be kept whatever the rules say (section 9)."""

    set: str
    repository: str
    created: int
    host: str
    note: str = ""


class AbortMark(msgspec.Struct, frozen=True):
    """A session was declared dead before it committed (section 9)."""

    session: str
    created: int
    reason: str


def now() -> int:
    """This moment as the format writes it: microseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1000


def canonical(value: Any) -> bytes:
    """Canonical JSON of dicts, lists, strings, integers, booleans, None, bytes (as hexadecimal) and structs.

    Raises TypeError for anything else, fractions among it.
    """
    return msgspec.json.encode(_plain(value), order="sorted")


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind is str:
        if value.isascii():
            return value
        # A path may hold bytes that are no UTF-8 (surrogates, in Python): show them escaped.
        return value.encode("utf-8", "backslashreplace").decode()
    if kind is int or kind is bool or value is None:
        return value
    if kind is dict:
        return {_key(key): _plain(item) for key, item in value.items()}
    if kind is list or kind is tuple:
        return [_plain(item) for item in value]
    if kind is bytes:
        return value.hex()
    if isinstance(value, msgspec.Struct):
        return _plain(msgspec.to_builtins(value, builtin_types=(bytes,)))
    raise TypeError(f"canonical JSON has no {kind.__name__}")


def _key(key: Any) -> str:
    if type(key) is not str:
        raise TypeError("keys of canonical JSON are strings")
    return str(_plain(key))


def parse(raw: bytes, what: str, limit: int = MAX_SMALL_JSON) -> dict[str, Any]:
    """A canonical JSON object that is named `what` in messages. Raises `IntegrityError`."""
    if len(raw) > limit:
        raise IntegrityError(f"{what} is damaged: it is larger than any such object")
    try:
        value = msgspec.json.decode(raw)
        if type(value) is dict and canonical(value) == raw:
            return value
    except (msgspec.DecodeError, TypeError, UnicodeError, RecursionError, OverflowError):
        pass
    raise IntegrityError(f"{what} is damaged: it is not canonical JSON")


T = TypeVar("T")


def shape(value: dict[str, Any], as_type: type[T], what: str) -> T:
    """`value` as a struct, every field of its type. Raises `IntegrityError`."""
    try:
        return msgspec.convert(value, as_type)
    except (msgspec.ValidationError, RecursionError) as error:
        raise IntegrityError(f"{what} is damaged: {error}") from error


def unhex(text: str, length: int | None, what: str) -> bytes:
    """The bytes of lower-case hexadecimal text, `length` of them. Raises `IntegrityError`."""
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if value.hex() != text or (length is not None and len(value) != length):
        raise IntegrityError(f"{what} is damaged: not {length or 'a number of'} bytes in hexadecimal")
    return value


def is_id(text: str) -> bool:
    """Whether this is a repository, session or set id in full."""
    try:
        return len(text) == 32 and bytes.fromhex(text).hex() == text
    except ValueError:
        return False


def is_pack_name(text: str) -> bool:
    """Whether this is the name of a pack or an index segment."""
    try:
        return len(text) == 64 and bytes.fromhex(text).hex() == text
    except ValueError:
        return False


def numbered(names: list[str]) -> list[int]:
    """The numbers in names of 8 hexadecimal digits (epochs); other names are skipped."""
    found = (re.fullmatch(_NUMBERED, name) for name in names)
    return [int(match[1], 16) for match in found if match]


def pack_object(kind: int, name: bytes) -> str:
    """The object name of a pack: `packs/3f/3f09...`."""
    text = name.hex()
    return f"{PACKS if kind == KIND_DATA else MAPS}{text[:2]}/{text}"


def config_message(config: dict[str, Any]) -> bytes:
    """What the seal of a config is made over: the digest of the object without its seal."""
    bare = {key: value for key, value in config.items() if key != "seal"}
    return _native.blake3(b"imager config v1" + canonical(bare))


def epoch_message(repository: bytes, epoch: int, public: bytes) -> bytes:
    """What the signature of an epoch is made over."""
    return _native.blake3(b"imager epoch v1" + repository + epoch.to_bytes(4, "little") + public)


def session_digest(session: dict[str, Any]) -> str:
    """The digest in a session's announcement: of the object without it."""
    bare = {key: value for key, value in session.items() if key != "digest"}
    return _native.blake3(b"imager session v1" + canonical(bare)).hex()


def parse_session(raw: bytes, session: str, repository: str) -> SessionObject:
    """The object `sessions/<session>`. Raises `IntegrityError`."""
    what = f"session {session}"
    value = parse(raw, what)
    told = shape(value, SessionObject, what)
    if told.session != session or told.repository != repository:
        raise IntegrityError(f"{what} is damaged: it belongs to another name or repository")
    first_ones = "generation" in value and "digest" not in value
    if not first_ones and told.digest != session_digest(value):
        raise IntegrityError(f"{what} is damaged: its digest is another")
    return told


def tombstone_message(tombstone: dict[str, Any]) -> bytes:
    """What the signature of a tombstone is made over: the digest of the object without it."""
    bare = {key: value for key, value in tombstone.items() if key != "signature"}
    return _native.blake3(b"imager forgotten v1" + canonical(bare))


def certificate_message(repository: bytes, certificate: Certificate) -> bytes:
    """What the signature of a writer's certificate is made over."""
    bare = {"host": certificate.host, "label": certificate.label}
    bare |= {"public": certificate.public, "writer": certificate.writer}
    return _native.blake3(b"imager writer v1" + repository + canonical(bare))


def revocation_message(revocation: dict[str, Any]) -> bytes:
    """What the signature of a revocation is made over: the digest of the object without it."""
    bare = {key: value for key, value in revocation.items() if key != "signature"}
    return _native.blake3(b"imager revocation v1" + canonical(bare))


def lineage_id(id_key: bytes, host: str, name: str) -> bytes:
    """The id of the lineage of `name` on `host`, 16 bytes; it tells nothing without the key."""
    key = _native.blake3_derive(CONTEXT_LINEAGE, id_key)
    return _native.blake3(canonical([host, name]), key)[:16]


def parse_config(raw: bytes) -> tuple[Config, dict[str, Any]]:
    """The config, its seal not yet checked, and the object it came from.

    Raises `NoRepository` for a format of the future, `IntegrityError` for a damaged one.
    """
    value = parse(raw, "config")
    if value.get("format") != "imager":
        raise NoRepository("this is not a repository of imager: its config says otherwise")
    version = value.get("version")
    if version != VERSION:
        raise NoRepository(
            f"the repository has format version {version}; this program knows version {VERSION}",
            hint="use a newer imager",
        )
    config = shape(value, Config, "config")
    unhex(config.repository, 16, "config")
    if config.encryption == SEALED:
        unhex(config.verify_key, 32, "config")
        unhex(config.seal, 64, "config")
    elif config.encryption == PLAIN:
        unhex(config.id_key, 32, "config")
        unhex(config.seal, 32, "config")
    else:
        raise NoRepository(
            f"the repository is encrypted in a way that this program does not know: {config.encryption}",
            hint="use a newer imager",
        )
    if config.block_size and not is_block_size(config.block_size):
        raise IntegrityError(f"config is damaged: no block size: {config.block_size}")
    return config, value


def is_block_size(size: int) -> bool:
    """Whether images can have blocks of this many bytes."""
    return MIN_BLOCK <= size <= MAX_BLOCK and size & (size - 1) == 0


def check_features(config: Config, *, writing: bool) -> None:
    """Refuse a repository with features that this program does not know. Raises `NoRepository`."""
    unknown = set(config.features.read) - KNOWN_READ_FEATURES
    if writing:
        unknown |= set(config.features.write) - KNOWN_WRITE_FEATURES
    if unknown:
        raise NoRepository(
            f"the repository needs features that this program does not know: {', '.join(sorted(unknown))}",
            hint="use a newer imager",
        )
