"""Test vectors of the format, computed in pure Python: fixtures/vectors/format.json.

Invariant: the file is what this module computes (tests/unit/test_reference.py
compares them), so a change of the format shows as a change of the vectors.

    python -m tests.reference_vectors        writes the file anew

Binary values are hexadecimal. Where a compressor takes part, its output is an
input of the vector, for compressors may change and the format does not.
"""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from imager.reference import b3, b3d, b3k, canonical, xxh3
from tests import reference_writer as w

FILE = Path(__file__).resolve().parent.parent / "fixtures" / "vectors" / "format.json"

Json = dict[str, Any]


def fill(count: int, start: int) -> bytes:
    """Bytes that count up from `start`."""
    return bytes((start + n) & 0xFF for n in range(count))


REPOSITORY, SESSION, SLOT = fill(16, 0x10), fill(16, 0x20), fill(16, 0x30)
ID_KEY, SESSION_KEY, SEED = fill(32, 0x40), fill(32, 0x60), fill(32, 0x80)
EPOCH, EPHEMERAL, NONCE, SALT = fill(32, 0xA0), fill(32, 0xC0), fill(12, 0xE0), fill(16, 0xF0)
PUBLIC = X25519PrivateKey.from_private_bytes(EPOCH).public_key().public_bytes_raw()
CONTENT = bytes(486) + b"abcdefghijklmnopqrstuvwxyz"
CODED = bytes([0x1F, 0, 1, 0, 255, 211, 0xF0, 11]) + CONTENT[-26:]  # an LZ4 block of it
TIME = 1_790_000_000_123_456
WRITER, WRITER_SEED, RECOVERY = fill(16, 0x38), fill(32, 0x90), fill(20, 0xB0)
RECOVERY_TEXT = "P2RVB-5CXM9-PPVBS-FE5S3-QAXVH-SFDY8-QZ0CJ-3GP3R"  # worked out by hand from the page


def hexed(value: Any) -> Any:
    """`value` with its binary parts in hexadecimal."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: hexed(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [hexed(one) for one in value]
    return value


def primitives() -> Json:
    """Hashes and JSON."""
    texts = ['"\\/', "\x00\x08\t\n\x0c\r\x1f\x7f\x85", "é\u2028😀"]
    objects: list[Any] = [{}, {"b": [1, -2, 2**63], "a": None, "ä": True}, {"\ue000": 1, "\U00010000": 2}]
    return {
        "b3": [{"data": data, "out": b3(data)} for data in (b"", b"imager", CONTENT)],
        "b3k": [{"key": ID_KEY, "data": data, "out": b3k(ID_KEY, data)} for data in (b"", CONTENT)],
        "b3d": [{"context": "imager 2026-11 map page v1", "data": ID_KEY,
                 "out": b3d("imager 2026-11 map page v1", ID_KEY)}],
        "xxh3": [{"data": one, "out": struct.pack("<Q", xxh3(one))} for one in (b"", fill(60, 0), CONTENT)],
        "canonical": [{"value": value, "out": canonical(value)} for value in texts + objects],
    }  # fmt: skip


def block_ids() -> list[Json]:
    """Ids of blocks: `count` times the bytes `repeat`."""
    cases = [(b"\0", 4096), (fill(256, 0), 16), (fill(251, 0), 261), (b"x", 1), (b"ab", 1 << 21)]
    return [{"id_key": ID_KEY, "repeat": one, "count": n, "id": b3k(ID_KEY, one * n)} for one, n in cases]


def pages() -> list[Json]:
    """Map pages: what the slots say (a type of run, or pack, offset, length, id), parts and id."""
    a, b = fill(32, 1), fill(32, 2)
    one, two, three = (a, 80, 200, b"\1" * 32), (b, 80, 300, b"\2" * 32), (a, 280, 64, b"\3" * 32)
    below = (w.SELF, 176, 400, b"\4" * 32)
    cases: list[tuple[int, int, list[w.Slot]]] = [
        (0, 0, [0]),
        (0, 256, [0] * 256),
        (0, 512, [two, one, three, one, 0, 0, 1, 2, 2, 1, one]),
        (1, 0, [below, 0, two, below]),
        (2, 0, [1, below]),
    ]
    made = []
    for level, first, slots in cases:
        public, sealed = w.page(level, first, slots)
        made.append({"level": level, "first": first, "slots": slots, "id_key": ID_KEY, "public": public,
                     "sealed": sealed, "id": w.page_id(ID_KEY, public, sealed)})  # fmt: skip
    return made


def records() -> list[Json]:
    """Records, encrypted by both ciphers and not encrypted, of blocks and of a page."""
    page_public, page_sealed = w.page(0, 0, [(fill(32, 1), 80, 200, b"\1" * 32), 0])
    id, page = b3k(ID_KEY, CONTENT), w.page_id(ID_KEY, page_public, page_sealed)
    cases = [
        (w.BLOCK, w.STORED, id, len(CONTENT), CONTENT, b""),
        (w.BLOCK, w.LZ4, id, len(CONTENT), CODED, b""),
        (w.PAGE, w.STORED, page, len(page_sealed), page_sealed, page_public),
    ]
    made = []
    for kind, codec, name, plain, coded, public in cases:
        for sealer in (w.Sealer(w.AES, SESSION_KEY), w.Sealer(w.CHACHA, SESSION_KEY, 3), None):
            nonce = NONCE if sealer else bytes(12)
            data = w.record(REPOSITORY, kind, codec, name, plain, coded, sealer, nonce, public)
            made.append({"repository": REPOSITORY, "kind": kind, "codec": codec, "id": name,
                         "plain_length": plain, "coded": coded, "public": public,
                         "cipher": sealer.cipher if sealer else 0,
                         "session_key": SESSION_KEY if sealer else b"",
                         "envelope_number": sealer.number if sealer else w.PLAIN, "nonce": nonce,
                         "head": data[:64], "payload": data[64:], "payload_b3": b3(data[64:])})  # fmt: skip
    return made


def certificate() -> Json:
    """That of a writer."""
    return w.certificate(REPOSITORY, SEED, WRITER, "höst", "db one", w.public_of(WRITER_SEED))


def envelope(cipher: int = w.AES) -> bytes:
    """The session key in an envelope."""
    return w.envelope(REPOSITORY, SESSION, SESSION_KEY, cipher, 1, PUBLIC, EPHEMERAL)


def secrets() -> Json:
    """Slots, an epoch, envelopes."""
    argon2 = {"name": "argon2id", "salt": SALT.hex(), "memory_kib": 65536, "passes": 3, "lanes": 4}
    keyfile, phrase = fill(64, 5), "Zu\u0308rich na\u00efve \u2126"  # NFC differs from what is given
    nfc = "Z\u00fcrich na\u00efve \u03a9"
    slots: list[Json] = []
    for kind, role, kdf, secret in (
        ("passphrase", "full", argon2, nfc.encode()),
        ("keyfile", "full", {"name": "blake3", "salt": SALT.hex()}, keyfile),
        ("recovery", "full", {"name": "blake3", "salt": SALT.hex()}, RECOVERY),
        ("keyfile", "write", {"name": "blake3", "salt": SALT.hex()}, keyfile),
        ("keyfile", "read", {"name": "blake3", "salt": SALT.hex()}, keyfile),
    ):
        inside = w.payload_of(role, ID_KEY, SEED, {1: EPOCH}, WRITER_SEED)
        writer = certificate() if role == "write" else None
        extra = b"imager slot v1" + REPOSITORY + SLOT + kind.encode() + b"\0" + role.encode()
        slots.append({"kind": kind, "role": role, "repository": REPOSITORY, "slot": SLOT, "kdf": kdf,
                      "secret": secret, "passphrase": phrase if kind == "passphrase" else None,
                      "kek": w.slot_key(kdf, secret), "nonce": NONCE, "additional_data": extra,
                      "payload": canonical(inside),
                      "file": w.slot(REPOSITORY, SLOT, kind, role, kdf, NONCE, secret, inside,
                                     writer)})  # fmt: skip
    shared = X25519PrivateKey.from_private_bytes(EPHEMERAL).exchange(
        X25519PrivateKey.from_private_bytes(EPOCH).public_key()
    )
    start = envelope()[:56]
    wrap = b3d("imager 2026-11 session key v1", shared + start[24:] + PUBLIC + REPOSITORY)
    return {
        "slots": slots,
        "recovery_key": {"key": RECOVERY, "text": RECOVERY_TEXT},
        "writer": {"signing_seed": WRITER_SEED, "certificate": canonical(certificate()),
                   "revocation": w.revocation(REPOSITORY, SEED, WRITER, TIME, [fill(32, 4), fill(32, 3)])},
        "epoch": {"epoch": 1, "private": EPOCH, "public": PUBLIC, "signing_seed": SEED,
                  "repository": REPOSITORY, "file": w.epoch(REPOSITORY, 1, EPOCH, SEED)},
        "envelopes": [{"cipher": cipher, "epoch": 1, "epoch_private": EPOCH, "epoch_public": PUBLIC,
                       "ephemeral_private": EPHEMERAL, "repository": REPOSITORY, "session": SESSION,
                       "session_key": SESSION_KEY, "wrap": wrap, "envelope": envelope(cipher)}
                      for cipher in (w.AES, w.CHACHA)],
        "config": {"created": TIME, "id_key": ID_KEY, "signing_seed": SEED,
                   "none": w.config(REPOSITORY, TIME, id_key=ID_KEY, block_size=65536),
                   "sealed": w.config(REPOSITORY, TIME, id_key=ID_KEY, signing_seed=SEED)},
    }  # fmt: skip


def packs() -> list[Json]:
    """Packs: header, records, name and bytes."""
    made = []
    for kind, envelopes, encrypted in ((1, [envelope()], True), (2, [], False), (1, [], False)):
        chosen = [one for one in records() if one["kind"] == kind and one["cipher"] == int(encrypted)]
        body = [one["head"] + one["payload"] for one in chosen]
        header = w.pack_header(kind, REPOSITORY, SESSION, 7, envelopes)
        name, data = w.pack(header, body)
        made.append({"kind": kind, "repository": REPOSITORY, "session": SESSION, "number": 7,
                     "envelopes": envelopes, "header": header, "records": body, "name": name,
                     "trailer_and_footer": data[len(header) + sum(map(len, body)):]})  # fmt: skip
    return made


def index_segments() -> list[Json]:
    """Index segments of `count` entries: entry i has id B3(u32 i), pack i mod packs, offset
    80 + 100i, length 100 + i.

    Pack i is named B3("pack" ‖ u32 i). `pages` are the file's pages of 4096 bytes, each without its last
    zero bytes.
    """
    made = []
    for packs_count, count in ((1, 0), (2, 3), (3, 127), (130, 300)):
        names = [b3(b"pack" + struct.pack("<I", i)) for i in range(packs_count)]
        rows = [(b3(struct.pack("<I", i)), i % packs_count, 80 + 100 * i, 100 + i) for i in range(count)]
        name, data = w.index_segment(REPOSITORY, names, rows)
        pages = [data[at : at + 4096].rstrip(b"\0") for at in range(0, len(data), 4096)]
        made.append({"repository": REPOSITORY, "packs": packs_count, "entries": count, "length": len(data),
                     "name": name, "pages": pages})  # fmt: skip
    return made


def manifests() -> list[Json]:
    """Manifests, with a compressed body given."""
    root = {"pack": fill(32, 1).hex(), "offset": 176, "length": 400, "id": fill(32, 2).hex(), "level": 0}
    public: Json = {"repository": REPOSITORY.hex(), "set": SESSION.hex(), "version": 1}
    public |= {"features": [], "created": TIME}
    public |= {"lineage": w.lineage(ID_KEY, "höst", "db").hex(), "sequence": 2, "roots": [root, None]}
    public |= {"previous": {"set": SLOT.hex(), "digest": fill(32, 3).hex()}}
    body = zlib.compress(canonical({"name": "db", "host": "höst"}), 0)  # stored: the same with any zlib
    made = []
    sealed = public | {"envelope": envelope().hex()}
    signed = sealed | {"writer": certificate()}
    for seed, part in ((SEED, sealed), (None, public | {"envelope": None}), (WRITER_SEED, signed)):
        data = w.manifest(part, body, seed, SESSION_KEY, NONCE)
        made.append({"public": canonical(part), "body_compressed": body, "signing_seed": seed,
                     "session_key": SESSION_KEY if seed else None, "nonce": NONCE if seed else None,
                     "file": data})  # fmt: skip
    return made


def vectors() -> Json:
    """All vectors."""
    name = {"id_key": ID_KEY, "host": "höst", "name": "db", "id": w.lineage(ID_KEY, "höst", "db")}
    made = {
        "about": "Computed by tests/reference_vectors.py from docs/design/repository-format.md.",
        "primitives": primitives(),
        "block_ids": block_ids(),
        "pages": pages(),
        "records": records(),
        "secrets": secrets(),
        "packs": packs(),
        "index_segments": index_segments(),
        "lineage": name,
        "manifests": manifests(),
    }
    return dict(hexed(made))


def render() -> str:
    """The file's text."""
    return json.dumps(vectors(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(render(), encoding="utf-8")
    print(FILE)
