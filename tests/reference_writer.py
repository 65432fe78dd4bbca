"""Writes small repositories from docs/design/repository-format.md alone, for tests.

Invariant: the same arguments give the same bytes (all randomness comes from a
seed), and nothing of the tool itself takes part, so that what reads these
repositories is tested against the page and not against itself. The functions
make the format's pieces, each byte given; `Writer` makes a folder out of them.
"""

from __future__ import annotations

import random
import struct
import unicodedata
import zlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lz4.block
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from imager.reference import b3, b3d, b3k, canonical, xxh3

BLOCK, PAGE = 1, 2
ZERO, UNUSED, UNREADABLE, DATA = 0, 1, 2, 3
STORED, LZ4, ZSTD = 0, 1, 2
AES, CHACHA = 1, 2
PLAIN = 0xFFFF
SELF = bytes(32)

Json = dict[str, Any]


# The pieces -----------------------------------------------------------------------------------------


def public_of(seed: bytes) -> bytes:
    """Ed25519 public key of a private seed."""
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def config(
    repository: bytes, created: int, *, id_key: bytes, signing_seed: bytes | None = None, block_size: int = 0
) -> bytes:
    """The object `config`: sealed where a signing seed is given."""
    obj: Json = {
        "format": "imager",
        "version": 1,
        "repository": repository.hex(),
        "created": created,
        "features": {"read": [], "write": []},
        "block_size": block_size,
    }
    if signing_seed is None:
        obj |= {"encryption": "none", "id_key": id_key.hex()}
    else:
        obj |= {"encryption": "sealed", "verify_key": public_of(signing_seed).hex()}
    return seal_config(obj, signing_seed)


def seal_config(obj: Json, signing_seed: bytes | None) -> bytes:
    """Canonical JSON of a config object, with its `seal`."""
    seal = b3(b"imager config v1" + canonical(obj))
    if signing_seed is not None:
        seal = Ed25519PrivateKey.from_private_bytes(signing_seed).sign(seal)
    return canonical(obj | {"seal": seal.hex()})


def slot_key(kdf: Json, secret: bytes) -> bytes:
    """`KEK` of a slot; `secret` is the keyfile, or the passphrase in NFC and UTF-8."""
    salt = bytes.fromhex(kdf["salt"])
    if kdf["name"] == "blake3":
        return b3d("imager 2026-11 keyfile slot v1", salt + secret)
    passes, lanes, memory = kdf["passes"], kdf["lanes"], kdf["memory_kib"]
    argon2 = Argon2id(salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory)
    return argon2.derive(secret)


def slot(
    repository: bytes,
    id: bytes,
    kind: str,
    role: str,
    kdf: Json,
    nonce: bytes,
    secret: bytes,
    payload: Json,
    writer: Json | None = None,
) -> bytes:
    """A key slot. `payload` is what its role has; `writer`: the certificate, with the role write."""
    extra = b"imager slot v1" + repository + id + kind.encode() + b"\0" + role.encode()
    return canonical(
        {
            "slot": id.hex(),
            "repository": repository.hex(),
            "kind": kind,
            "role": role,
            "label": "test",
            "created": 0,
            "kdf": kdf,
            "nonce": nonce.hex(),
            "sealed": AESGCM(slot_key(kdf, secret)).encrypt(nonce, canonical(payload), extra).hex(),
        }
        | ({"writer": writer} if writer else {})
    )


def payload_of(role: str, id_key: bytes, signing_seed: bytes, epochs: dict[int, bytes], seed: bytes) -> Json:
    """What a slot of a role has sealed in it; `seed`: the writer's own."""
    public = public_of(signing_seed).hex()
    held = {str(number): key.hex() for number, key in epochs.items()}
    if role == "full":
        return {"id_key": id_key.hex(), "signing_seed": signing_seed.hex(), "epochs": held}
    if role == "read":
        return {"id_key": id_key.hex(), "verify_key": public, "epochs": held}
    payload: Json = {"id_key": id_key.hex(), "verify_key": public, "epochs": {}}
    return payload | {"signing_seed": seed.hex(), "floor": max(epochs, default=0)}


def certificate(
    repository: bytes, signing_seed: bytes, writer: bytes, host: str, label: str, public: bytes
) -> Json:
    """The repository's word that a key may sign sets of `host`."""
    bare: Json = {"writer": writer.hex(), "host": host, "label": label, "public": public.hex()}
    digest = b3(b"imager writer v1" + repository + canonical(bare))
    return bare | {"signature": Ed25519PrivateKey.from_private_bytes(signing_seed).sign(digest).hex()}


def revocation(
    repository: bytes, signing_seed: bytes, writer: bytes, created: int, sets: list[bytes]
) -> bytes:
    """The object `revoked/<writer>`."""
    bare: Json = {"writer": writer.hex(), "repository": repository.hex(), "created": created}
    bare |= {"sets": sorted(digest.hex() for digest in sets)}
    signature = Ed25519PrivateKey.from_private_bytes(signing_seed).sign(
        b3(b"imager revocation v1" + canonical(bare))
    )
    return canonical(bare | {"signature": signature.hex()})


def epoch(repository: bytes, number: int, private: bytes, signing_seed: bytes) -> bytes:
    """The object `epochs/<number>`."""
    public = X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
    digest = b3(b"imager epoch v1" + repository + struct.pack("<I", number) + public)
    signature = Ed25519PrivateKey.from_private_bytes(signing_seed).sign(digest)
    obj = {"epoch": number, "public": public.hex(), "repository": repository.hex()}
    return canonical(obj | {"signature": signature.hex()})


def envelope(
    repository: bytes, session: bytes, key: bytes, cipher: int, number: int, public: bytes, ephemeral: bytes
) -> bytes:
    """The session key `key`, sealed to the public key of epoch `number`."""
    private = X25519PrivateKey.from_private_bytes(ephemeral)
    start = struct.pack("<BBHI", cipher, 1, 0, number) + session + private.public_key().public_bytes_raw()
    shared = private.exchange(X25519PublicKey.from_public_bytes(public))
    wrap = b3d("imager 2026-11 session key v1", shared + start[24:] + public + repository)
    return start + AESGCM(wrap).encrypt(bytes(12), key, start)


@dataclass(frozen=True, slots=True)
class Sealer:
    """Encrypts the records of one session: cipher, session key, its envelope's number in the pack."""

    cipher: int
    key: bytes
    number: int = 0


def encode(codec: int, content: bytes) -> bytes:
    """Content as `codec` codes it."""
    if codec == LZ4:
        return bytes(lz4.block.compress(content, store_size=False))
    if codec == ZSTD:
        import zstandard

        return zstandard.ZstdCompressor(level=1).compress(content)
    return content


def head(kind: int, codec: int, number: int, plain: int, payload: int, id: bytes, nonce: bytes) -> bytes:
    """Head of a record, with its checksum."""
    start = struct.pack("<4sBBHII32s12s", b"IREC", kind, codec, number, plain, payload, id, nonce)
    return start + struct.pack("<I", xxh3(start) & 0xFFFFFFFF)


def record(
    repository: bytes,
    kind: int,
    codec: int,
    id: bytes,
    plain: int,
    coded: bytes,
    sealer: Sealer | None,
    nonce: bytes,
    public: bytes = b"",
) -> bytes:
    """Head and payload of a record. `coded`: coded content, or a page's sealed part; `plain`: its length."""
    if sealer is not None:
        extra = repository + struct.pack("<BBI", kind, codec, plain) + id + public
        aead = (AESGCM if sealer.cipher == AES else ChaCha20Poly1305)(b3k(sealer.key, id))
        coded = aead.encrypt(nonce, coded, extra)
    if kind == PAGE:
        coded = struct.pack("<I", len(public)) + public + coded
    if sealer is None:
        return head(kind, codec, PLAIN, plain, len(coded), id, bytes(12)) + coded
    return head(kind, codec, sealer.number, plain, len(coded), id, nonce) + coded


def pack_header(
    kind: int, repository: bytes, session: bytes, number: int, envelopes: Sequence[bytes]
) -> bytes:
    """Header of a pack."""
    length = 72 + 104 * len(envelopes)
    start = struct.pack("<8sHBBI", b"IMGRPACK", 1, kind, 0, length) + repository + session
    start += struct.pack("<QH6x", number, len(envelopes)) + b"".join(envelopes)
    return start + struct.pack("<Q", xxh3(start))


def pack(header: bytes, records: Sequence[bytes]) -> tuple[bytes, bytes]:
    """Name and bytes of a pack."""
    body = b"".join(records)
    trailer = b"".join(one[:64] + b3(one[64:]) for one in records)
    footer = struct.pack("<8sIIQ", b"IMGRTAIL", len(records), 96, len(header) + len(body))
    footer += struct.pack("<Q", xxh3(footer))
    return b3(b"imager pack v1" + header + trailer + footer), header + body + trailer + footer


Target = tuple[bytes, int, int, bytes]  # pack, offset, length, id
Slot = int | Target  # ZERO, UNUSED, UNREADABLE, or data


def page(level: int, first: int, slots: Sequence[Slot]) -> tuple[bytes, bytes]:
    """Public and sealed part of a map page."""
    targets = sorted({one for one in slots if not isinstance(one, int)})
    packs = sorted({target[0] for target in targets})
    public = struct.pack("<BBHHH", level, 1, len(packs), len(targets), 0) + b"".join(packs)
    for name, offset, length, id in targets:
        public += struct.pack("<HII", packs.index(name), offset, length) + id
    sealed = struct.pack("<QH", first, len(slots))
    at = 0
    while at < len(slots):
        here = slots[at]
        kind = here if isinstance(here, int) else DATA
        end = at
        while end < len(slots) and (kind == DATA and not isinstance(slots[end], int) or slots[end] == kind):
            end += 1
        sealed += struct.pack("<BB", kind, end - at - 1)
        if kind == DATA:
            sealed += b"".join(struct.pack("<H", targets.index(one)) for one in slots[at:end])  # type: ignore[arg-type]
        at = end
    return public, sealed


def page_id(id_key: bytes, public: bytes, sealed: bytes) -> bytes:
    """Id of a map page."""
    key = b3d("imager 2026-11 map page v1", id_key)
    return b3k(key, struct.pack("<I", len(public)) + public + sealed)


def index_segment(
    repository: bytes, packs: Sequence[bytes], entries: Sequence[tuple[bytes, int, int, int]]
) -> tuple[bytes, bytes]:
    """Name and bytes of an index segment. Entry: id, number of the pack, offset, record length."""
    names = b"".join(packs)
    names += struct.pack("<Q", xxh3(names))
    names += bytes(-len(names) % 4096)
    rows = [id[:20] + struct.pack("<III", *rest) for id, *rest in sorted(entries)]
    pages = b""
    for at in range(0, len(rows), 127):
        chunk = rows[at : at + 127]
        rest = struct.pack("<H22x", len(chunk)) + b"".join(chunk).ljust(127 * 32, b"\0")
        pages += struct.pack("<Q", xxh3(rest)) + rest
    filter_ = index_filter(rows) if len(rows) > 127 else b""
    start = 4096 + len(names)
    header = struct.pack("<8sHHIQQ", b"IMGRINDX", 1, 0, len(packs), len(entries), start) + repository
    header += struct.pack("<QQ", start + len(pages) if filter_ else 0, len(filter_))
    data = (header + struct.pack("<Q", xxh3(header))).ljust(4096, b"\0") + names + pages + filter_
    return b3(b"imager index v1" + data), data


def index_filter(rows: Sequence[bytes]) -> bytes:
    """The filter of a segment with these entries."""
    lines = -(-len(rows) // 48)
    bits, counts = [0] * lines, [0] * lines
    for row in rows:
        line = int.from_bytes(row[:8], "big") * lines >> 64
        first, step = struct.unpack("<II", row[8:16])
        for n in range(6):
            bits[line] |= 1 << ((first + n * (step | 1)) % 2**32 * 480 >> 32)
        counts[line] += 1
    filled = b"".join(
        struct.pack("<I", sum(counts[:at])) + bits[at].to_bytes(60, "little") for at in range(lines)
    )
    pages = b""
    for at in range(0, len(filled), 63 * 64):
        rest = bytes(56) + filled[at : at + 63 * 64].ljust(63 * 64, b"\0")
        pages += struct.pack("<Q", xxh3(rest)) + rest
    return pages


def manifest(
    public: Json, body: bytes, signing_seed: bytes | None, session_key: bytes = b"", nonce: bytes = b""
) -> bytes:
    """The object `sets/<set id>`; `body` is compressed already. Sealed where a signing seed is given."""
    part = canonical(public)
    if signing_seed is not None:
        key = b3d("imager 2026-11 manifest body v1", session_key)
        body = nonce + AESGCM(key).encrypt(nonce, body, part)
    data = b"IMGRSET1" + struct.pack("<II", len(part), len(body)) + part + body
    return seal_manifest(data, signing_seed)


def seal_manifest(data: bytes, signing_seed: bytes | None) -> bytes:
    """Append a manifest's signature, or digest."""
    digest = b3(b"imager set v1" + data)
    if signing_seed is None:
        return data + digest + bytes(32)
    return data + Ed25519PrivateKey.from_private_bytes(signing_seed).sign(digest)


def lineage(id_key: bytes, host: str, name: str) -> bytes:
    """Id of a lineage."""
    return b3k(b3d("imager 2026-11 lineage v1", id_key), canonical([host, name]))[:16]


# A repository ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Disk:
    """An image to write: `blocks` by number; other blocks are zero, unused or unreadable.

    A block of `blocks` is stored as it is, also where it is all zero.
    """

    name: str
    size: int
    block_size: int
    blocks: Mapping[int, bytes]
    unused: frozenset[int] = frozenset()
    unreadable: frozenset[int] = frozenset()

    @classmethod
    def of(cls, data: bytes, name: str = "disk", block_size: int = 4096) -> Disk:
        """A disk with this content; zero blocks are left out."""
        parts = {at // block_size: data[at : at + block_size] for at in range(0, len(data), block_size)}
        return cls(name, len(data), block_size, {n: part for n, part in parts.items() if any(part)})

    def content(self) -> bytes:
        """What reading it back must give."""
        data = bytearray(self.size)
        for number, part in self.blocks.items():
            data[number * self.block_size : number * self.block_size + len(part)] = part
        return bytes(data)


@dataclass(slots=True)
class OpenPack:
    """A pack that is being written. `name` is set when it is done."""

    kind: int
    number: int
    header: bytes
    records: list[bytes] = field(default_factory=list)
    size: int = 0
    name: bytes = b""

    def add(self, data: bytes) -> tuple[int, int]:
        """Offset and length of a record, now in the pack."""
        offset = len(self.header) + self.size
        self.records.append(data)
        self.size += len(data)
        return offset, len(data)


Place = tuple[OpenPack, int, int]  # pack, offset, length
Root = tuple[Place, bytes, int]  # place, id and level of a root page


class Writer:
    """A repository in a folder, and the sets written to it. The same arguments give the same bytes.

    `slots`: pairs of kind (`passphrase`, `keyfile`, `recovery`) and secret; any makes the repository sealed.
    """

    def __init__(
        self,
        root: Path,
        *slots: tuple[str, bytes],
        seed: int = 0,
        block_size: int = 0,
        kdf: tuple[int, int, int] = (64, 1, 1),
    ) -> None:
        """Create it; `kdf`: memory in KiB, passes, lanes of passphrase slots."""
        self.root, self.random, self.kdf = root, random.Random(seed), kdf
        self.repository, self.id_key = self.rand(16), self.rand(32)
        self.signing_seed = self.rand(32) if slots else None
        self.epochs: dict[int, bytes] = {}
        self.writers: dict[str, tuple[bytes, Json]] = {}  # id: signing seed, certificate
        self.signer: str | None = None  # the writer that signs the next sets; None: the repository's key
        self.clock = 1_790_000_000_000_000
        self.places: dict[tuple[int, bytes], Place] = {}
        self.last: dict[bytes, tuple[int, bytes, bytes]] = {}  # of each lineage: sequence, set, digest
        for folder in ("packs", "maps", "index", "sets", "sessions", "condemned", "slots", "epochs"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        if slots:
            self.add_epoch()
        for kind, secret in slots:
            self.add_slot(kind, secret)
        self.put("config", config(self.repository, self.now(), id_key=self.id_key, block_size=block_size,
                                  signing_seed=self.signing_seed))  # fmt: skip

    def rand(self, count: int) -> bytes:
        """Random bytes."""
        return self.random.randbytes(count)

    def now(self) -> int:
        """A time, later than all before."""
        self.clock += 1_000_000
        return self.clock

    def put(self, name: str, data: bytes) -> None:
        """Create an object."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(data)

    def add_epoch(self) -> int:
        """Begin a key epoch; slots made before do not open it."""
        assert self.signing_seed is not None
        number, private = len(self.epochs) + 1, self.rand(32)
        self.epochs[number] = private
        self.put(f"epochs/{number:08x}", epoch(self.repository, number, private, self.signing_seed))
        return number

    def add_slot(self, kind: str, secret: bytes, role: str = "full", host: str = "host") -> str:
        """Add a way to open the repository; the id of the slot. Role write: a writer for `host`."""
        assert self.signing_seed is not None
        id, salt, nonce = self.rand(16), self.rand(16).hex(), self.rand(12)
        kdf: Json = {"name": "blake3", "salt": salt}
        if kind == "passphrase":
            memory, passes, lanes = self.kdf
            kdf = {"name": "argon2id", "salt": salt, "memory_kib": memory, "passes": passes, "lanes": lanes}
            secret = unicodedata.normalize("NFC", secret.decode()).encode()
        seed, writer = self.rand(32), None
        if role == "write":
            name = f"writer {len(self.writers)}"
            writer = certificate(
                self.repository, self.signing_seed, self.rand(16), host, name, public_of(seed)
            )
            self.writers[writer["writer"]] = (seed, writer)
        payload = payload_of(role, self.id_key, self.signing_seed, self.epochs, seed)
        self.put(
            f"slots/{id.hex()}", slot(self.repository, id, kind, role, kdf, nonce, secret, payload, writer)
        )
        return id.hex()

    def revoke(self, writer: str, sets: Sequence[str]) -> None:
        """Revoke a writer's key, but for these sets."""
        assert self.signing_seed is not None
        kept = [b3((self.root / "sets" / one).read_bytes()) for one in sets]
        name = bytes.fromhex(writer)
        self.put(f"revoked/{writer}", revocation(self.repository, self.signing_seed, name, self.now(), kept))

    def write_set(
        self,
        name: str,
        disks: Sequence[Disk],
        *,
        host: str = "host",
        codec: int = LZ4,
        cipher: int = AES,
        pack_bytes: int = 64 << 20,
        body: Json | None = None,
    ) -> str:
        """Write an image set, sharing blocks and pages with the sets before; its id. `body`: keys to add."""
        return _Session(self, name, host, codec, cipher, pack_bytes).write(disks, body or {})

    def abort(self, reason: str = "test") -> str:
        """A session that was declared dead; its id."""
        session = self.begin("host")
        mark = {"session": session.hex(), "created": self.now(), "reason": reason}
        self.put(f"sets/{session.hex()}", b"IMGRABRT" + canonical(mark))
        return session.hex()

    def begin(self, host: str) -> bytes:
        """Announce a session."""
        session = self.rand(16)
        obj: Json = {"session": session.hex(), "repository": self.repository.hex(), "created": self.now()}
        obj |= {"epoch": len(self.epochs), "host": host, "pid": 1, "generation": 0}
        self.put(f"sessions/{session.hex()}", canonical(obj))
        return session


class _Session:
    """One run of a writer."""

    def __init__(self, writer: Writer, name: str, host: str, codec: int, cipher: int, limit: int) -> None:
        self.writer, self.name, self.host, self.codec, self.limit = writer, name, host, codec, limit
        self.id = writer.begin(host)
        self.packs = 0
        self.envelope: bytes | None = None
        self.sealer: Sealer | None = None
        if writer.signing_seed is not None:
            self.sealer = Sealer(cipher, writer.rand(32))
            number = len(writer.epochs)
            private = X25519PrivateKey.from_private_bytes(writer.epochs[number])
            public = private.public_key().public_bytes_raw()
            self.envelope = envelope(
                writer.repository, self.id, self.sealer.key, cipher, number, public, writer.rand(32)
            )
        self.open: dict[int, OpenPack] = {}

    def write(self, disks: Sequence[Disk], extra: Json) -> str:
        writer, started = self.writer, self.writer.now()
        fresh: list[tuple[bytes, Place]] = []
        for disk in disks:
            for number, content in sorted(disk.blocks.items()):
                assert len(content) == min(disk.block_size, disk.size - number * disk.block_size)
                id = b3k(writer.id_key, content)
                if (BLOCK, id) not in writer.places:
                    coded, codec = encode(self.codec, content), self.codec
                    if len(coded) >= len(content):
                        coded, codec = content, STORED
                    fresh.append((id, self.add(BLOCK, codec, id, len(content), coded)))
        self.close(BLOCK)
        roots = [self.root(disk) for disk in disks]
        self.close(PAGE)
        if fresh:
            names = sorted({place[0].name for _, place in fresh})
            rows = [(id, names.index(place[0].name), *place[1:]) for id, place in fresh]
            segment, data = index_segment(writer.repository, names, rows)
            writer.put(f"index/{segment.hex()}", data)
        return self.commit(disks, roots, started, extra)

    def add(self, kind: int, codec: int, id: bytes, plain: int, coded: bytes, public: bytes = b"") -> Place:
        """Store a record in the pack that is open for its kind."""
        writer = self.writer
        if kind not in self.open:
            envelopes = [] if self.envelope is None else [self.envelope]
            header = pack_header(kind, writer.repository, self.id, self.packs, envelopes)
            self.open[kind] = OpenPack(kind, self.packs, header)
            self.packs += 1
        pack = self.open[kind]
        nonce = bytes(12) if self.sealer is None else writer.rand(12)
        data = record(writer.repository, kind, codec, id, plain, coded, self.sealer, nonce, public)
        place = (pack, *pack.add(data))
        writer.places[kind, id] = place
        if pack.size >= self.limit:
            self.close(kind)
        return place

    def close(self, kind: int) -> None:
        """Finish the open pack of a kind."""
        if kind in self.open:
            one = self.open.pop(kind)
            one.name, data = pack(one.header, one.records)
            one.records.clear()
            folder = "packs" if kind == BLOCK else "maps"
            self.writer.put(f"{folder}/{one.name.hex()[:2]}/{one.name.hex()}", data)

    def root(self, disk: Disk) -> Root | None:
        """Write the map of a disk: place, id and level of its root page."""
        count = -(-disk.size // disk.block_size)
        if count == 0:
            return None
        level = 0
        while 256 ** (level + 1) < count:
            level += 1
        special = sorted({*disk.blocks, *disk.unused, *disk.unreadable})
        id = self.page(disk, special, count, level, 0)
        return self.writer.places[PAGE, id], id, level

    def page(self, disk: Disk, special: list[int], count: int, level: int, first: int) -> bytes:
        """Write the page of `level` from block `first` on, and all below it; its id."""
        span = 256**level
        starts = range(first, min(count, first + 256 * span), span)
        slots = [self.slot(disk, special, count, level, start) for start in starts]
        # A slot holds no pack name of a pack that is still open: between two pages that pack may be done.
        named = [one if isinstance(one, int) else (one[0].name or SELF, *one[1:]) for one in slots]
        public, sealed = page(level, first, named)
        id = page_id(self.writer.id_key, public, sealed)
        if (PAGE, id) not in self.writer.places:
            self.add(PAGE, STORED, id, len(sealed), sealed, public)
        return id

    def slot(
        self, disk: Disk, special: list[int], count: int, level: int, start: int
    ) -> int | tuple[OpenPack, int, int, bytes]:
        """What a slot of a page of `level` says of the blocks from `start` on."""
        end = min(count, start + 256**level)
        inside = special[bisect_left(special, start) : bisect_left(special, end)]
        if not inside:
            return ZERO
        if len(inside) == end - start:
            for kind, numbers in ((UNUSED, disk.unused), (UNREADABLE, disk.unreadable)):
                if all(number in numbers for number in inside):
                    return kind
        if level == 0:
            id, kind = b3k(self.writer.id_key, disk.blocks[start]), BLOCK
        else:
            id, kind = self.page(disk, special, count, level - 1, start), PAGE
        return *self.writer.places[kind, id], id

    def commit(self, disks: Sequence[Disk], roots: Sequence[Root | None], started: int, extra: Json) -> str:
        writer, created = self.writer, self.writer.now()
        line = lineage(writer.id_key, self.host, self.name)
        sequence, before, digest = writer.last.get(line, (0, b"", b""))
        public: Json = {
            "repository": writer.repository.hex(),
            "set": self.id.hex(),
            "version": 1,
            "features": [],
            "created": created,
            "lineage": line.hex(),
            "sequence": sequence + 1,
            "previous": {"set": before.hex(), "digest": digest.hex()} if sequence else None,
            "envelope": self.envelope.hex() if self.envelope else None,
            "roots": [
                root
                and {
                    "pack": root[0][0].name.hex(),
                    "offset": root[0][1],
                    "length": root[0][2],
                    "id": root[1].hex(),
                    "level": root[2],
                }
                for root in roots
            ],
        }
        body: Json = {
            "name": self.name,
            "host": self.host,
            "images": [
                {
                    "disk": disk.name,
                    "size": disk.size,
                    "block_size": disk.block_size,
                    "unreadable": [
                        [n * disk.block_size, min(disk.block_size, disk.size - n * disk.block_size)]
                        for n in sorted(disk.unreadable)
                    ],
                    "source": {},
                    "layout": {},
                }
                for disk in disks
            ],
            "strategy": "full",
            "base": None,
            "changes": "scan",
            "stats": {},
            "tags": [],
            "started": started,
            "finished": created,
            "tool": "tests.reference_writer",
        } | extra
        nonce = b"" if self.sealer is None else writer.rand(12)
        key = b"" if self.sealer is None else self.sealer.key
        seed = writer.signing_seed
        if writer.signer is not None:
            seed, public["writer"] = writer.writers[writer.signer]
        data = manifest(public, zlib.compress(canonical(body)), seed, key, nonce)
        writer.put(f"sets/{self.id.hex()}", data)
        writer.last[line] = (sequence + 1, self.id, b3(data))
        return self.id.hex()
