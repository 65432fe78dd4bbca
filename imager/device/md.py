"""Members of Linux software RAID: their superblocks, read from the device itself.

Invariant: a superblock is reported only where its magic, its version, and its
place fit; whether its checksum holds is said beside it. Nothing else is read.

Structures: include/uapi/linux/raid/md_p.h of Linux (`mdp_superblock_s`, `mdp_superblock_1`); places
and checksums: drivers/md/md.c (`super_90_load`, `super_1_load`, `calc_sb_csum`, `calc_sb_1_csum`).
"""

from __future__ import annotations

import struct

from msgspec import Struct

from imager.device.partition_table import Read

_MAGIC = 0xA92B4EFC
_V1 = struct.Struct("<4I16s32sQiIQIIiiQiIIi")  # to new_offset, 128 bytes
_V1_DEVICE = struct.Struct("<QQQQII16sBBHI")  # data_offset .. bblog_offset, from 128
_V1_STATE = struct.Struct("<QQQII")  # utime .. max_dev, from 192
_MAX_DEVICES = 1920  # what fits into the 4 KiB of a superblock
_ROLES = {0xFFFF: "spare", 0xFFFE: "faulty", 0xFFFD: "journal"}
_LEVELS = {-4: "multipath", -1: "linear", -5: "faulty", 0: "raid0"}
_SECTOR = 512


class Member(Struct, frozen=True):
    """What a member says of its array. Sizes and places in bytes.

    `version`: 0.90, 1.0, 1.1 or 1.2. `role`: the number of its slot, or spare, faulty, journal.
    `data_offset`, `data_size`: where the array's data stands on this member. `layout`, `chunk`: as the level
    understands them. `clean`: no resynchronisation is under way. `whole`: the checksum holds.
    """

    version: str
    uuid: str
    name: str
    level: str
    devices: int
    role: str
    events: int
    chunk: int
    layout: int
    data_offset: int
    data_size: int
    superblock_at: int
    device_uuid: str
    clean: bool
    features: int
    whole: bool


def read_member(read: Read, size: int) -> Member | None:
    """The superblock on a device of `size` bytes; None where there is none. Raises `OSError`."""
    sectors = size // _SECTOR
    places = (("1.1", 0), ("1.2", 8), ("1.0", (sectors - 16) & ~7))
    for version, at in places:
        if 0 <= at and at * _SECTOR + 4096 <= size:
            found = _v1(read(at * _SECTOR, 4096), version, at)
            if found is not None:
                return found
    at = (size & ~0xFFFF) - 0x10000
    return _v0(read(at, 4096), at) if at >= 0 else None


def _v1(raw: bytes, version: str, at: int) -> Member | None:
    if len(raw) < 4096:
        return None
    (magic, major, features, _, uuid, name, _, level, layout, per_device, chunk, devices, *_) = (
        _V1.unpack_from(raw)
    )
    if magic != _MAGIC or major != 1:
        return None
    data_offset, data_size, place, recovery, number, _, device_uuid, *_ = _V1_DEVICE.unpack_from(raw, 128)
    _, events, resync, checksum, most = _V1_STATE.unpack_from(raw, 192)
    if place != at or most > _MAX_DEVICES:
        return None
    role = struct.unpack_from("<H", raw, 256 + 2 * number)[0] if number < most else 0xFFFF
    return Member(
        version=version,
        uuid=_colons(uuid),
        name=name.split(b"\0")[0].decode(errors="replace"),
        level=_level(level),
        devices=devices,
        role=_ROLES.get(role, str(role)),
        events=events,
        chunk=chunk * _SECTOR,
        layout=layout,
        data_offset=_bytes(data_offset),
        data_size=_bytes(data_size or per_device),
        superblock_at=at * _SECTOR,
        device_uuid=_colons(device_uuid),
        clean=resync == (1 << 64) - 1 and not (features & 2),
        features=features,
        whole=_checksum_1(raw, most) == checksum,
    )


def _checksum_1(raw: bytes, most: int) -> int:
    length = 256 + 2 * most
    covered = raw[:216] + bytes(4) + raw[220:length]
    total: int = sum(struct.unpack_from(f"<{length // 4}I", covered))
    if length % 4:
        total += struct.unpack_from("<H", covered, length - 2)[0]
    return ((total & 0xFFFFFFFF) + (total >> 32)) & 0xFFFFFFFF


def _v0(raw: bytes, at: int) -> Member | None:
    """The old one, in the byte order of the machine that wrote it: little-endian is read."""
    if len(raw) < 4096:
        return None
    words = struct.unpack("<1024I", raw)
    if words[0] != _MAGIC or words[1] != 0 or words[2] not in (90, 91):
        return None
    total = sum(words) - words[38]
    slot, state = words[995], words[996]
    role = str(slot) if state & 2 and slot < words[10] else "faulty" if state & 1 else "spare"
    level = words[7] - (1 << 32) if words[7] >> 31 else words[7]
    return Member(
        version="0.90",
        uuid=":".join(f"{words[i]:08x}" for i in (5, 13, 14, 15)),
        name="",
        level=_level(level),
        devices=words[10],
        role=role,
        events=words[39] | words[40] << 32,
        chunk=words[65],
        layout=words[64],
        data_offset=0,
        data_size=words[8] * 1024,
        superblock_at=at,
        device_uuid="",
        clean=bool(words[33] & 1) and words[2] == 90,
        features=0,
        whole=((total & 0xFFFFFFFF) + (total >> 32)) & 0xFFFFFFFF == words[38],
    )


def _bytes(sectors: int) -> int:
    """A number that cannot be is cut to the largest that a device may have."""
    return min(sectors * _SECTOR, (1 << 63) - 1)


def _level(number: int) -> str:
    return _LEVELS.get(number) or (f"raid{number}" if number >= 0 else f"level {number}")


def _colons(uuid: bytes) -> str:
    """As mdadm writes it."""
    text = uuid.hex()
    return ":".join(text[i : i + 8] for i in range(0, 32, 8))
