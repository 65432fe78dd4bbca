"""Small files of an ext2, ext3 or ext4 that nobody has mounted, read from its own structures.

Invariant: an answer is for people to read, never a reason to leave out a block: checksums are not
looked at, and a journal that waits to be replayed is not. Whatever a damaged or hostile filesystem
says, the work is bounded: each file and folder by `LONGEST` and `LONGEST_FOLDER`, each path by
its links, each tree of blocks by the number of its nodes.

Structures: fs/ext4/ext4.h, fs/ext4/ext4_extents.h and Documentation/filesystems/ext4 of Linux.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from msgspec import Struct

from imager.device.window import Readable
from imager.filesystem.files import LONGEST, LONGEST_FOLDER, MOST_NAMES

_MOST_LINKS, _MOST_NODES = 8, 1024
_MAGIC, _ROOT = 0xEF53, 2
_META_BG, _EXTENTS_BIT, _64BIT = 0x10, 0x40, 0x80
_KNOWN = 0x2 | 0x4 | _META_BG | _EXTENTS_BIT | _64BIT | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x38000
"""Features without which nothing else can be made of the structures that are read here."""
_SPARSE_SUPER, _SPARSE_SUPER2 = 0x1, 0x200
_ENCRYPTED, _IN_EXTENTS, _INLINE = 0x800, 0x80000, 0x10000000
_FOLDER_TYPE, _FILE_TYPE, _LINK_TYPE = 0x4000, 0x8000, 0xA000
_EXTENT_MAGIC, _DEEPEST = 0xF30A, 5
_UNWRITTEN = 1 << 15


class _Inode(Struct, frozen=True):
    type: int
    flags: int
    size: int
    block: bytes


class ExtFiles:
    """Files by their paths below the root, without a leading slash.

    A filesystem that makes no sense has no files. Raises OSError where the disk cannot be read.
    """

    def __init__(self, window: Readable) -> None:
        self._window = window
        self._folders: dict[int, dict[str, int]] = {}
        raw = window.read(1024, 1024)
        self._sane = len(raw) == 1024 and struct.unpack_from("<H", raw, 56)[0] == _MAGIC
        if not self._sane:
            return
        self._inodes, low = struct.unpack_from("<I", raw, 0)[0], struct.unpack_from("<I", raw, 4)[0]
        self._first, shift = struct.unpack_from("<II", raw, 20)
        self._per_group, self._inodes_per_group = (struct.unpack_from("<I", raw, at)[0] for at in (32, 40))
        revision, self._inode_size = struct.unpack_from("<I", raw, 76)[0], 128
        if revision:
            self._inode_size = struct.unpack_from("<H", raw, 88)[0]
        compat, self._incompat, self._ro_compat = (
            struct.unpack_from("<III", raw, 92) if revision else (0, 0, 0)
        )
        self._desc_size = max(32, struct.unpack_from("<H", raw, 254)[0]) if self._incompat & _64BIT else 32
        self._first_meta = struct.unpack_from("<I", raw, 260)[0] if self._incompat & _META_BG else 1 << 32
        self._backups = struct.unpack_from("<II", raw, 588) if compat & _SPARSE_SUPER2 else None
        high = struct.unpack_from("<I", raw, 336)[0] if self._incompat & _64BIT else 0
        self._blocks = high << 32 | low
        self._block = 1024 << min(shift, 7)
        self._sane = (
            shift <= 6
            and not self._incompat & ~_KNOWN
            and self._per_group > 0
            and self._inodes_per_group > 0
            and 128 <= self._inode_size <= self._block
            and self._desc_size <= self._block
        )

    # --- what is asked for --------------------------------------------------------------

    def read(self, path: str) -> bytes | None:
        """The content of a plain file of at most `LONGEST` bytes; None where there is none."""
        inode = self._find(path)
        if inode is None or inode.type != _FILE_TYPE or inode.size > LONGEST:
            return None
        return self._content(inode)

    def names(self, path: str) -> tuple[str, ...]:
        """Names in a folder, sorted, some thousands at most; none where there is no such folder."""
        number = self._number(path)
        found = self._folder(number) if number else {}
        return tuple(sorted(name for name in found if name not in (".", "..")))[:MOST_NAMES]

    # --- paths ----------------------------------------------------------------------------

    def _find(self, path: str) -> _Inode | None:
        number = self._number(path)
        return self._inode(number) if number else None

    def _number(self, path: str) -> int:
        """The inode number of a path, links followed; 0 where there is none."""
        if not self._sane:
            return 0
        left, links = path.split("/")[::-1], 0
        trail = [_ROOT]
        while left:
            name = left.pop()
            if name in ("", "."):
                continue
            if name == "..":
                trail = trail[:-1] or [_ROOT]
                continue
            number = self._folder(trail[-1]).get(name, 0)
            inode = self._inode(number) if number else None
            if inode is None:
                return 0
            if inode.type != _LINK_TYPE:
                trail.append(number)
                continue
            links += 1
            target = self._target(inode)
            if target is None or links > _MOST_LINKS:
                return 0
            if target.startswith("/"):
                trail = [_ROOT]
            left += target.split("/")[::-1]
        return trail[-1]

    def _target(self, inode: _Inode) -> str | None:
        if inode.size > 4096:
            return None
        if inode.size < 60 and not inode.flags & (_IN_EXTENTS | _ENCRYPTED):
            raw: bytes | None = inode.block[: inode.size]
        else:
            raw = self._content(inode)
        return raw.decode(errors="surrogateescape") if raw else None

    def _folder(self, number: int) -> dict[str, int]:
        """Inode numbers by name. An indexed folder reads as a plain one: its index looks like free room."""
        if number in self._folders:
            return self._folders[number]
        found: dict[str, int] = {}
        inode = self._inode(number)
        if inode is not None and inode.type == _FOLDER_TYPE and not inode.flags & _ENCRYPTED:
            if inode.flags & _INLINE:  # behind the number of the folder above; the xattr's part is left out
                found.update(self._entries(inode.block[4:60]))
            else:
                raw = self._content(inode) if inode.size <= LONGEST_FOLDER else None
                for at in range(0, len(raw or b""), self._block):
                    found.update(self._entries((raw or b"")[at : at + self._block]))
        self._folders[number] = found
        return found

    def _entries(self, raw: bytes) -> Iterator[tuple[str, int]]:
        at = 0
        while at + 8 <= len(raw):
            number, length, size = struct.unpack_from("<IHB", raw, at)
            length = 1 << 16 if length in (0, 0xFFFF) and self._block == 1 << 16 else length
            if length < 8 + size or at + length > len(raw):
                return
            if number and size:
                yield raw[at + 8 : at + 8 + size].decode(errors="surrogateescape"), number
            at += length

    # --- inodes and what they hold -----------------------------------------------------------

    def _inode(self, number: int) -> _Inode | None:
        if not 0 < number <= self._inodes:
            return None
        group, index = divmod(number - 1, self._inodes_per_group)
        table = self._table(group)
        if table is None:
            return None
        raw = self._window.read(table * self._block + index * self._inode_size, 128)
        if len(raw) < 128:
            return None
        mode, size = struct.unpack_from("<H2xI", raw, 0)
        size |= struct.unpack_from("<I", raw, 108)[0] << 32
        return _Inode(mode & 0xF000, struct.unpack_from("<I", raw, 32)[0], size, raw[40:100])

    def _table(self, group: int) -> int | None:
        """The first block of a group's inodes."""
        per_block = self._block // self._desc_size
        meta, index = divmod(group, per_block)
        if meta < self._first_meta:
            block = self._first + 1 + meta
        else:
            first = meta * per_block
            block = self._first + first * self._per_group + self._has_super(first)
        if self._block == 1024 and self._first == 0 and (meta < self._first_meta or meta == 0):
            block += 1  # bigalloc counts from 0 where the superblock is block 1 all the same
        raw = self._window.read(block * self._block + index * self._desc_size, self._desc_size)
        if len(raw) < self._desc_size:
            return None
        high = struct.unpack_from("<I", raw, 40)[0] if self._desc_size >= 64 else 0
        table: int = high << 32 | struct.unpack_from("<I", raw, 8)[0]
        return table if 0 < table < self._blocks else None

    def _has_super(self, group: int) -> bool:
        if self._backups is not None:
            return group == 0 or group in self._backups
        if group <= 1 or not self._ro_compat & _SPARSE_SUPER:
            return True
        return any(_is_power(group, base) for base in (3, 5, 7))

    def _content(self, inode: _Inode) -> bytes | None:
        """What a file or folder of a bounded size holds; None where it cannot be told."""
        if inode.flags & _ENCRYPTED:
            return None
        if inode.flags & _INLINE:
            return inode.block[: inode.size] if inode.size <= 60 else None
        size = -(-inode.size // self._block)
        runs = self._extents(inode.block) if inode.flags & _IN_EXTENTS else self._mapped(inode, size)
        out = bytearray(size * self._block)
        seen = 0
        for logical, physical, count in runs:
            seen += 1
            count = min(count, size - logical)
            if seen > size + 1 or logical >= size:
                break
            if not 0 < physical <= self._blocks - count:
                continue
            raw = self._window.read(physical * self._block, count * self._block)
            out[logical * self._block : logical * self._block + len(raw)] = raw
        return bytes(out[: inode.size])

    def _extents(self, root: bytes) -> Iterator[tuple[int, int, int]]:
        """(first block of the file, first block of the disk, how many) of what is written, in any order."""
        left = [(0, _DEEPEST)]
        for _ in range(_MOST_NODES):
            if not left:
                return
            block, deepest = left.pop()
            node = self._window.read(block * self._block, self._block) if block else root
            magic, count, _, depth = struct.unpack_from("<HHHH", node, 0) if len(node) >= 12 else (0,) * 4
            if magic != _EXTENT_MAGIC or depth > deepest:
                continue
            for at in range(12, min(12 * count, len(node) - 12) + 1, 12):
                if depth:
                    _, low, high = struct.unpack_from("<IIH", node, at)
                    left.append((high << 32 | low, depth - 1))
                    continue
                logical, length, high, low = struct.unpack_from("<IHHI", node, at)
                if length <= _UNWRITTEN:
                    yield logical, high << 32 | low, length

    def _mapped(self, inode: _Inode, size: int) -> Iterator[tuple[int, int, int]]:
        """As `_extents`, for a file whose blocks are listed one by one, `size` blocks at most."""
        pointers = struct.unpack("<15I", inode.block)
        for logical, physical in enumerate(pointers[:12]):
            yield logical, physical, 1
        at = 12
        for depth in (1, 2, 3):
            if at >= size:
                return
            yield from self._indirect(pointers[11 + depth], depth, at, size)
            at += (self._block // 4) ** depth

    def _indirect(self, block: int, depth: int, at: int, size: int) -> Iterator[tuple[int, int, int]]:
        if not 0 < block < self._blocks:
            return
        raw = self._window.read(block * self._block, self._block)
        span = (self._block // 4) ** (depth - 1)
        for number, pointer in enumerate(struct.unpack(f"<{len(raw) // 4}I", raw[: len(raw) // 4 * 4])):
            first = at + number * span
            if first >= size:
                return
            if depth == 1:
                yield first, pointer, 1
            else:
                yield from self._indirect(pointer, depth - 1, first, size)


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1
