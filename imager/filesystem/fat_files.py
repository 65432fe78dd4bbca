"""Small files of a FAT12, FAT16 or FAT32 that nobody has mounted, read from its own structures.

Invariant: an answer is for people to read, never a reason to leave out a block. Whatever a damaged or
hostile filesystem says, the work is bounded: no file beyond `LONGEST`, no folder beyond
`LONGEST_FOLDER`, no chain longer than what is read of it.

Structures: Microsoft's FAT specification (fatgen103); fs/fat of Linux for the case of short names.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from msgspec import Struct

from imager.device.window import Readable
from imager.filesystem.files import LONGEST, LONGEST_FOLDER, MOST_NAMES

_FOLDER, _LABEL, _LONG = 0x10, 0x08, 0x0F
_BIG12, _BIG16 = 4085, 65525


class _Entry(Struct, frozen=True):
    name: str
    folder: bool
    cluster: int
    size: int


class FatFiles:
    """Files by their paths below the root, in any case.

    A filesystem that makes no sense has no files. Raises OSError where the disk cannot be read.
    """

    def __init__(self, window: Readable) -> None:
        self._window = window
        self._folders: dict[int, tuple[_Entry, ...]] = {}
        raw = window.read(0, 512)
        self._sane = False
        if len(raw) < 512 or raw[510:] != b"\x55\xaa":
            return
        sector, per, reserved, fats, roots, small, _, short = struct.unpack_from("<HBHBHHBH", raw, 11)
        total = small or struct.unpack_from("<I", raw, 32)[0]
        length = short or struct.unpack_from("<I", raw, 36)[0]
        if sector not in (512, 1024, 2048, 4096) or not per or per & (per - 1) or not reserved or not fats:
            return
        self._fat = reserved * sector
        root = (reserved + fats * length) * sector
        self._data = root + -(-roots * 32 // sector) * sector
        self._cluster = per * sector
        self._clusters = max(0, total * sector - self._data) // self._cluster
        self._bits = 12 if self._clusters < _BIG12 else 16 if self._clusters < _BIG16 else 32
        self._root = struct.unpack_from("<I", raw, 44)[0] if self._bits == 32 else 0
        self._root_place = root, roots * 32
        self._sane = self._clusters > 0

    # --- what is asked for --------------------------------------------------------------

    def read(self, path: str) -> bytes | None:
        """The content of a plain file of at most `LONGEST` bytes; None where there is none."""
        folder, _, name = path.rpartition("/")
        for entry in self._folder(folder) or ():
            if _same(entry.name, name) and not entry.folder:
                return self._chain(entry.cluster, entry.size)[: entry.size] if entry.size <= LONGEST else None
        return None

    def names(self, path: str) -> tuple[str, ...]:
        """Names in a folder, sorted, some thousands at most; none where there is no such folder."""
        found = (entry.name for entry in self._folder(path) or ())
        return tuple(sorted(name for name in found if name not in (".", "..")))[:MOST_NAMES]

    # --- folders --------------------------------------------------------------------------

    def _folder(self, path: str) -> tuple[_Entry, ...] | None:
        if not self._sane:
            return None
        found = self._listed(self._root)
        for name in path.split("/"):
            if name in ("", "."):
                continue
            below = next((e for e in found if e.folder and _same(e.name, name)), None)
            if below is None or not below.cluster:
                return None
            found = self._listed(below.cluster)
        return found

    def _listed(self, cluster: int) -> tuple[_Entry, ...]:
        if cluster not in self._folders:
            raw = self._chain(cluster, LONGEST_FOLDER) if cluster else self._window.read(*self._root_place)
            self._folders[cluster] = tuple(_entries(raw, self._bits == 32))
        return self._folders[cluster]

    # --- chains of clusters ------------------------------------------------------------------

    def _chain(self, cluster: int, length: int) -> bytes:
        """What a chain holds, up to `length` bytes and the rest of their cluster."""
        out: list[bytes] = []
        for _ in range(-(-length // self._cluster)):
            if not 2 <= cluster < self._clusters + 2:
                break
            out.append(self._window.read(self._data + (cluster - 2) * self._cluster, self._cluster))
            cluster = self._next(cluster)
        return b"".join(out)

    def _next(self, cluster: int) -> int:
        at = cluster * self._bits // 8
        raw = self._window.read(self._fat + at, 4 if self._bits == 32 else 2)
        value = int.from_bytes(raw, "little")
        if self._bits == 12:
            return value >> 4 if cluster & 1 else value & 0xFFF
        return value & 0x0FFFFFFF


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()


def _entries(raw: bytes, wide: bool) -> Iterator[_Entry]:
    """The entries of a folder; a long name counts where its parts belong to the short one that follows.

    `wide`: of FAT32; elsewhere the upper half of a cluster's number holds something else.
    """
    parts: dict[int, bytes] = {}
    check = -1
    for at in range(0, len(raw) - 31, 32):
        entry = raw[at : at + 32]
        if entry[0] == 0:
            return
        if entry[0] == 0xE5:
            parts = {}
        elif entry[11] & 0x3F == _LONG:
            if entry[0] & 0x40 or entry[13] != check:
                parts, check = {}, entry[13]
            parts[entry[0] & 0x3F] = entry[1:11] + entry[14:26] + entry[28:32]
        elif entry[11] & _LABEL:
            parts = {}
        else:
            high, low, size = *struct.unpack_from("<H4xH", entry, 20), struct.unpack_from("<I", entry, 28)[0]
            whole = parts and sorted(parts) == list(range(1, len(parts) + 1)) and check == _sum(entry[:11])
            name = _long(parts) if whole else _short(entry)
            yield _Entry(name, bool(entry[11] & _FOLDER), (high << 16 if wide else 0) | low, size)
            parts = {}


def _long(parts: dict[int, bytes]) -> str:
    raw = b"".join(parts[number] for number in sorted(parts))
    return raw.decode("utf-16-le", errors="replace").split("\0", 1)[0]


def _short(entry: bytes) -> str:
    raw = b"\xe5" + entry[1:11] if entry[0] == 5 else entry[:11]
    text = raw.decode("ascii" if raw.isascii() else "cp437")
    base, end = text[:8].rstrip(" "), text[8:].rstrip(" ")
    base = base.lower() if entry[12] & 0x08 else base
    end = end.lower() if entry[12] & 0x10 else end
    return f"{base}.{end}" if end else base


def _sum(name: bytes) -> int:
    """The checksum of a short name that its long name carries."""
    total = 0
    for byte in name:
        total = ((total & 1) << 7) + (total >> 1) + byte & 0xFF
    return total
