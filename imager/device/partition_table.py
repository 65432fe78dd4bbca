"""The partition table's own words: GPT and MBR, read from the device itself.

Invariant: a GPT is believed only where its header's and entries' checksums
hold (the backup header is asked where the first does not), and reading is
bounded whatever the bytes say. Anything else is None, never an exception.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Callable

from msgspec import Struct

Read = Callable[[int, int], bytes]
"""`read(offset, length)`; it may return less at the end."""

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_MAX_ENTRIES = 1024
_MAX_ENTRY_SIZE = 4096
_EXTENDED = (0x05, 0x0F, 0x85)


class Entry(Struct, frozen=True):
    """One partition, in bytes. `type` is a GUID, or two hex digits in an MBR."""

    number: int
    start: int
    size: int
    type: str
    uuid: str | None
    name: str | None


class Table(Struct, frozen=True):
    """A table: `scheme` is gpt or dos. Logical partitions of an MBR are not walked."""

    scheme: str
    uuid: str | None
    entries: tuple[Entry, ...]
    from_backup: bool = False

    def partition_uuid(self, number: int) -> str | None:
        """The PARTUUID of a partition, logical ones included."""
        if self.scheme == "dos":
            return f"{self.uuid}-{number:02x}" if self.uuid else None
        return next((e.uuid for e in self.entries if e.number == number), None)


def read_table(read: Read, size: int, sector: int) -> Table | None:
    """The table of a disk of `size` bytes with logical sectors of `sector` bytes."""
    if sector < 512 or size < 2 * sector:
        return None
    mbr = read(0, 512)
    if len(mbr) < 512 or mbr[510:512] != b"\x55\xaa":
        return _gpt(read, size, sector, size // sector - 1)
    if any(mbr[446 + 16 * i + 4] == 0xEE for i in range(4)):
        return _gpt(read, size, sector, 1) or _gpt(read, size, sector, size // sector - 1)
    return _mbr(mbr, sector)


def _gpt(read: Read, size: int, sector: int, lba: int) -> Table | None:
    raw = read(lba * sector, sector)
    if len(raw) < _HEADER.size:
        return None
    (signature, _, length, crc, _, my_lba, _, _, _, disk, entries_lba, count, entry_size, entries_crc) = (
        _HEADER.unpack_from(raw)
    )
    if signature != b"EFI PART" or not 92 <= length <= sector or my_lba != lba:
        return None
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:length]) != crc:
        return None
    if count > _MAX_ENTRIES or not 128 <= entry_size <= _MAX_ENTRY_SIZE:
        return None
    if entries_lba * sector + count * entry_size > size:
        return None
    table = read(entries_lba * sector, count * entry_size)
    if len(table) != count * entry_size or zlib.crc32(table) != entries_crc:
        return None
    entries = (_entry(table, i, entry_size, sector) for i in range(count))
    return Table("gpt", guid_text(disk), tuple(e for e in entries if e), from_backup=lba != 1)


def _entry(table: bytes, index: int, entry_size: int, sector: int) -> Entry | None:
    kind, unique, first, last, _, name = _ENTRY.unpack_from(table, index * entry_size)
    if kind == bytes(16) or last < first:
        return None
    label = name.decode("utf-16-le", errors="replace").split("\0")[0]
    length = (last - first + 1) * sector
    return Entry(index + 1, first * sector, length, guid_text(kind) or "", guid_text(unique), label or None)


def guid_text(raw: bytes) -> str | None:
    """A GUID as UEFI stores it, in its usual form; None where it is all zeroes."""
    return None if raw == bytes(16) else str(uuid.UUID(bytes_le=raw))


def _mbr(mbr: bytes, sector: int) -> Table | None:
    """A disk that is one filesystem may end its boot sector alike: its entries make no sense."""
    entries = []
    for i in range(4):
        flag, kind, first, count = struct.unpack_from("<B3xB3xII", mbr, 446 + 16 * i)
        if flag not in (0x00, 0x80):
            return None
        if kind and count:
            entries.append(Entry(i + 1, first * sector, count * sector, f"{kind:02x}", None, None))
    disk = struct.unpack_from("<I", mbr, 440)[0]
    if not entries and (not disk or is_filesystem(mbr)):
        return None
    ident = f"{disk:08x}" if disk else None
    known = (Entry(e.number, e.start, e.size, e.type, f"{ident}-{e.number:02x}", None) for e in entries)
    return Table("dos", ident, tuple(known) if ident else tuple(entries))


def is_filesystem(sector: bytes) -> bool:
    """Whether a boot sector is that of a FAT, an exFAT or an NTFS, which ends as an MBR does."""
    return sector[3:11] in (b"NTFS    ", b"EXFAT   ") or sector[54:57] == b"FAT" or sector[82:85] == b"FAT"


def is_extended(entry: Entry) -> bool:
    """Whether this MBR entry is the container of logical partitions."""
    return entry.type in {f"{kind:02x}" for kind in _EXTENDED}
