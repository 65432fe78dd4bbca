"""The whole partitioning of a disk, for the layout that an image set keeps.

Invariant: a GPT is believed only where its checksums hold; a chain of logical
partitions ends at `MAX_LOGICAL` links and never visits a sector twice; what is
wrong with a table is said in `problems`, never raised. Reading errors are
the caller's (`OSError`).

Structures: UEFI specification 2.10, chapter 5 (GPT, protective MBR);
block/partitions/msdos.c and efi.h of Linux (extended partitions, hybrid MBRs).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from msgspec import Struct, field

from imager.device.partition_table import Read, guid_text, is_filesystem
from imager.extents import Extents

SECTORS = (512, 4096, 1024, 2048)
"""Logical sector sizes that are tried on an image file, which says none of its own."""
MAX_LOGICAL = 256
MAX_ENTRIES = 1024
GAP_SCAN = 2 << 20
"""How much of an unpartitioned stretch is looked at, at each of its ends, for bytes that are not zero."""

_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY = struct.Struct("<16s16sQQQ72s")
_MBR_ENTRY = struct.Struct("<B3sB3sII")
_EXTENDED = frozenset((0x05, 0x0F, 0x85))


class Partition(Struct, frozen=True):
    """One entry, in bytes. `type`: a GUID, or two hexadecimal digits in an MBR.

    `attributes`: the 64 bits of a GPT entry, or the status byte of an MBR entry (0x80: active).
    `container`: an extended partition, which holds logical ones.
    """

    number: int
    start: int
    size: int
    type: str
    uuid: str | None = None
    name: str | None = None
    attributes: int = 0
    logical: bool = False
    container: bool = False

    @property
    def end(self) -> int:
        """The byte after its last one."""
        return self.start + self.size


class Gap(Struct, frozen=True):
    """Bytes that no partition holds. `data`: what of the looked-at part is not zero, in bytes."""

    start: int
    size: int
    data: int
    looked_at: int


class Partitioning(Struct, frozen=True):
    """A partition table and what lies around it.

    `scheme`: gpt or dos. `sector`: what its addresses count in. `mbr`: protective, hybrid, plain, or none.
    `hybrid`: the entries of a hybrid MBR beside the protective one. `backup`: for a GPT, whether the
    table at the disk's end says the same (equal, differs, damaged, missing, only: the first one is
    damaged); None for an MBR. `backup_at`: where it stands. `usable`: the bytes that partitions may take.
    """

    scheme: str
    uuid: str | None
    sector: int
    partitions: tuple[Partition, ...]
    mbr: str
    hybrid: tuple[Partition, ...] = ()
    usable: tuple[int, int] | None = None
    backup: str | None = None
    backup_at: int | None = None
    gaps: tuple[Gap, ...] = ()
    problems: tuple[str, ...] = ()


class _Gpt(Struct):
    """One of the two tables, found whole."""

    at: int
    other: int
    first: int
    last: int
    disk: bytes
    entries: bytes
    entry_size: int
    entries_at: int


class _Found(Struct):
    """What is gathered on the way."""

    problems: list[str] = field(default_factory=list)


def read_partitioning(read: Read, size: int, sector: int | None = None) -> Partitioning | None:
    """The partitioning of a disk of `size` bytes; None where it has none.

    `sector`: its logical sector, None where that is not known (an image file): the size in which a whole
    GPT is found, else 512. Raises `OSError` where the disk cannot be read.
    """
    sizes = SECTORS if sector is None else (sector,)
    mbr = read(0, 512)
    signed = len(mbr) == 512 and mbr[510:] == b"\x55\xaa"
    for one in sizes:
        if size >= 4 * one and (found := _gpt(read, size, one, mbr, signed)) is not None:
            return found
    if not signed:
        return None
    return _dos(read, size, sizes[0], mbr)


# --- GPT ----------------------------------------------------------------------------


def _gpt(read: Read, size: int, sector: int, mbr: bytes, signed: bool) -> Partitioning | None:
    found = _Found()
    primary = _table(read, size, sector, 1, found.problems)
    at = primary.other if primary else size // sector - 1
    backup = _table(read, size, sector, at, found.problems)
    if backup is None and at != size // sector - 1:
        backup = _table(read, size, sector, size // sector - 1, [])
    table = primary or backup
    if table is None:
        return None
    if not primary:
        said = read(sector, 8) == b"EFI PART"
        found.problems.append(f"the first GPT is {'damaged' if said else 'missing'}: the backup is shown")
    partitions = tuple(_gpt_entries(table, sector, size, found.problems))
    entries = tuple(_mbr_entries(mbr, 0, sector)) if signed else ()
    beside = tuple(entry for entry in entries if entry.type != "ee")
    kind = "none" if not signed else "hybrid" if beside and len(beside) < len(entries) else "protective"
    if signed and len(beside) == len(entries):
        kind = "plain" if entries else "none"
        found.problems.append("there is a GPT, but its MBR does not protect it")
    usable = (min(table.first * sector, size), min((table.last + 1) * sector, size))
    state = "only" if primary is None else _compare(primary, backup, read(at * sector, 8))
    if state not in ("equal", "only"):
        found.problems.append(f"the backup GPT at the disk's end is {_STATES[state]}")
    elif backup and backup.at != size // sector - 1:
        found.problems.append(f"the backup GPT stands at byte {backup.at * sector}, not at the disk's end")
    tables = [(0, 2 * sector), _span(table, sector)]
    if backup:
        tables += [(backup.at * sector, (backup.at + 1) * sector), _span(backup, sector)]
    return Partitioning(
        scheme="gpt",
        uuid=guid_text(table.disk),
        sector=sector,
        partitions=partitions,
        mbr=kind,
        hybrid=beside if kind == "hybrid" else (),
        usable=usable,
        backup=state,
        backup_at=backup.at * sector if backup else None,
        gaps=tuple(_gaps(read, size, partitions, tables)),
        problems=(*found.problems, *_overlaps(partitions, size)),
    )


_STATES = {"differs": "another table than the first", "damaged": "damaged", "missing": "missing"}


def _span(table: _Gpt, sector: int) -> tuple[int, int]:
    start = table.entries_at * sector
    return start, start + len(table.entries)


def _table(read: Read, size: int, sector: int, lba: int, problems: list[str]) -> _Gpt | None:
    if not 0 < lba < size // sector:
        return None
    raw = read(lba * sector, sector)
    if len(raw) < _HEADER.size or raw[:8] != b"EFI PART":
        return None
    (_, _, length, crc, _, own, other, first, last, disk, entries_at, count, entry_size, entries_crc) = (
        _HEADER.unpack_from(raw)
    )
    if not 92 <= length <= sector or zlib.crc32(raw[:16] + bytes(4) + raw[20:length]) != crc:
        problems.append(f"the GPT header at byte {lba * sector} has a wrong checksum")
        return None
    if own != lba or count > MAX_ENTRIES or not 128 <= entry_size <= 4096 or entry_size % 8:
        problems.append(f"the GPT header at byte {lba * sector} has numbers that cannot be")
        return None
    if (entries_at * sector + count * entry_size) > size or entries_at < 1:
        problems.append(f"the GPT header at byte {lba * sector} places its entries outside of the disk")
        return None
    entries = read(entries_at * sector, count * entry_size) if count else b""
    if len(entries) != count * entry_size or zlib.crc32(entries) != entries_crc:
        problems.append(f"the GPT entries at byte {entries_at * sector} have a wrong checksum")
        return None
    return _Gpt(lba, other, first, last, disk, entries, entry_size, entries_at)


def _compare(primary: _Gpt, backup: _Gpt | None, magic: bytes) -> str:
    if backup is None:
        return "damaged" if magic == b"EFI PART" else "missing"
    same = (
        primary.disk == backup.disk
        and primary.entries == backup.entries
        and (primary.first, primary.last) == (backup.first, backup.last)
        and backup.other == primary.at
    )
    return "equal" if same else "differs"


def _gpt_entries(table: _Gpt, sector: int, size: int, problems: list[str]) -> Iterator[Partition]:
    for index in range(len(table.entries) // table.entry_size):
        kind, unique, first, last, attributes, name = _ENTRY.unpack_from(
            table.entries, index * table.entry_size
        )
        if kind == bytes(16):
            continue
        if last < first or last * sector >= 1 << 63:
            problems.append(f"partition {index + 1} ends before it begins")
            continue
        label = name.decode("utf-16-le", errors="replace").split("\0")[0]
        yield Partition(
            number=index + 1,
            start=first * sector,
            size=(last - first + 1) * sector,
            type=guid_text(kind) or "",
            uuid=guid_text(unique),
            name=label or None,
            attributes=attributes,
        )


# --- MBR ----------------------------------------------------------------------------


def _dos(read: Read, size: int, sector: int, mbr: bytes) -> Partitioning | None:
    if any(mbr[446 + 16 * i] not in (0x00, 0x80) for i in range(4)):
        return None
    entries = list(_mbr_entries(mbr, 0, sector))
    disk = struct.unpack_from("<I", mbr, 440)[0]
    if not entries and (not disk or is_filesystem(mbr)):
        return None
    problems: list[str] = []
    if any(entry.type == "ee" for entry in entries):
        problems.append("the MBR protects a GPT that is not there, or is damaged at both places")
    ident = f"{disk:08x}" if disk else None
    tables = [(0, sector)]
    for entry in [entry for entry in entries if entry.container]:
        logical, links = _logical(read, size, sector, entry, len(entries), problems)
        entries += logical
        tables += [(at, at + sector) for at in links]
    named = tuple(_named(entry, ident) for entry in entries)
    return Partitioning(
        scheme="dos",
        uuid=ident,
        sector=sector,
        partitions=named,
        mbr="plain",
        gaps=tuple(_gaps(read, size, [p for p in named if not p.container], tables)),
        problems=(*problems, *_overlaps([p for p in named if not p.container], size)),
    )


def _named(entry: Partition, disk: str | None) -> Partition:
    from msgspec.structs import replace

    return replace(entry, uuid=f"{disk}-{entry.number:02x}") if disk else entry


def _mbr_entries(raw: bytes, base: int, sector: int) -> Iterator[Partition]:
    """The four entries of a boot record, the empty ones left out; addresses count from sector `base`."""
    for index in range(4):
        status, _, kind, _, first, count = _MBR_ENTRY.unpack_from(raw, 446 + 16 * index)
        if kind and count:
            yield Partition(
                number=index + 1,
                start=(base + first) * sector,
                size=count * sector,
                type=f"{kind:02x}",
                attributes=status,
                container=kind in _EXTENDED,
            )


def _logical(
    read: Read, size: int, sector: int, container: Partition, taken: int, problems: list[str]
) -> tuple[list[Partition], list[int]]:
    """The logical partitions of an extended one, numbered from 5, and where their boot records stand.

    Each link holds one partition, counted from the link itself, and one next link, counted from the
    container's begin. As Linux does, entries that are empty are skipped.
    """
    out: list[Partition] = []
    visited: list[int] = []
    base = container.start // sector
    at = base
    while len(visited) < MAX_LOGICAL:
        if at * sector in visited:
            problems.append("the chain of logical partitions leads back to itself: the rest is left out")
            break
        raw = read(at * sector, 512) if at * sector + 512 <= size else b""
        if len(raw) < 512 or raw[510:] != b"\x55\xaa":
            problems.append(f"the chain of logical partitions breaks off at byte {at * sector}")
            break
        visited.append(at * sector)
        links = []
        for entry in _mbr_entries(raw, at, sector):
            if entry.container:
                links.append(base + (entry.start // sector - at))
            elif entry.number <= 2:
                number = 5 + len(out)
                out.append(
                    Partition(
                        number, entry.start, entry.size, entry.type, attributes=entry.attributes, logical=True
                    )
                )
        if not links:
            break
        at = links[0]
    else:
        problems.append(f"there are more than {MAX_LOGICAL} logical partitions: the rest is left out")
    return out, visited


# --- what lies around them ------------------------------------------------------------


def _gaps(
    read: Read, size: int, partitions: tuple[Partition, ...] | list[Partition], tables: list[tuple[int, int]]
) -> Iterator[Gap]:
    """Stretches that neither a partition nor the table takes; only those of a sector or more."""
    taken = Extents.of([*((p.start, min(p.end, size)) for p in partitions), *tables]).clip(size)
    for start, end in taken.complement(size):
        head = read(start, min(GAP_SCAN, end - start))
        tail = b""
        if end - start > len(head):
            tail = read(max(start + len(head), end - GAP_SCAN), min(GAP_SCAN, end - start - len(head)))
        data = sum(len(part) - part.count(0) for part in (head, tail))
        yield Gap(start, end - start, data, len(head) + len(tail))


def _overlaps(partitions: tuple[Partition, ...] | list[Partition], size: int) -> Iterator[str]:
    end, last = 0, 0
    for partition in sorted(partitions, key=lambda p: (p.start, p.number)):
        if partition.start < end:
            yield f"partitions {last} and {partition.number} overlap"
        if partition.end > size:
            yield f"partition {partition.number} reaches {partition.end - size} bytes beyond the disk's end"
        if partition.end > end:
            end, last = partition.end, partition.number
