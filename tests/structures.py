"""Structures of disks made byte by byte, for what no tool makes without a kernel that has it."""

from __future__ import annotations

import hashlib
import struct
import uuid
import zlib
from collections.abc import Sequence
from typing import Any

import msgspec

MD_UUID = bytes(range(16))


def md_1(
    size: int, version: str, *, role: int = 1, level: int = 5, name: bytes = b"host:data"
) -> tuple[int, bytes]:
    """(place, superblock) of an md member with metadata 1.x, after include/uapi/linux/raid/md_p.h."""
    sectors = size // 512
    at = {"1.0": (sectors - 16) & ~7, "1.1": 0, "1.2": 8}[version]
    raw = bytearray(512)
    struct.pack_into(
        "<4I16s32sQiIQIIii",
        raw,
        0,
        0xA92B4EFC,
        1,
        0,
        0,
        MD_UUID,
        name,
        1795600000,
        level,
        2,
        20480,
        128,
        3,
        0,
        0,
    )
    struct.pack_into(
        "<QQQQII16s", raw, 128, 2048 if version != "1.0" else 0, 20480, at, 0, role, 0, MD_UUID[::-1]
    )
    most = 16
    struct.pack_into("<QQQII", raw, 192, 1795600001, 77, (1 << 64) - 1, 0, most)
    for index in range(most):
        struct.pack_into("<H", raw, 256 + 2 * index, index if index < 3 else 0xFFFF)
    total = sum(struct.unpack_from(f"<{(256 + 2 * most) // 4}I", raw))
    struct.pack_into("<I", raw, 216, ((total & 0xFFFFFFFF) + (total >> 32)) & 0xFFFFFFFF)
    return at * 512, bytes(raw)


def md_0(size: int, *, slot: int = 0) -> tuple[int, bytes]:
    """The same with metadata 0.90: a RAID1 of two."""
    words = [0] * 1024
    words[0:12] = [0xA92B4EFC, 0, 90, 0, 0, 0x11111111, 1795600000, 1, 10240, 2, 2, 0]
    words[13:16] = [0x22222222, 0x33333333, 0x44444444]
    words[32:38] = [1795600001, 1, 2, 2, 0, 0]
    words[39] = 78
    for number in range(2):
        words[128 + 32 * number : 128 + 32 * number + 5] = [number, 8, 16 + number, number, 6]
    words[992:997] = [slot, 8, 16 + slot, slot, 6]
    total = sum(words)
    words[38] = ((total & 0xFFFFFFFF) + (total >> 32)) & 0xFFFFFFFF
    return (size & ~0xFFFF) - 0x10000, struct.pack("<1024I", *words)


def luks2(tree: Any, *, size: int = 0x4000, at: int = 0, text: bytes | None = None) -> bytes:
    """A LUKS2 header with the right checksum around any JSON."""
    body = msgspec.json.encode(tree) if text is None else text
    magic = b"LUKS\xba\xbe" if at == 0 else b"SKUL\xba\xbe"
    raw = bytearray(size)
    own = b"9dabdb36-f8a9-4889-88df-2eb5d22c3813"
    struct.pack_into(
        ">6sHQQ48s32s64s40s48sQ", raw, 0, magic, 2, size, 3, b"label", b"sha256", b"salt", own, b"", at
    )
    raw[4096 : 4096 + len(body)] = body[: size - 4096]
    raw[448:480] = hashlib.sha256(bytes(raw)).digest()
    return bytes(raw)


def gpt(
    size: int,
    entries: Sequence[tuple[int, int]],
    *,
    sector: int = 512,
    count: int = 128,
    entry_size: int = 128,
) -> bytearray:
    """A disk with a protective MBR and both tables; entries as (first, last) sector."""
    raw = bytearray(size)
    count, entry_size = 128, 128
    last = size // sector - 1
    raw[446 + 4] = 0xEE
    struct.pack_into("<II", raw, 446 + 8, 1, min(last, 0xFFFFFFFF))
    raw[510:512] = b"\x55\xaa"
    table = bytearray(count * entry_size)
    for index, (first, end) in enumerate(entries):
        kind, own = uuid.UUID(int=0x0FC63DAF + index).bytes_le, uuid.UUID(int=index + 1).bytes_le
        name = f"part {index + 1}".encode("utf-16-le")
        struct.pack_into("<16s16sQQQ72s", table, index * entry_size, kind, own, first, end, index, name)
    length = -(-len(table) // sector)
    disk = uuid.UUID(int=0xD15C).bytes_le
    for at, other, place in ((1, last, 2), (last, 1, last - length)):
        usable = (2 + length, last - length - 1)
        told = (*usable, disk, place, count, entry_size, zlib.crc32(table))
        head = bytearray(struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, at, other, *told))
        struct.pack_into("<I", head, 16, zlib.crc32(head))
        raw[at * sector : at * sector + 92] = head
        raw[place * sector : place * sector + len(table)] = table
    return raw


def mbr(size: int, entries: Sequence[tuple[int, int, int]]) -> bytearray:
    """A disk with an MBR; entries as (type, first sector, sectors)."""
    raw = bytearray(size)
    struct.pack_into("<I", raw, 440, 0x1234ABCD)
    boot_record(raw, 0, entries)
    return raw


def boot_record(raw: bytearray, at: int, entries: Sequence[tuple[int, int, int]]) -> None:
    """A boot record at sector `at`, as of an MBR or of a link in the chain of logical partitions."""
    for index, (kind, first, count) in enumerate(entries):
        struct.pack_into("<B3xB3xII", raw, at * 512 + 446 + 16 * index, 0, kind, first, count)
    raw[at * 512 + 510 : at * 512 + 512] = b"\x55\xaa"
