"""LVM physical volumes: label, metadata, volume group, logical volumes.

Invariant: a label, a metadata header and a text are believed only where their
checksums hold; every number from the text is bounded before it is used.

Structures: lib/format_text/layout.h, lib/label/label.c, lib/misc/crc.c and
lib/format_text/import_vsn1.c of LVM2.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from imager.device import lvm_text
from imager.device.lvm_text import Section
from imager.device.partition_table import Read

_SECTOR = 512
_LABEL = struct.Struct("<8sQII8s")
_MDA = struct.Struct("<I16sIQQ")
_LOCATION = struct.Struct("<QQII")
_MDA_MAGIC = b" LVM2 x[5A%r0N*>"
_IGNORED = 1
_MAX_AREAS = 32
_MAX_VOLUMES = 8192
_MAX_SEGMENTS = 65536
_MOST = 1 << 62


class Area(Struct, frozen=True):
    """A range of a physical volume, in bytes."""

    start: int
    size: int


class Piece(Struct, frozen=True):
    """A place of a segment: `on` a physical volume (`pv0`) or another logical volume, from `extent`."""

    on: str
    extent: int


class Segment(Struct, frozen=True):
    """A run of a logical volume, in extents.

    `type`: striped (linear where it has one piece), mirror, raid1 ... `each`: how many extents it takes of
    each of its `pieces`. `refers`: other volumes by role (pool, metadata, origin).
    """

    start: int
    extents: int
    type: str
    each: int
    stripe_size: int
    pieces: tuple[Piece, ...]
    refers: tuple[tuple[str, str], ...] = ()


class LogicalVolume(Struct, frozen=True):
    """A logical volume. `kind`: linear, striped, mirror, thin, thin-pool, raid1 ... `size` in bytes."""

    name: str
    uuid: str
    kind: str
    size: int
    visible: bool
    status: tuple[str, ...]
    segments: tuple[Segment, ...]


class Member(Struct, frozen=True):
    """A physical volume of the group. `device`: where it was seen last, a hint. Sizes and places in bytes."""

    name: str
    uuid: str
    device: str
    size: int
    data_at: int
    extents: int
    status: tuple[str, ...]


class VolumeGroup(Struct, frozen=True):
    """A volume group as its metadata tells. `extent`: bytes. `sequence`: grows with every change."""

    name: str
    uuid: str
    sequence: int
    extent: int
    status: tuple[str, ...]
    members: tuple[Member, ...]
    volumes: tuple[LogicalVolume, ...]


class PhysicalVolume(Struct, frozen=True):
    """A label, and the metadata that stands on this device.

    `group` is None for a volume of no group, or where `problems` say why it could not be read. `text`: the
    metadata as vgcfgrestore takes it. `own`: the name of this volume in the group.
    """

    uuid: str
    size: int
    data: tuple[Area, ...]
    metadata: tuple[Area, ...]
    bootloader: tuple[Area, ...]
    group: VolumeGroup | None
    own: str | None
    text: str
    problems: tuple[str, ...] = ()

    def member(self) -> Member | None:
        """This volume as its group knows it."""
        if self.group is None:
            return None
        return next((member for member in self.group.members if member.name == self.own), None)


def checksum(raw: bytes) -> int:
    """LVM's CRC-32: another start value, and no final inversion."""
    return zlib.crc32(raw, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def read_physical(read: Read, size: int) -> PhysicalVolume | None:
    """The physical volume on a device of `size` bytes; None where no whole label is. Raises `OSError`."""
    head = read(0, 4 * _SECTOR)
    for number in range(len(head) // _SECTOR):
        raw = head[number * _SECTOR : (number + 1) * _SECTOR]
        name, sector, crc, offset, kind = _LABEL.unpack_from(raw)
        if name == b"LABELONE" and kind == b"LVM2 001" and sector == number and checksum(raw[20:]) == crc:
            return _physical(read, size, raw, offset)
    return None


def _physical(read: Read, size: int, raw: bytes, offset: int) -> PhysicalVolume | None:
    if not 32 <= offset <= _SECTOR - 40:
        return None
    uuid = _uuid(raw[offset : offset + 32])
    told = struct.unpack_from("<Q", raw, offset + 32)[0]
    problems: list[str] = []
    at = offset + 40
    data, at = _areas(raw, at)
    metadata, at = _areas(raw, at)
    bootloader: tuple[Area, ...] = ()
    if at + 8 <= _SECTOR and struct.unpack_from("<I", raw, at)[0]:
        bootloader, _ = _areas(raw, at + 8)
    copies = []
    for area in metadata:
        text = _metadata(read, size, area, problems)
        if text is not None:
            copies.append(text)
    if not metadata:
        problems.append("it keeps no metadata of its own")
    if len(set(copies)) > 1:
        problems.append("its metadata areas do not say the same")
    group, text, own = None, copies[0] if copies else "", None
    if text and not problems:
        try:
            group = parse_group(text)
            own = next((member.name for member in group.members if member.uuid == uuid), None)
            if own is None:
                problems.append(f"the volume group {group.name} does not know it")
        except ValueError as error:
            problems.append(str(error))
    return PhysicalVolume(uuid, told, data, metadata, bootloader, group, own, text, tuple(problems))


def _areas(raw: bytes, at: int) -> tuple[tuple[Area, ...], int]:
    """A list of areas that ends with zeroes, and where it ends."""
    out: list[Area] = []
    while at + 16 <= len(raw) and len(out) < _MAX_AREAS:
        start, length = struct.unpack_from("<QQ", raw, at)
        at += 16
        if not start:
            return tuple(out), at
        out.append(Area(start, length))
    return tuple(out), len(raw)


def _metadata(read: Read, size: int, area: Area, problems: list[str]) -> str | None:
    """The text in a metadata area, "" for a volume of no group, None where it cannot be believed."""
    where = f"its metadata area at byte {area.start}"
    if not 0 < area.size <= size or area.start > size - area.size:
        problems.append(f"{where} lies outside of it")
        return None
    raw = read(area.start, _SECTOR)
    if len(raw) < _SECTOR or checksum(raw[4:]) != struct.unpack_from("<I", raw)[0]:
        problems.append(f"{where} has a damaged header")
        return None
    _, magic, version, start, length = _MDA.unpack_from(raw)
    if magic != _MDA_MAGIC or version != 1 or (start, length) != (area.start, area.size):
        problems.append(f"{where} has a header that does not fit")
        return None
    offset, count, crc, flags = _LOCATION.unpack_from(raw, _MDA.size)
    if flags & _IGNORED:
        problems.append(f"{where} is set to be ignored")
        return None
    if _LOCATION.unpack_from(raw, _MDA.size + _LOCATION.size)[0]:
        problems.append(f"{where} holds a change that is not committed")
        return None
    if not offset:
        return ""
    if not _SECTOR <= offset < length or count > min(length - _SECTOR, lvm_text.MAX_TEXT):
        problems.append(f"{where} places its text outside")
        return None
    first = min(count, length - offset)
    text = read(area.start + offset, first)
    if first < count:  # The area is a ring behind its header.
        text += read(area.start + _SECTOR, count - first)
    if len(text) != count or checksum(text) != crc:
        problems.append(f"{where} has a text with a wrong checksum")
        return None
    return text.rstrip(b"\0").decode(errors="replace")


def _uuid(raw: bytes) -> str:
    """As LVM writes it: groups of 6-4-4-4-4-4-6."""
    text = raw.decode("ascii", errors="replace")
    out, at = [], 0
    for length in (6, 4, 4, 4, 4, 4, 6):
        out.append(text[at : at + length])
        at += length
    return "-".join(out)


# --- the group ------------------------------------------------------------------------


def parse_group(text: str) -> VolumeGroup:
    """The volume group of a metadata text. Raises `ValueError`."""
    tree = lvm_text.parse(text)
    groups = [(name, value) for name, value in tree.items() if isinstance(value, dict)]
    if len(groups) != 1:
        raise ValueError(f"the metadata describes {len(groups)} volume groups")
    name, body = groups[0]
    extent = _number(body, "extent_size", 1) * _SECTOR
    members = tuple(_member(key, value) for key, value in _sections(body, "physical_volumes"))
    found = _sections(body, "logical_volumes")
    if len(found) > _MAX_VOLUMES:
        raise ValueError(f"the metadata describes more than {_MAX_VOLUMES} logical volumes")
    volumes = tuple(_volume(key, value, extent) for key, value in found)
    if sum(len(volume.segments) for volume in volumes) > _MAX_SEGMENTS:
        raise ValueError(f"the metadata describes more than {_MAX_SEGMENTS} segments")
    known = {member.name for member in members} | {volume.name for volume in volumes}
    for volume in volumes:
        for segment in volume.segments:
            stranger = next((piece.on for piece in segment.pieces if piece.on not in known), None)
            if stranger is not None:
                raise ValueError(f"{volume.name} stands on {stranger!r}, which is not described")
    return VolumeGroup(
        name, _text(body, "id"), _number(body, "seqno"), extent, _status(body), members, volumes
    )


def _member(name: str, body: Section) -> Member:
    return Member(
        name=name,
        uuid=_text(body, "id"),
        device=_text(body, "device"),
        size=_number(body, "dev_size", default=0) * _SECTOR,
        data_at=_number(body, "pe_start") * _SECTOR,
        extents=_number(body, "pe_count"),
        status=_status(body),
    )


def _volume(name: str, body: Section, extent: int) -> LogicalVolume:
    count = _number(body, "segment_count", default=0)
    if count > _MAX_SEGMENTS:
        raise ValueError(f"{name} has {count} segments")
    parts = [value for key, value in body.items() if isinstance(value, dict) and key.startswith("segment")]
    if len(parts) != count:
        raise ValueError(f"{name} says it has {count} segments, and describes {len(parts)}")
    segments = tuple(_segment(name, part) for part in parts)
    extents = sum(segment.extents for segment in segments)
    if extents * extent >= _MOST:
        raise ValueError(f"{name} is larger than can be")
    status = _status(body)
    kinds = list(dict.fromkeys(_kind(segment) for segment in segments))
    return LogicalVolume(
        name=name,
        uuid=_text(body, "id"),
        kind="+".join(kinds[:4]),
        size=extents * extent,
        visible="VISIBLE" in status,
        status=status,
        segments=segments,
    )


def _kind(segment: Segment) -> str:
    if segment.type == "striped":
        return "linear" if len(segment.pieces) == 1 else "striped"
    return segment.type


def _segment(volume: str, body: Section) -> Segment:
    kind = _text(body, "type").split("+")[0]
    extents = _number(body, "extent_count", 1)
    pieces: list[Piece] = []
    stripes = _number(body, "stripe_count", default=0)
    for key in ("stripes", "mirrors", "raids"):
        pieces += _pieces(volume, body, key)
    if kind == "striped" and (not pieces or stripes != len(pieces) or extents % stripes):
        raise ValueError(f"a segment of {volume} has {stripes} stripes and {len(pieces)} places")
    each = extents // len(pieces) if kind == "striped" else extents
    refers = tuple(
        (key, value) for key, value in body.items() if isinstance(value, str) and key not in ("type", "id")
    )
    return Segment(
        start=_number(body, "start_extent"),
        extents=extents,
        type=kind,
        each=each,
        stripe_size=_number(body, "stripe_size", default=0) * _SECTOR,
        pieces=tuple(pieces),
        refers=refers,
    )


def _pieces(volume: str, body: Section, key: str) -> Iterator[Piece]:
    """`[name, extent, name, extent ...]`; of raids, `[metadata volume, data volume ...]` by name alone."""
    values = body.get(key, [])
    if not isinstance(values, list):
        raise ValueError(f"{key} of {volume} is no list")
    at = 0
    while at < len(values):
        name = values[at]
        if not isinstance(name, str):
            raise ValueError(f"{key} of {volume} names no volume")
        numbered = at + 1 < len(values) and isinstance(values[at + 1], int)
        extent = values[at + 1] if numbered else 0
        if not 0 <= extent < _MOST:
            raise ValueError(f"{key} of {volume} has an extent that cannot be")
        yield Piece(name, extent)
        at += 2 if numbered else 1


def _sections(body: Section, key: str) -> list[tuple[str, Section]]:
    found = body.get(key, {})
    if not isinstance(found, dict) or not all(isinstance(value, dict) for value in found.values()):
        raise ValueError(f"{key} in the metadata is not a list of sections")
    return list(found.items())


def _number(body: Section, key: str, least: int = 0, default: int | None = None) -> int:
    value: Any = body.get(key, default)
    if not isinstance(value, int) or not least <= value < _MOST // _SECTOR:
        raise ValueError(f"{key} in the metadata is {str(value)[:40]!r}, which cannot be")
    return value


def _text(body: Section, key: str) -> str:
    value = body.get(key, "")
    return value[:256] if isinstance(value, str) else ""


def _status(body: Section) -> tuple[str, ...]:
    value = body.get("status", [])
    return tuple(str(one)[:64] for one in value[:32]) if isinstance(value, list) else ()
