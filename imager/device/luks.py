"""LUKS headers: what can be known of an encrypted volume without its key.

Invariant: a LUKS2 header is believed only where its checksum holds (the second
copy is asked where the first does not), its JSON is bounded before it is
parsed, and no key material is ever read.

Structures: LUKS1 On-Disk Format Specification 1.2.3; LUKS2 On-Disk Format Specification 1.1.2;
cryptsetup lib/luks1/luks.h, lib/luks2/luks2.h, luks2_disk_metadata.c.
"""

from __future__ import annotations

import struct
from typing import Any

from msgspec import Struct, field

from imager.device.partition_table import Read

_MAGIC, _SECOND = b"LUKS\xba\xbe", b"SKUL\xba\xbe"
_V1 = struct.Struct(">6sH32s32s32sII20s32sI40s")
_V1_SLOT = struct.Struct(">II32sII")
_V2 = struct.Struct(">6sHQQ48s32s64s40s48sQ184s64s")
_SIZES = tuple(0x4000 << i for i in range(9))  # 16 KiB to 4 MiB
_ACTIVE = 0x00AC71F3
_MAX_SLOTS = 32


class KeySlot(Struct, frozen=True):
    """A slot in use. `kdf`: pbkdf2, argon2i or argon2id. `iterations`: its cost in time, `memory` in KiB."""

    number: int
    kdf: str
    iterations: int
    memory: int = 0
    threads: int = 0


class Luks(Struct, frozen=True):
    """A header. `payload`: where the encrypted data begins, in bytes; `payload_size`: None for the rest.

    `tokens`: their types (systemd-tpm2, clevis ...).
    """

    version: int
    uuid: str
    label: str
    cipher: str
    key_bits: int
    hash: str
    payload: int
    payload_size: int | None
    sector: int
    slots: tuple[KeySlot, ...]
    tokens: tuple[str, ...] = ()
    from_second: bool = False
    problems: tuple[str, ...] = field(default=())


def read_luks(read: Read, size: int) -> Luks | None:
    """The header on a device of `size` bytes; None where none can be believed. Raises `OSError`."""
    head = read(0, 592)
    if head[:8] == _MAGIC + b"\0\1" and len(head) >= 592:
        return _v1(head)
    if head[:8] == _MAGIC + b"\0\2":
        found = _v2(read, 0, _MAGIC)
        if found is not None:
            return found
    for at in _SIZES:
        if read(at, 8) == _SECOND + b"\0\2":
            return _v2(read, at, _SECOND)
    return None


def has_magic(head: bytes) -> bool:
    """Whether a device's first bytes call it LUKS, whole or not."""
    return head[:6] == _MAGIC


def _v1(raw: bytes) -> Luks:
    _, _, name, mode, digest, payload, key_bytes, _, _, _, uuid = _V1.unpack_from(raw)
    slots = []
    for number in range(8):
        active, iterations, _, _, _ = _V1_SLOT.unpack_from(raw, 208 + 48 * number)
        if active == _ACTIVE:
            slots.append(KeySlot(number, "pbkdf2", iterations))
    return Luks(
        version=1,
        uuid=_text(uuid),
        label="",
        cipher=f"{_text(name)}-{_text(mode)}",
        key_bits=key_bytes * 8,
        hash=_text(digest),
        payload=payload * 512,
        payload_size=None,
        sector=512,
        slots=tuple(slots),
    )


def _v2(read: Read, at: int, magic: bytes) -> Luks | None:
    raw = read(at, 4096)
    if len(raw) < 4096:
        return None
    found, version, size, _, label, algorithm, _, uuid, _, offset, _, checksum = _V2.unpack_from(raw)
    if (found, version, offset) != (magic, 2, at) or size not in _SIZES:
        return None
    whole = read(at, size)
    name = _text(algorithm)
    if len(whole) != size or name not in ("sha256", "sha512", "sha1", "sha384"):
        return None
    import hashlib
    import json

    digest = hashlib.new(name, whole[:448] + bytes(64) + whole[512:]).digest()
    if checksum[: len(digest)] != digest:
        return None
    try:
        tree = json.loads(whole[4096:].split(b"\0")[0])
    except (ValueError, RecursionError):
        return None
    return _from_json(tree, _text(uuid), _text(label), at != 0)


def _from_json(tree: Any, uuid: str, label: str, second: bool) -> Luks | None:
    """Numbers that are not there, or are none, count as 0: the checksum has held, so no bit is at fault."""
    problems: list[str] = []
    segments = [item for _, item in _items(tree, "segments") if _word(item, "type") == "crypt"]
    if not segments:
        problems.append("it names no encrypted segment")
    first = min(segments, key=lambda item: _number(item, "offset")) if segments else {}
    slots = []
    for number, item in _items(tree, "keyslots")[:_MAX_SLOTS]:
        kdf = _child(item, "kdf")
        iterations = _number(kdf, "iterations") or _number(kdf, "time")
        slots.append(
            KeySlot(number, _word(kdf, "type"), iterations, _number(kdf, "memory"), _number(kdf, "cpus"))
        )
    sizes = [_number(item, "key_size") for _, item in _items(tree, "keyslots")]
    hashes = [_word(item, "hash") for _, item in _items(tree, "digests")]
    dynamic = first.get("size") == "dynamic"
    if _child(_child(tree, "config"), "requirements"):
        problems.append("it has requirements (a re-encryption may be under way)")
    return Luks(
        version=2,
        uuid=uuid,
        label=label,
        cipher=_word(first, "encryption"),
        key_bits=max(sizes, default=0) * 8,
        hash=next(iter(hashes), ""),
        payload=_number(first, "offset"),
        payload_size=None if dynamic else _number(first, "size"),
        sector=_number(first, "sector_size"),
        slots=tuple(sorted(slots, key=lambda slot: slot.number)),
        tokens=tuple(_word(item, "type") for _, item in _items(tree, "tokens")[:_MAX_SLOTS]),
        from_second=second,
        problems=tuple(problems),
    )


def _child(value: Any, key: str) -> dict[str, Any]:
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _items(tree: Any, key: str) -> list[tuple[int, dict[str, Any]]]:
    """The numbered objects below `key`."""
    found = _child(tree, key).items()
    return [
        (int(name), item)
        for name, item in found
        if name.isascii() and name.isdecimal() and len(name) < 6 and isinstance(item, dict)
    ]


def _word(value: Any, key: str) -> str:
    found = value.get(key) if isinstance(value, dict) else None
    return found[:64] if isinstance(found, str) else ""


def _number(value: Any, key: str) -> int:
    """A number, which LUKS2 writes as text where it may need 64 bits."""
    found = value.get(key) if isinstance(value, dict) else None
    if isinstance(found, str) and found.isascii() and found.isdecimal() and len(found) <= 19:
        return int(found)
    return found if isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 1 << 63 else 0


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode(errors="replace")
