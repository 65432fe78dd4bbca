"""Which filesystem stands somewhere: its type, label, UUID and geometry, by its magic.

Invariant: an answer is a guess from magics, good for showing and for making a
filesystem anew, never a reason to leave out a block. Types, labels and UUIDs are
written as blkid writes them.

Structures: fs/ext4/ext4.h, fs/xfs/libxfs/xfs_format.h, include/uapi/linux/btrfs_tree.h,
fs/squashfs/squashfs_fs.h of Linux; ECMA-119 (ISO 9660); Microsoft's FAT and exFAT specifications;
libblkid/src/superblocks of util-linux, whose words these are.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from imager.device.window import Readable
from imager.filesystem import swap

_MOST = (1 << 63) - 1
_FOLDER = 64 << 10
"""So much of a root folder is searched for a label."""


class Filesystem(Struct, frozen=True):
    """What a superblock says. `block`: unit of allocation, `size`: of the filesystem, both in bytes.

    `devices`: of how many devices it is made (btrfs).
    """

    type: str
    label: str | None
    uuid: str | None
    block: int
    size: int
    devices: int = 1


def identify(window: Readable) -> Filesystem | None:
    """The filesystem that fills a window; None where none is known. Raises `OSError`."""
    for reader in _READERS:
        try:
            found = reader(window)
        except struct.error:  # cut short
            continue
        if found is not None:
            return replace(found, size=min(found.size, _MOST)) if found.size > _MOST else found
    return None


def _ext(window: Readable) -> Filesystem | None:
    raw = window.read(1024, 1024)
    if raw[56:58] != b"\x53\xef" or len(raw) < 1024:
        return None
    low, shift = struct.unpack_from("<I", raw, 4)[0], struct.unpack_from("<I", raw, 24)[0]
    compat, incompat, ro = struct.unpack_from("<III", raw, 92)
    if shift > 6:
        return None
    if incompat & 8:
        kind = "jbd"
    elif incompat & ~0x16 or ro & ~7:
        kind = "ext4"
    elif compat & 4:
        kind = "ext3"
    else:
        kind = "ext2" if not incompat & 4 else "ext4"
    high = struct.unpack_from("<I", raw, 336)[0] if incompat & 0x80 else 0
    block = 1024 << shift
    return Filesystem(kind, _text(raw[120:136]), _uuid(raw[104:120]), block, (high << 32 | low) * block)


def _xfs(window: Readable) -> Filesystem | None:
    raw = window.read(0, 512)
    if raw[:4] != b"XFSB":
        return None
    block, blocks = struct.unpack_from(">IQ", raw, 4)
    return Filesystem("xfs", _text(raw[108:120]), _uuid(raw[32:48]), block, blocks * block)


def _btrfs(window: Readable) -> Filesystem | None:
    raw = window.read(0x10000, 4096)
    if raw[64:72] != b"_BHRfS_M":
        return None
    devices, sector = struct.unpack_from("<Q", raw, 0x88)[0], struct.unpack_from("<I", raw, 0x90)[0]
    size = struct.unpack_from("<Q", raw, 0xC9 + 8)[0]  # of this device
    return Filesystem("btrfs", _text(raw[0x12B : 0x12B + 256]), _uuid(raw[32:48]), sector, size, devices)


def _fat(window: Readable) -> Filesystem | None:
    raw = window.read(0, 512)
    if raw[510:] != b"\x55\xaa" or raw[0] not in (0xE9, 0xEB) or raw[3:11] in (b"NTFS    ", b"EXFAT   "):
        return None
    sector, per, reserved, fats, roots, small, media, fat = struct.unpack_from("<HBHBHHBH", raw, 11)
    total = small or struct.unpack_from("<I", raw, 32)[0]
    wide = fat == 0
    fat = fat or struct.unpack_from("<I", raw, 36)[0]
    if sector not in (512, 1024, 2048, 4096) or not per or per & (per - 1) or not fats or not reserved:
        return None
    if not (media == 0xF0 or media >= 0xF8) or not fat or not total or wide != (roots == 0):
        return None
    at = 64 if wide else 36
    marked = raw[at + 2] in (0x28, 0x29)
    serial = struct.unpack_from("<I", raw, at + 3)[0] if marked else 0
    folder = (reserved + fats * fat) * sector
    if wide:
        folder += (struct.unpack_from("<I", raw, 44)[0] - 2) * per * sector
    length = min(_FOLDER, per * sector if wide else roots * 32)
    label = _fat_label(window.read(folder, length)) or (raw[at + 7 : at + 18] if marked else b"")
    text = label.decode("ascii" if label.isascii() else "cp437").rstrip(" \0") or None
    if text == "NO NAME":
        text = None
    number = f"{serial >> 16:04X}-{serial & 0xFFFF:04X}" if serial else None
    return Filesystem("vfat", text, number, per * sector, total * sector)


def _fat_label(folder: bytes) -> bytes:
    for at in range(0, len(folder) - 31, 32):
        entry = folder[at : at + 32]
        if entry[0] == 0:
            break
        if entry[0] != 0xE5 and entry[11] & 0x3F != 0x0F and entry[11] & 0x18 == 0x08:
            return (b"\xe5" + entry[1:11]) if entry[0] == 5 else entry[:11]
    return b""


def _exfat(window: Readable) -> Filesystem | None:
    raw = window.read(0, 512)
    if raw[3:11] != b"EXFAT   " or raw[510:] != b"\x55\xaa":
        return None
    sector, cluster = raw[108], raw[108] + raw[109]
    if not 9 <= sector <= 12 or not sector <= cluster <= 25:
        return None
    heap, _, root, serial = struct.unpack_from("<IIII", raw, 88)
    label = None
    folder = window.read(
        (heap << sector) + (root - 2 << cluster) if root >= 2 else -1, min(_FOLDER, 1 << cluster)
    )
    for at in range(0, len(folder) - 31, 32):
        if folder[at] == 0:
            break
        if folder[at] == 0x83 and folder[at + 1] <= 11:
            name = folder[at + 2 : at + 2 + 2 * folder[at + 1]]
            label = name.decode("utf-16-le", errors="replace") or None
    number = f"{serial >> 16:04X}-{serial & 0xFFFF:04X}"
    size = struct.unpack_from("<Q", raw, 72)[0] << sector
    return Filesystem("exfat", label, number, 1 << cluster, size)


def _ntfs(window: Readable) -> Filesystem | None:
    raw = window.read(0, 512)
    if raw[3:11] != b"NTFS    " or raw[510:] != b"\x55\xaa":
        return None
    sector, per = struct.unpack_from("<HB", raw, 11)
    cluster = sector * per if per <= 0x80 else sector << min(256 - per, 32)
    if sector not in (512, 1024, 2048, 4096) or not 512 <= cluster <= 2 << 20:
        return None
    total, mft, _, record = struct.unpack_from("<QQQb", raw, 40)
    serial = struct.unpack_from("<Q", raw, 72)[0]
    size = 1 << min(-record, 16) if record < 0 else record * cluster
    label = _ntfs_label(window.read(mft * cluster + 3 * size, min(size, 65536)))
    return Filesystem("ntfs", label, f"{serial:016X}", cluster, total * sector)


def _ntfs_label(record: bytes) -> str | None:
    """The name in the record of $Volume. The last two bytes of each sector are kept elsewhere in it."""
    if record[:4] != b"FILE":
        return None
    where, count = struct.unpack_from("<HH", record, 4)
    kept = record[where + 2 : where + 2 * count]
    for end in range(512, len(record) + 1, 512):
        pair = kept[end // 256 - 2 : end // 256]
        record = record[: end - 2] + pair.ljust(2, b"\0") + record[end:]
    at = struct.unpack_from("<H", record, 20)[0]
    for _ in range(64):
        kind, length = struct.unpack_from("<II", record, at)
        if kind == 0xFFFFFFFF or length < 24:
            break
        if kind == 0x60 and record[at + 8] == 0:
            count, where = struct.unpack_from("<IH", record, at + 16)
            return (
                record[at + where : at + where + min(count, 256)].decode("utf-16-le", errors="replace")
                or None
            )
        at += length
    return None


def _squashfs(window: Readable) -> Filesystem | None:
    raw = window.read(0, 96)
    if raw[:4] != b"hsqs" or struct.unpack_from("<H", raw, 28)[0] != 4:
        return None
    return Filesystem("squashfs", None, None, *struct.unpack_from("<I24xQ", raw, 12))


def _iso(window: Readable) -> Filesystem | None:
    raw = window.read(32768, 2048)
    if raw[:6] != b"\x01CD001" or len(raw) < 2048:
        return None
    label = raw[40:72].decode("ascii", errors="replace").rstrip() or None
    blocks, block = struct.unpack_from("<I", raw, 80)[0], struct.unpack_from("<H", raw, 128)[0]
    changed = raw[830:846] if raw[830:846].strip(b"0\0") else raw[813:829]
    date = changed.decode("ascii", errors="replace")
    number = None
    if date.isdecimal():
        number = "-".join((date[:4], *(date[i : i + 2] for i in range(4, 16, 2))))
    return Filesystem("iso9660", label, number, block, blocks * block)


def _swap(window: Readable) -> Filesystem | None:
    found = swap.read_header(window)
    if found is None:
        return None
    kind = "swsuspend" if found.suspended else "swap"
    return Filesystem(kind, found.label or None, _uuid(found.uuid), found.page, found.pages * found.page)


def _text(raw: bytes) -> str | None:
    return raw.split(b"\0")[0].decode(errors="replace").rstrip() or None


def _uuid(raw: bytes) -> str | None:
    return str(uuid.UUID(bytes=raw)) if len(raw) == 16 and any(raw) else None


_READERS: tuple[Callable[[Readable], Filesystem | None], ...] = (
    *(_xfs, _btrfs, _squashfs, _ext, _ntfs, _exfat, _iso, _swap, _fat),
)
