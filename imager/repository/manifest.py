"""The manifest of an image set, as a value and as bytes.

Invariant: a `Manifest` that was decoded had a whole seal, the id of its
name, this repository's id, known features, and numbers within bounds. Its
digest is that of the very bytes in the storage.
"""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from imager import _native
from imager.errors import IntegrityError, NoRepository, WrongKey
from imager.repository import keys, writers
from imager.repository.format import (
    ABORT_MAGIC,
    ENVELOPE,
    KNOWN_SET_FEATURES,
    MAX_JSON,
    MAX_PACK,
    MAX_PAGE,
    PAGE_SLOTS,
    RECORD_HEAD,
    SET_MAGIC,
    VERSION,
    AbortMark,
    Certificate,
    canonical,
    is_block_size,
    is_id,
    is_pack_name,
    lineage_id,
    parse,
    shape,
    unhex,
)

if TYPE_CHECKING:
    from imager.repository.repository import Repository

_FRAME = struct.Struct("<8sII")
_SEAL = 64
MAX_MANIFEST = _FRAME.size + 2 * MAX_JSON + _SEAL
STRATEGIES = ("full", "incremental", "differential")


class Root(msgspec.Struct, frozen=True):
    """Where the root page of an image's block map lies; `pack` and `id` in hexadecimal."""

    pack: str
    offset: int
    length: int
    id: str
    level: int


class Previous(msgspec.Struct, frozen=True):
    """The set before in the lineage, and the digest of its whole manifest."""

    set: str
    digest: str


class Public(msgspec.Struct, frozen=True, omit_defaults=True):
    """What of a manifest is readable without a key. `writer`: who signed it, if not the repository's key."""

    repository: str
    set: str
    version: int
    features: tuple[str, ...]
    created: int
    lineage: str
    sequence: int
    previous: Previous | None
    envelope: str | None
    roots: tuple[Root | None, ...]
    writer: Certificate | None = None


class Image(msgspec.Struct, frozen=True):
    """One disk of a set. Sizes in bytes; `unreadable` as (start, length); `root` None for an empty image."""

    disk: str
    size: int
    block_size: int
    unreadable: tuple[tuple[int, int], ...] = ()
    source: Any = None
    layout: Any = None
    root: Root | None = None

    @property
    def blocks(self) -> int:
        """Number of blocks, the last one perhaps shorter."""
        return -(-self.size // self.block_size)


class Body(msgspec.Struct, frozen=True):
    """What of a manifest is sealed. Times in microseconds since 1970-01-01 UTC."""

    name: str
    host: str
    images: tuple[Image, ...]
    strategy: str = "full"
    base: str | None = None
    changes: Any = None
    stats: dict[str, Any] = {}
    tags: tuple[str, ...] = ()
    started: int = 0
    finished: int = 0
    tool: str = ""
    lost: str = ""
    "Digest of the names of the packs that were missing when it was made; it refers to none of them."


class Manifest(Struct, frozen=True):
    """An image set. `body` is None where the key cannot read it; `size`: of the manifest, in bytes."""

    public: Public
    body: Body | None
    digest: bytes
    size: int

    @property
    def id(self) -> str:
        """The set's id, 32 hexadecimal digits."""
        return self.public.set

    @property
    def created(self) -> int:
        """When it was made, microseconds since 1970-01-01 UTC."""
        return self.public.created

    @property
    def lineage(self) -> str:
        """The id of its lineage."""
        return self.public.lineage

    @property
    def sequence(self) -> int:
        """Its number in the lineage, from 1."""
        return self.public.sequence

    @property
    def previous(self) -> Previous | None:
        """The set before it in the lineage."""
        return self.public.previous

    @property
    def envelope(self) -> bytes | None:
        """The session key of its body, sealed."""
        return bytes.fromhex(self.public.envelope) if self.public.envelope else None

    @property
    def content(self) -> Body:
        """The body. Raises `WrongKey` where this key cannot read it."""
        if self.body is None:
            raise WrongKey(
                f"this key cannot read image set {self.id[:8]}",
                hint="a key of role write reads nothing, one from before a rotation no later set: "
                "imager key list shows what there is",
            )
        return self.body

    @property
    def images(self) -> tuple[Image, ...]:
        """Its disks. Raises `WrongKey`."""
        return self.content.images

    @property
    def name(self) -> str:
        """Name of the lineage. Raises `WrongKey`."""
        return self.content.name


def root_level(blocks: int) -> int:
    """The level of the root page of an image of so many blocks (at least one)."""
    level, covered = 0, PAGE_SLOTS
    while covered < blocks:
        level, covered = level + 1, covered * PAGE_SLOTS
    return level


def is_abort_mark(raw: bytes) -> bool:
    """Whether what lies at a set's place says that its session was declared dead."""
    return raw[:8] == ABORT_MAGIC


def parse_abort_mark(raw: bytes) -> AbortMark:
    """The mark of an aborted session. Raises `IntegrityError`."""
    try:
        return msgspec.json.decode(raw[8:], type=AbortMark)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise IntegrityError(f"the mark of an aborted session is damaged: {error}") from error


# --- encoding ------------------------------------------------------------------------


def encode(repository: Repository, public: Public, body: Body, session_key: bytes | None) -> bytes:
    """The bytes of a manifest, signed by the key that opened the repository: who that is, it says itself.

    `session_key`: of `public.envelope`, None without encryption.

    The roots come from `public`; those of the body's images are left out.
    Raises ValueError where the two do not fit together: a defect of the caller.
    """
    writer = repository.secrets.writer
    if public.writer != writer:
        public = msgspec.structs.replace(public, writer=writer)
    problem = _misfit(public, body)
    if problem:
        raise ValueError(problem)
    value = msgspec.to_builtins(body, builtin_types=(bytes,))
    for image in value["images"]:
        del image["root"]
    head = canonical(public)
    stored = zlib.compress(canonical(value), 6)
    if session_key is not None:
        stored = keys.seal_body(session_key, stored, head)
    signed = _FRAME.pack(SET_MAGIC, len(head), len(stored)) + head + stored
    message = _native.blake3(b"imager set v1" + signed)
    if repository.sealed:
        return signed + keys.sign(repository.secrets.signing_seed, message)
    return signed + message + bytes(32)


# --- decoding ------------------------------------------------------------------------

_PUBLIC = msgspec.json.Decoder(Public)


def parse_public(raw: bytes, set_id: str, repository: str) -> Public:
    """The public part of the object `sets/<set_id>`; its seal is not checked. Raises `IntegrityError`."""
    what = f"image set {set_id}"
    if len(raw) < _FRAME.size + _SEAL:
        raise IntegrityError(f"{what} is damaged: its manifest is cut short")
    magic, head, stored = _FRAME.unpack_from(raw)
    if magic != SET_MAGIC or len(raw) != _FRAME.size + head + stored + _SEAL:
        raise IntegrityError(f"{what} is damaged: its manifest has a wrong frame")
    try:
        public = _PUBLIC.decode(raw[_FRAME.size : _FRAME.size + head])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise IntegrityError(f"{what} is damaged: {error}") from error
    if public.repository != repository:
        raise IntegrityError(f"{what} belongs to another repository")
    if public.set != set_id:
        raise IntegrityError(
            f"{what} is not what its name says: it is a copy of image set {public.set}",
            hint="somebody may have swapped manifests",
        )
    return public


def decode(repository: Repository, set_id: str, raw: bytes) -> Manifest:
    """The manifest of the object `sets/<set_id>`, checked as far as the key allows.

    Raises `IntegrityError`, `NoRepository` for features of the future.
    """
    what = f"image set {set_id}"
    if is_abort_mark(raw):
        raise IntegrityError(f"{what} does not exist: its session was aborted")
    public = parse_public(raw, set_id, repository.config.repository)
    fault = seal_problem(repository, public, raw)
    if fault:
        raise IntegrityError(f"{what} {fault}", hint="imager list shows the other image sets")
    if public.version != VERSION or not KNOWN_SET_FEATURES.issuperset(public.features):
        raise NoRepository(
            f"{what} needs features that this program does not know", hint="use a newer imager"
        )
    head = raw[_FRAME.size : _FRAME.size + _FRAME.unpack_from(raw)[1]]
    stored = raw[_FRAME.size + len(head) : -_SEAL]
    parse(head, what, MAX_JSON)
    body = _decode_body(repository, public, head, stored, what)
    problem = _misfit(public, body) or _lineage_misfit(repository, public, body)
    if problem:
        raise IntegrityError(f"{what} is damaged: {problem}")
    return Manifest(public, body, _native.blake3(raw), len(raw))


def is_sealed(repository: Repository, raw: bytes) -> bool:
    """Whether a manifest's bytes are those that a writer of this repository sealed."""
    try:
        public = _PUBLIC.decode(raw[_FRAME.size : _FRAME.size + _FRAME.unpack_from(raw)[1]])
    except (msgspec.DecodeError, UnicodeError, RecursionError, struct.error):
        return False
    return seal_problem(repository, public, raw) is None


def seal_problem(repository: Repository, public: Public, raw: bytes) -> str | None:
    """Why a manifest's seal does not count (what follows "image set 12ab"); None where it does."""
    fault = signature_problem(repository, public, raw)
    if fault is None and public.writer is not None and is_revoked(repository, public, raw):
        return f"is signed by the key of writer {public.writer.label}, which had been revoked"
    return fault


def is_revoked(repository: Repository, public: Public, raw: bytes) -> bool:
    """Whether a set is by a writer that was revoked, and not among those of it that still count."""
    kept = repository.revoked().get(public.writer.writer) if public.writer is not None else None
    return kept is not None and _native.blake3(raw) not in kept


def signature_problem(repository: Repository, public: Public, raw: bytes) -> str | None:
    """As `seal_problem`, but for revocations: whether the signature is that of somebody who may sign."""
    message = _native.blake3(b"imager set v1" + raw[:-_SEAL])
    foreign = "is damaged or was replaced: its manifest's seal is not by this repository"
    if not repository.sealed:
        return None if raw[-_SEAL:] == message + bytes(32) else foreign
    signer, writer = repository.verify_key, public.writer
    if writer is not None:
        if not writers.is_certified(repository.id, signer, writer):
            return "is signed by a writer that this repository never certified"
        signer = bytes.fromhex(writer.public)
    return None if keys.is_signed(signer, raw[-_SEAL:], message) else foreign


def _lineage_misfit(repository: Repository, public: Public, body: Body | None) -> str | None:
    """Why a certified writer had no right to make this set, as far as the key can tell."""
    writer = public.writer
    if writer is None or body is None:
        return None
    if writer.host not in (writers.ANY_HOST, body.host):
        return f"writer {writer.label} may sign sets of {writer.host}, and this one is of {body.host}"
    if lineage_id(repository.secrets.id_key, body.host, body.name).hex() != public.lineage:
        return "its lineage is not that of its name and host"
    return None


def _decode_body(
    repository: Repository, public: Public, head: bytes, stored: bytes, what: str
) -> Body | None:
    if repository.sealed:
        if public.envelope is None:
            raise IntegrityError(f"{what} is damaged: it names no session key")
        envelope = unhex(public.envelope, ENVELOPE, what)
        if envelope[8:24].hex() != public.set:
            raise IntegrityError(f"{what} is damaged: its envelope is that of another session")
        if not repository.can_open(envelope):
            return None  # A key that can write only, or one from before a rotation.
        plain = keys.open_body(repository.open_envelope(envelope)[1], stored, head)
        if plain is None:
            raise IntegrityError(f"{what} is damaged: its body does not open")
        stored = plain
    try:
        inflate = zlib.decompressobj()
        packed = inflate.decompress(stored, MAX_JSON + 1)
    except zlib.error as error:
        raise IntegrityError(f"{what} is damaged: {error}") from error
    if len(packed) > MAX_JSON or not inflate.eof or inflate.unused_data:
        raise IntegrityError(f"{what} is damaged: its body is too large, cut short, or followed by something")
    body = shape(parse(packed, what, MAX_JSON), Body, what)
    if len(body.images) != len(public.roots):
        raise IntegrityError(f"{what} is damaged: it has {len(body.images)} disks, {len(public.roots)} maps")
    images = tuple(
        msgspec.structs.replace(image, root=root)
        for image, root in zip(body.images, public.roots, strict=True)
    )
    return msgspec.structs.replace(body, images=images)


def _misfit(public: Public, body: Body | None) -> str | None:
    """Why a manifest's numbers cannot be; None where they are within bounds."""
    if not is_id(public.set) or len(public.lineage) != 32 or public.sequence < 1:
        return "its id, lineage or sequence cannot be"
    if (public.previous is None) != (public.sequence == 1):
        return "its sequence does not fit the set before it"
    for root in public.roots:
        if root is not None and not (
            is_pack_name(root.pack)
            and is_pack_name(root.id)
            and 0 < root.offset <= MAX_PACK
            and RECORD_HEAD < root.length <= RECORD_HEAD + MAX_PAGE
            and 0 <= root.level <= 7
        ):
            return "the place of a block map cannot be"
    if body is None:
        return None
    if len(body.images) != len(public.roots):
        return "it has not one block map for each disk"
    if len({image.disk for image in body.images}) != len(body.images):
        return "two of its disks have one name"
    for image, root in zip(body.images, public.roots, strict=True):
        problem = _image_misfit(image, root)
        if problem:
            return f"disk {image.disk}: {problem}"
    return None


def _image_misfit(image: Image, root: Root | None) -> str | None:
    if not is_block_size(image.block_size) or not 0 <= image.size < 1 << 63:
        return "its size or block size cannot be"
    if (root is None) != (image.size == 0):
        return "an image has a block map unless it is empty"
    if root is not None and root.level != root_level(image.blocks):
        return "its block map has a height that does not fit its size"
    end = 0
    for start, length in image.unreadable:
        if start < end or length <= 0 or start + length > image.size:
            return "its unreadable extents are out of order or beyond its end"
        end = start + length
    return None
