"""Read an image back from a repository, written from docs/design/repository-format.md alone.

    python -m imager.reference REPO SET OUT [--disk NAME]

Invariant: nothing that the repository says is believed before it is checked. Every length meets its bound
before memory is reserved for it, and a block reaches the output only after its content gave its id.

It is the tests' oracle, and the way out if the rest of the project is lost, so it shares no code with it. Its
sections are named after those of the format page. It never writes to a repository.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import stat
import struct
import sys
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import lz4.block
import xxhash
from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
JSON_MAX, PACK_MAX, PAGE_MAX, BLOCK_MIN, BLOCK_MAX = 64 * MIB, 4 * GIB - 1, 64 * KIB, 4 * KIB, 4 * MIB
SIZE_MAX = (1 << 63) - 1
BLOCK, PAGE = 1, 2  # kinds of record, and of the packs that hold them
ENVELOPE, HEAD, ENTRY, FOOTER = 104, 64, 96, 32
SELF = bytes(32)  # a pack's name within itself

Json = dict[str, Any]


class ReadError(Exception):
    """The image cannot be read. `code` is the exit code of the command."""

    code = 1


class UsageError(ReadError):
    """No such set or disk, or several."""

    code = 2


class NoRepository(ReadError):
    """There is no repository here, or it (or a set) needs what this reader does not know."""

    code = 10


class WrongKey(ReadError):
    """No slot opens with what was given, or what it holds does not open this set."""

    code = 12


class Damaged(ReadError):
    """Stored data is not what was stored."""

    code = 30


def need(condition: bool, fault: str) -> None:
    """Raise `Damaged` unless the condition holds."""
    if not condition:
        raise Damaged(fault)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """What fails in here is damage of `what`: so parsers can take things at their word, and be refuted."""
    try:
        yield
    except Damaged as error:
        raise Damaged(f"{what}: {error}") from None
    except (InvalidSignature, InvalidTag):
        raise Damaged(f"{what}: signature or key do not fit; damaged, or of another repository") from None
    except (
        AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error, zlib.error,
        lz4.block.LZ4BlockError,
    ) as error:  # fmt: skip
        raise Damaged(f"{what} is malformed ({type(error).__name__}: {str(error)[:200]})") from None


# 1. Conventions -------------------------------------------------------------------------------------


def b3(data: bytes) -> bytes:
    """BLAKE3-256."""
    return blake3(data).digest()


def b3k(key: bytes, data: bytes) -> bytes:
    """BLAKE3-256 keyed with 32 bytes."""
    return blake3(data, key=key).digest()


def b3d(context: str, data: bytes) -> bytes:
    """BLAKE3-256 in key derivation mode."""
    return blake3(data, derive_key_context=context).digest()


def xxh3(data: bytes) -> int:
    """XXH3-64 with seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def canonical(value: object) -> bytes:
    """Canonical JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def parse_json(data: bytes) -> Json:
    """The object that `data` is the canonical JSON of. Raises `Damaged` for anything else."""
    need(len(data) <= JSON_MAX, "larger than 64 MiB")
    with reading("JSON"):
        value = json.loads(data.decode(), parse_float=unhex, parse_constant=unhex)  # neither is allowed
        need(isinstance(value, dict) and canonical(value) == data, "not an object in canonical form")
        return dict(value)


def unhex(value: str, size: int | None = None) -> bytes:
    """Bytes written in lower-case hexadecimal, `size` of them (None: any number)."""
    data = bytes.fromhex(value)
    need(data.hex() == value and size in (None, len(data)), f"{value[:100]!r} is not {size} bytes")
    return data


def number(value: object, low: int, high: int) -> int:
    """An integer from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise Damaged(f"{str(value)[:100]} is not a number from {low} to {high}")
    return value


def block_length(value: object) -> int:
    """A block size."""
    size = number(value, BLOCK_MIN, BLOCK_MAX)
    need(size & (size - 1) == 0, f"{size} is not a power of two")
    return size


def known(features: object) -> None:
    """Refuse a list of features that names any: version 1 defines none."""
    need(isinstance(features, list), "the features are not a list")
    if features:
        raise NoRepository(f"features {str(features)[:100]} are needed, which this reader does not know")


# 3. config, 4. Secrets ------------------------------------------------------------------------------


class Config(NamedTuple):
    """What the repository is. `key` is the key of ids (not sealed) or of signatures (sealed).

    `revoked`: ids of writers whose key was revoked, and the digests of their sets that still count.
    """

    repository: bytes
    sealed: bool
    block_size: int
    key: bytes
    revoked: dict[bytes, set[bytes]] = {}


class Secrets(NamedTuple):
    """What reading takes: the key of ids, and the private key of each epoch."""

    id_key: bytes
    epochs: dict[int, bytes]


@reading("config")
def parse_config(data: bytes) -> Config:
    """Parse and verify the object `config`."""
    obj = parse_json(data)
    if obj["format"] != "imager" or obj["version"] != 1:
        raise NoRepository("config is not that of an imager repository of version 1")
    known(obj["features"]["read"])
    need(obj["encryption"] in ("sealed", "none"), "the encryption is unknown")
    sealed, seal = obj["encryption"] == "sealed", unhex(obj.pop("seal"))
    key = unhex(obj["verify_key" if sealed else "id_key"], 32)
    digest = b3(b"imager config v1" + canonical(obj))
    if sealed:
        Ed25519PublicKey.from_public_bytes(key).verify(seal, digest)
    need(sealed or seal == digest, "the seal is wrong")
    block_size = number(obj["block_size"], 0, BLOCK_MAX) and block_length(obj["block_size"])
    return Config(unhex(obj["repository"], 16), sealed, block_size, key)


def parse_recovery_key(text: str) -> bytes:
    """The 20 bytes of a recovery key as typed. Raises `UsageError` that names the first wrong group."""
    alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    plain = re.sub("[-–—_ \\t\\r\\n]", "", text).upper().translate(str.maketrans("OIL", "011"))
    if len(plain) != 40:
        raise UsageError(f"a recovery key has 40 characters, not {len(plain)}")
    value = 0
    for group in range(8):
        *digits, check = (alphabet.find(character) for character in plain[group * 5 : group * 5 + 5])
        total = group + 1
        for digit in (*digits, 0):
            total = total << 1 ^ (0b100101 if total & 16 else 0) ^ digit  # times x in GF(32), plus the digit
            value = value << 5 | digit if digit >= 0 else value
        value >>= 5  # the check character's place
        if min(digits) < 0 or total != check:
            raise UsageError(f"the recovery key is typed wrong: look at group {group + 1} of 8")
    return value.to_bytes(20, "big")


def open_slot(
    data: bytes,
    slot: bytes,
    config: Config,
    passphrase: bytes | None,
    keyfile: bytes | None,
    recovery: bytes | None = None,
) -> Secrets | None:
    """Open `slots/<slot>` with the passphrase (NFC, UTF-8), keyfile or recovery key; None: it does not."""
    with reading(f"slot {slot.hex()}"):
        obj = parse_json(data)
        need((unhex(obj["slot"]), unhex(obj["repository"])) == (slot, config.repository), "of another place")
        kind, role, kdf, nonce = obj["kind"], obj["role"], obj["kdf"], unhex(obj["nonce"], 12)
        need(kind in ("passphrase", "keyfile", "recovery"), "unknown kind")
        need(role in ("full", "read", "write"), "unknown role")
        need(kdf["name"] == ("argon2id" if kind == "passphrase" else "blake3"), "unknown key derivation")
        salt = unhex(kdf["salt"], 16)
        if kind == "passphrase":
            lanes, passes = number(kdf["lanes"], 1, 16), number(kdf["passes"], 1, 16)
            memory = number(kdf["memory_kib"], 8 * lanes, GIB // KIB)
            if passphrase is None:
                return None
            kdf = Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory)
            kek = kdf.derive(passphrase)
        else:
            secret = recovery if kind == "recovery" else keyfile
            if secret is None:
                return None
            kek = b3d("imager 2026-11 keyfile slot v1", salt + secret)
        extra = b"imager slot v1" + config.repository + slot + kind.encode() + b"\0" + role.encode()
        try:
            secrets = parse_json(AESGCM(kek).decrypt(nonce, unhex(obj["sealed"]), extra))
        except InvalidTag:
            return None
        if role == "full":
            seed = Ed25519PrivateKey.from_private_bytes(unhex(secrets["signing_seed"], 32))
            verify_key = seed.public_key().public_bytes_raw()
        else:
            verify_key = unhex(secrets["verify_key"], 32)
        need(verify_key == config.key, "config has the verify_key of someone else")
        need((role == "write") == (not secrets["epochs"]), "the keys are those of another role")
        epochs = {number(int(n), 1, 0xFFFFFFFF): unhex(key, 32) for n, key in secrets["epochs"].items()}
        return Secrets(unhex(secrets["id_key"], 32), epochs)


@reading("envelope")
def open_envelope(envelope: bytes, config: Config, secrets: Secrets) -> tuple[int, bytes, bytes]:
    """Cipher, session key and session id of an envelope."""
    cipher, version, reserved, epoch = struct.unpack_from("<BBHI", envelope)
    need(cipher in (1, 2) and (version, reserved) == (1, 0) and len(envelope) == ENVELOPE, "unknown version")
    if epoch not in secrets.epochs:
        raise WrongKey(f"the key given cannot read what was written in key epoch {epoch}")
    private, ephemeral = X25519PrivateKey.from_private_bytes(secrets.epochs[epoch]), envelope[24:56]
    shared = private.exchange(X25519PublicKey.from_public_bytes(ephemeral))
    public = private.public_key().public_bytes_raw()
    wrap = b3d("imager 2026-11 session key v1", shared + ephemeral + public + config.repository)
    return cipher, AESGCM(wrap).decrypt(bytes(12), envelope[56:], envelope[:56]), envelope[8:24]


# 5. Packs -------------------------------------------------------------------------------------------


class Head(NamedTuple):
    """Head of a record."""

    magic: bytes
    kind: int
    codec: int
    envelope: int
    plain_length: int
    payload_length: int
    id: bytes
    nonce: bytes
    checksum: int


class Target(NamedTuple):
    """Where a record is (a hint), and its id (the truth)."""

    pack: bytes
    offset: int
    length: int
    id: bytes


@reading("pack header")
def header_length(start: bytes) -> int:
    """Length of a pack's header, from its first 64 bytes."""
    length, count = struct.unpack_from("<I", start, 12)[0], struct.unpack_from("<H", start, 56)[0]
    need(start[:8] == b"IMGRPACK" and count <= 1024 and length == 72 + ENVELOPE * count, "not a header")
    return int(length)


@reading("pack header")
def parse_header(header: bytes, kind: int, repository: bytes) -> list[bytes]:
    """Check the header of a pack of `kind`, and give its envelopes."""
    need(header_length(header) == len(header), "cut off")
    need(xxh3(header[:-8]) == int.from_bytes(header[-8:], "little"), "wrong checksum")
    need(header[8:12] == bytes((1, 0, kind, 0)) and header[58:64] == bytes(6), "unknown version or kind")
    need(header[16:32] == repository, "of another repository")
    return [header[at : at + ENVELOPE] for at in range(64, len(header) - 8, ENVELOPE)]


@reading("record head")
def parse_head(data: bytes) -> Head:
    """Parse the head of a record; its lengths are within their bounds."""
    head = Head._make(struct.unpack("<4sBBHII32s12sI", data))
    need(head.magic == b"IREC" and head.checksum == xxh3(data[:60]) & 0xFFFFFFFF, "wrong checksum")
    need(head.kind in (BLOCK, PAGE) and head.codec <= (2 if head.kind == BLOCK else 0), "unknown kind")
    number(head.plain_length, 1, BLOCK_MAX if head.kind == BLOCK else PAGE_MAX)
    number(head.payload_length, 0, head.plain_length + 64 * KIB if head.kind == BLOCK else PAGE_MAX)
    return head


@reading("pack trailer")
def parse_trailer(header: bytes, tail: bytes, name: bytes) -> list[tuple[int, Head, bytes]]:
    """Offset, head and `B3(payload)` of each record. `tail` is the pack from its trailer to its end."""
    magic, count, size, start, checksum = struct.unpack("<8sIIQQ", tail[-FOOTER:])
    need(magic == b"IMGRTAIL" and size == ENTRY and checksum == xxh3(tail[-FOOTER:-8]), "wrong footer")
    need(len(tail) == ENTRY * count + FOOTER, "wrong length")
    need(b3(b"imager pack v1" + header + tail) == name, "the pack's name is not that of its content")
    records, offset = [], len(header)
    for at in range(0, ENTRY * count, ENTRY):
        head = parse_head(tail[at : at + HEAD])
        records.append((offset, head, tail[at + HEAD : at + ENTRY]))
        offset += HEAD + head.payload_length
    need(offset == start, "the records do not fill the pack")
    return records


@reading("block content")
def decode(codec: int, data: bytes, size: int) -> bytes:
    """Decode content of `size` bytes; never reserves more."""
    if codec == 1:
        data = lz4.block.decompress(data, uncompressed_size=size)
    elif codec == 2:
        try:
            import zstandard
        except ImportError:
            raise ReadError("the set is compressed with Zstandard: install the package 'zstandard'") from None
        try:
            frame = zstandard.ZstdDecompressor(max_window_size=8 * MIB).stream_reader(data)
            data = frame.read(size + 1)
        except zstandard.ZstdError as error:
            raise Damaged(str(error)) from None
    need(len(data) == size, "another length than stated")
    return data


# 6. The block map -----------------------------------------------------------------------------------


def top_level(blocks: int) -> int:
    """Level of the root: the smallest whose one page covers all the blocks."""
    return next(level for level in range(8) if 256 ** (level + 1) >= blocks)


@reading("map page")
def parse_page(
    public: bytes, sealed: bytes, level: int, first: int, slots: int, pack: bytes
) -> list[tuple[int, list[Target]]]:
    """Runs of the page for `slots` slots from block `first` on, read from `pack`: number of slots, targets.

    A run without targets reads as zeroes.
    """
    found, version, packs, count, reserved = struct.unpack_from("<BBHHH", public)
    need((version, reserved) == (1, 0) and packs <= 512 and count <= 512, "unknown version")
    need(len(public) == 8 + 32 * packs + 42 * count, "wrong length")
    need(found == level and struct.unpack_from("<QH", sealed) == (first, slots), "belongs elsewhere")
    names = [public[at : at + 32] for at in range(8, 8 + 32 * packs, 32)]
    entries = [struct.unpack_from("<HII32s", public, 8 + 32 * packs + 42 * i) for i in range(count)]
    need(all(a < b for a, b in pairwise(names)), "packs out of order")
    need(all(a[:2] < b[:2] for a, b in pairwise(entries)), "targets out of order")
    need(level > 0 or SELF not in names, "level 0 refers to its own pack")
    targets = [Target(names[n] if names[n] != SELF else pack, *rest) for n, *rest in entries]
    runs, at, used = [], 10, 0
    while used < slots:
        kind, length = sealed[at], sealed[at + 1] + 1
        need(kind <= 3, "unknown type of run")
        numbers = struct.unpack_from(f"<{length}H", sealed, at + 2) if kind == 3 else ()
        runs.append((length, [targets[n] for n in numbers]))
        at += 2 + 2 * len(numbers)
        used += length
    need(used == slots and at == len(sealed), "the runs do not fill it")
    return runs


# 8. Manifests ---------------------------------------------------------------------------------------


class Manifest(NamedTuple):
    """An image set, verified; its body is not yet opened."""

    set: bytes
    public: Json
    public_bytes: bytes
    body: bytes


class Image(NamedTuple):
    """One disk of an image set; `unreadable` in bytes. No root: 0 bytes."""

    disk: str
    size: int
    block_size: int
    unreadable: int
    root: Target | None


def signer(writer: Json | None, data: bytes, config: Config) -> bytes:
    """The public key that must have signed a manifest: the repository's, or that of a certified writer."""
    if writer is None:
        return config.key
    public = unhex(writer["public"], 32)
    bare = {key: writer[key] for key in ("host", "label", "public", "writer")}
    digest = b3(b"imager writer v1" + config.repository + canonical(bare))
    Ed25519PublicKey.from_public_bytes(config.key).verify(unhex(writer["signature"], 64), digest)
    kept = config.revoked.get(unhex(writer["writer"], 16))
    need(kept is None or b3(data) in kept, "its writer's key was revoked before the set was made")
    return public


@reading("revocation")
def parse_revocation(data: bytes, writer: bytes, config: Config) -> set[bytes]:
    """The digests of the sets that `revoked/<writer>` lets count."""
    obj = parse_json(data)
    digest = b3(b"imager revocation v1" + canonical({key: obj[key] for key in obj if key != "signature"}))
    Ed25519PublicKey.from_public_bytes(config.key).verify(unhex(obj["signature"], 64), digest)
    need((unhex(obj["writer"]), unhex(obj["repository"])) == (writer, config.repository), "of another place")
    return {unhex(one, 32) for one in obj["sets"]}


def parse_manifest(data: bytes, set_id: bytes, config: Config) -> Manifest:
    """Verify `sets/<set id>` and parse its public part."""
    with reading(f"set {set_id.hex()}"):
        magic, length, stored = struct.unpack_from("<8sII", data)
        need(magic == b"IMGRSET1" and 80 + length + stored == len(data), "not a manifest, or cut off")
        digest = b3(b"imager set v1" + data[:-64])
        public = parse_json(data[16 : 16 + length])
        if config.sealed:
            Ed25519PublicKey.from_public_bytes(signer(public.get("writer"), data, config)).verify(
                data[-64:], digest
            )
        need(config.sealed or data[-64:] == digest + bytes(32), "wrong checksum")
        if public["version"] != 1:
            raise NoRepository(f"set {set_id.hex()} is of a version that this reader does not know")
        known(public["features"])
        ids = unhex(public["set"]), unhex(public["repository"])
        need(ids == (set_id, config.repository), "of another place")
        number(public["created"], 0, SIZE_MAX)
        number(public["sequence"], 1, SIZE_MAX)
        return Manifest(set_id, public, data[16 : 16 + length], data[16 + length : -64])


def open_body(manifest: Manifest, config: Config, secrets: Secrets) -> Json:
    """Decrypt and decompress the body of a manifest."""
    with reading(f"body of set {manifest.set.hex()}"):
        body, envelope = manifest.body, manifest.public["envelope"]
        need(config.sealed or envelope is None, "an envelope, where nothing is encrypted")
        if config.sealed:
            _, key, session = open_envelope(unhex(envelope, ENVELOPE), config, secrets)
            need(session == manifest.set, "the envelope is that of another session")
            cipher = AESGCM(b3d("imager 2026-11 manifest body v1", key))
            body = cipher.decrypt(body[:12], body[12:], manifest.public_bytes)
        stream = zlib.decompressobj()
        plain = stream.decompress(body, JSON_MAX + 1)
        need(stream.eof and not stream.unused_data, "cut off, too large, or followed by something")
        value = parse_json(plain)
        writer = manifest.public.get("writer")
        if config.sealed and writer is not None:
            need(writer["host"] in ("*", value["host"]), "its writer may not sign sets of this host")
            key = b3d("imager 2026-11 lineage v1", secrets.id_key)
            names = canonical([value["host"], value["name"]])
            need(b3k(key, names)[:16].hex() == manifest.public["lineage"], "it is of another lineage")
        return value


def parse_images(manifest: Manifest, body: Json, config: Config) -> list[Image]:
    """The images of a set."""
    images = []
    with reading(f"set {manifest.set.hex()}"):
        for obj, root in zip(body["images"], manifest.public["roots"], strict=True):
            size, block_size = number(obj["size"], 0, SIZE_MAX), block_length(obj["block_size"])
            need(config.block_size in (0, block_size), "the block size is not that of the repository")
            need((root is None) == (size == 0) and isinstance(obj["disk"], str), "no root, or no disk")
            target = None
            if root is not None:
                level = top_level(-(-size // block_size))
                number(root["level"], level, level)
                offset, length = number(root["offset"], 0, PACK_MAX), number(root["length"], 0, PACK_MAX)
                target = Target(unhex(root["pack"], 32), offset, length, unhex(root["id"], 32))
            unreadable = sum(number(n, 0, size - number(start, 0, size)) for start, n in obj["unreadable"])
            images.append(Image(obj["disk"], size, block_size, unreadable, target))
    return images


# 2. Objects, in a folder ----------------------------------------------------------------------------


class Repository:
    """An open repository: `config` and `secrets` of the folder `root`."""

    def __init__(
        self,
        root: str,
        passphrase: str | None = None,
        keyfile: bytes | None = None,
        recovery: bytes | None = None,
    ) -> None:
        """Open it. Raises `NoRepository`, `WrongKey`, `Damaged`."""
        self.root = root
        try:
            self.config = parse_config(self.load("config", JSON_MAX))
        except FileNotFoundError:
            raise NoRepository(f"there is no repository at {root!r}: it has no file 'config'") from None
        if self.config.sealed:
            secret = None if passphrase is None else unicodedata.normalize("NFC", passphrase).encode()
            self.secrets = self._unlock(secret, keyfile, recovery)
            self.config = self.config._replace(revoked=self._revoked())
        else:
            self.secrets = Secrets(self.config.key, {})
        self.page_key = b3d("imager 2026-11 map page v1", self.secrets.id_key)
        self._envelopes: dict[bytes, list[bytes]] = {}  # of each pack
        self._session_keys: dict[bytes, tuple[int, bytes, bytes]] = {}  # of each envelope
        self._places: dict[tuple[int, bytes], list[Target]] | None = None

    def _revoked(self) -> dict[bytes, set[bytes]]:
        found = {}
        for writer in self.names("revoked", 16):
            try:
                found[writer] = parse_revocation(
                    self.load(f"revoked/{writer.hex()}", JSON_MAX), writer, self.config
                )
            except Damaged:
                continue  # Anybody can put one there; it counts only if the repository's key signed it.
        return found

    def _unlock(self, passphrase: bytes | None, keyfile: bytes | None, recovery: bytes | None) -> Secrets:
        if passphrase is None and keyfile is None and recovery is None:
            raise WrongKey(
                "the repository is encrypted: give IMAGER_PASSPHRASE, IMAGER_KEYFILE or IMAGER_RECOVERY_KEY"
            )
        damage: Damaged | None = None
        opened: list[Secrets] = []
        for slot in self.names("slots", 16):
            try:
                data = self.load(f"slots/{slot.hex()}", JSON_MAX)
                secrets = open_slot(data, slot, self.config, passphrase, keyfile, recovery)
            except Damaged as error:
                damage = error
                continue
            if secrets is not None:
                opened.append(secrets)
        if opened:
            return max(opened, key=lambda secrets: len(secrets.epochs))  # one may be from before a rotation
        raise damage or WrongKey("no key slot opens with the passphrase or keyfile given")

    def names(self, folder: str, size: int) -> list[bytes]:
        """The names in a folder that are `size` bytes in hexadecimal."""
        try:
            names = os.listdir(os.path.join(self.root, folder))
        except FileNotFoundError:
            return []
        return sorted(bytes.fromhex(name) for name in names if re.fullmatch(f"[0-9a-f]{{{2 * size}}}", name))

    def load(self, name: str, limit: int, offset: int = 0, length: int | None = None) -> bytes:
        """An object of at most `limit` bytes, or `length` of its bytes (fewer where it ends before)."""
        descriptor = os.open(os.path.join(self.root, name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            need(stat.S_ISREG(status.st_mode), f"{name} is not a file")
            need(status.st_size <= limit, f"{name} is too large")
            rest = max(0, status.st_size - offset)
            return os.pread(descriptor, rest if length is None else min(rest, length), offset)
        finally:
            os.close(descriptor)

    def manifest(self, set_id: bytes) -> Manifest | None:
        """A set's manifest, verified. None: there is none, or the mark of an aborted session."""
        try:
            data = self.load(f"sets/{set_id.hex()}", 2 * JSON_MAX)
        except FileNotFoundError:
            return None
        return None if data[:8] == b"IMGRABRT" else parse_manifest(data, set_id, self.config)

    def resolve(self, text: str) -> Manifest:
        """The set that `text` means: a full id, `latest`, a name (its latest), or an id's unique start."""
        if re.fullmatch("[0-9a-f]{32}", text):
            exact = self.manifest(bytes.fromhex(text))
            if exact is not None:
                return exact
            raise UsageError(f"there is no image set {text}")
        found, fault = [], None
        for set_id in self.names("sets", 16):
            try:
                one = self.manifest(set_id)
                if one is None:
                    continue
                if text == "latest" or open_body(one, self.config, self.secrets).get("name") == text:
                    found.append(one)
            except (Damaged, WrongKey) as error:
                fault = error
        starts = [set_id for set_id in self.names("sets", 16) if text and set_id.hex().startswith(text)]
        if fault and (found or not starts):  # what cannot be read may be the one, or the latest
            raise type(fault)(f"which set is {text!r}? name it by its id, for one cannot be read: {fault}")
        if found:
            return max(found, key=lambda one: (one.public["created"], one.public["sequence"], one.set))
        sets = [one for one in map(self.manifest, starts) if one]
        if len(sets) != 1:
            what = "several image sets begin with" if sets else "there is no image set"
            raise UsageError(f"{what} {text!r}")
        return sets[0]

    def images(self, manifest: Manifest) -> list[Image]:
        """The images of a set."""
        return parse_images(manifest, open_body(manifest, self.config, self.secrets), self.config)

    def read(self, kind: int, target: Target) -> tuple[bytes, bytes, bytes]:
        """A record whose id is verified: public part (of a page), content, and the pack that it is in.

        Where the location does not hold it whole, the packs' trailers are searched for another copy.
        """
        try:
            return self._read_at(kind, target)
        except Damaged as error:
            for place in self.places(kind, target.id):
                try:
                    return self._read_at(kind, place)
                except Damaged:
                    continue
            name = f"{'block' if kind == BLOCK else 'map page'} {target.id.hex()}"
            where = f"pack {target.pack.hex()} at {target.offset}"
            raise Damaged(f"{name} is lost: {where}: {error}; and no pack has a whole copy") from None

    def _path(self, kind: int, pack: bytes) -> str:
        path = f"{'packs' if kind == BLOCK else 'maps'}/{pack.hex()[:2]}/{pack.hex()}"
        aside = os.path.join("damaged", path)
        lost = not os.path.lexists(os.path.join(self.root, path))
        return aside if lost and os.path.lexists(os.path.join(self.root, aside)) else path

    def _header(self, path: str) -> bytes:
        return self.load(path, PACK_MAX, 0, header_length(self.load(path, PACK_MAX, 0, 64)))

    def _read_at(self, kind: int, target: Target) -> tuple[bytes, bytes, bytes]:
        path, repository = self._path(kind, target.pack), self.config.repository
        try:
            if target.pack not in self._envelopes:
                self._envelopes[target.pack] = parse_header(self._header(path), kind, repository)
            data = self.load(path, PACK_MAX, target.offset, HEAD)
            head = parse_head(data)
            need((head.kind, head.id) == (kind, target.id), "another record stands there")
            need(target.length == HEAD + head.payload_length, "the record has another length")
            payload = self.load(path, PACK_MAX, target.offset + HEAD, head.payload_length)
        except FileNotFoundError:
            raise Damaged("the pack is missing") from None
        need(len(payload) == head.payload_length, "the pack is cut off")
        return *self._open(head, payload, self._envelopes[target.pack]), target.pack

    @reading("record")
    def _open(self, head: Head, payload: bytes, envelopes: list[bytes]) -> tuple[bytes, bytes]:
        """Public part and content of a record, once the content has given the id in the head."""
        public, prefix, key = b"", b"", self.secrets.id_key
        if head.kind == PAGE:
            length = 4 + struct.unpack_from("<I", payload)[0]
            need(length <= len(payload), "cut off")
            key, public, prefix = self.page_key, payload[4:length], payload[:length]
            payload = payload[length:]
        if self.config.sealed:
            envelope = envelopes[head.envelope]
            if envelope not in self._session_keys:
                self._session_keys[envelope] = open_envelope(envelope, self.config, self.secrets)
            cipher, session_key, _ = self._session_keys[envelope]
            extra = struct.pack("<BBI", head.kind, head.codec, head.plain_length) + head.id + public
            aead = (AESGCM if cipher == 1 else ChaCha20Poly1305)(b3k(session_key, head.id))
            payload = aead.decrypt(head.nonce, payload, self.config.repository + extra)
        else:
            need((head.envelope, head.nonce) == (0xFFFF, bytes(12)), "claims to be encrypted")
        content = decode(head.codec, payload, head.plain_length)
        need(b3k(key, prefix + content) == head.id, "the content has another id")
        return public, content

    def places(self, kind: int, id: bytes) -> list[Target]:
        """Where a record is, by the trailers of all packs, which are read once; damaged ones are left out."""
        if self._places is None:
            self._places = {}
            for sort, folder in ((BLOCK, "packs"), (PAGE, "maps")):
                for xx in self.names(folder, 1):
                    for pack in self.names(f"{folder}/{xx.hex()}", 32):
                        for place in self._records(sort, pack):
                            self._places.setdefault((sort, place.id), []).append(place)
        return self._places.get((kind, id), [])

    def _records(self, kind: int, pack: bytes) -> list[Target]:
        path = self._path(kind, pack)
        size = os.stat(os.path.join(self.root, path)).st_size
        try:
            start = int.from_bytes(self.load(path, PACK_MAX, max(0, size - 16), 8), "little")
            tail = self.load(path, PACK_MAX, min(start, size), size)
            records = parse_trailer(self._header(path), tail, pack)
        except Damaged:
            return []
        return [Target(pack, offset, HEAD + head.payload_length, head.id) for offset, head, _ in records]

    def blocks(self, image: Image) -> Iterator[tuple[int, bytes]]:
        """Offset and content of each block that has content, in order; all else reads as zeroes."""
        if image.root is not None:
            yield from self._walk(image, image.root, top_level(-(-image.size // image.block_size)), 0)

    def _walk(self, image: Image, page: Target, level: int, first: int) -> Iterator[tuple[int, bytes]]:
        span, blocks = 256**level, -(-image.size // image.block_size)
        public, sealed, pack = self.read(PAGE, page)
        slots = min(256, -(-(blocks - first) // span))
        for length, targets in parse_page(public, sealed, level, first, slots, pack):
            for block, target in zip(range(first, blocks, span), targets, strict=False):
                if level:
                    yield from self._walk(image, target, level - 1, block)
                else:
                    content, offset = self.read(BLOCK, target)[1], block * image.block_size
                    need(len(content) == min(image.block_size, image.size - offset), "wrong block length")
                    yield offset, content
            first += length * span


# The command ----------------------------------------------------------------------------------------


def write_image(repository: Repository, image: Image, out: str) -> None:
    """Write an image to the new file `out`, sparse. What could not be finished is removed."""
    with open(out, "xb", buffering=0) as file:
        try:
            for offset, content in repository.blocks(image):
                while content:
                    written = os.pwrite(file.fileno(), content, offset)
                    content, offset = content[written:], offset + written
            file.truncate(image.size)
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(out)
            raise


def read_image(root: str, text: str, out: str, disk: str | None = None) -> str:
    """Do what the command does, with the environment's secrets. The result is a line that tells of it."""
    path, keyfile = os.environ.get("IMAGER_KEYFILE"), None
    if path:
        with open(path, "rb") as file:
            keyfile = file.read(MIB + 1)
        if not 32 <= len(keyfile) <= MIB:
            raise UsageError(f"{path!r} is not a keyfile, which has 32 bytes to 1 MiB")
    text_key = os.environ.get("IMAGER_RECOVERY_KEY")
    recovery = parse_recovery_key(text_key) if text_key else None
    repository = Repository(root, os.environ.get("IMAGER_PASSPHRASE") or None, keyfile, recovery)
    manifest = repository.resolve(text)
    images = repository.images(manifest)
    chosen = [image for image in images if disk in (None, image.disk)]
    if len(chosen) != 1:
        names = ", ".join(repr(image.disk) for image in images)
        raise UsageError(f"name one disk of set {manifest.set.hex()} with --disk; it has: {names or 'none'}")
    write_image(repository, chosen[0], out)
    image = chosen[0]
    lost = f"; {image.unreadable} bytes were unreadable at backup and are zero" if image.unreadable else ""
    return f"set {manifest.set.hex()}, disk {image.disk!r}: {image.size} bytes, every id verified{lost}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; usage: python -m imager.reference REPO SET OUT [--disk NAME]")


def main(arguments: list[str]) -> int:
    """The command. Gives its exit code; an error is one line on standard error."""
    parser = _Parser(prog="python -m imager.reference", description="Read an image back from a repository.")
    for name in ("REPO", "SET", "OUT"):
        parser.add_argument(name)
    parser.add_argument("--disk", metavar="NAME")
    try:
        given = parser.parse_args(arguments)
        print(read_image(given.REPO, given.SET, given.OUT, given.disk), file=sys.stderr)
        return 0
    except ReadError as error:
        message, code = str(error), error.code
    except FileExistsError as error:
        message, code = f"{error.filename!r} exists; the image goes into a new file", 2
    except (OSError, UnicodeError) as error:
        message, code = str(error), 1
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
