"""The loop driver's structures and requests.

Invariant: the layouts are linux/loop.h's; nothing here decides anything.
"""

from __future__ import annotations

import fcntl
import os
import struct
from dataclasses import dataclass, field

LOOP_CLR_FD = 0x4C01
LOOP_SET_STATUS64 = 0x4C04
LOOP_GET_STATUS64 = 0x4C05
LOOP_SET_CAPACITY = 0x4C07
LOOP_SET_BLOCK_SIZE = 0x4C09
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82

READ_ONLY = 1
AUTOCLEAR = 4
PARTSCAN = 8
DIRECT_IO = 16

_INFO = struct.Struct("=QQQQQIIII64s64s32s16x")
_CONFIG = struct.Struct("=II")


@dataclass(frozen=True, slots=True)
class LoopInfo:
    """What stands behind an attached loop device."""

    file_dev: int  # device number of the filesystem that the backing file is on
    inode: int
    device: int  # the backing device's own number, 0 for a file
    offset: int
    sizelimit: int
    flags: int
    raw: bytes = field(repr=False)

    @property
    def file(self) -> tuple[int, int]:
        """The backing file as (st_dev, st_ino)."""
        return self.file_dev, self.inode


def status(fd: int) -> LoopInfo:
    """The state of an attached loop device; `OSError` (ENXIO) where nothing is attached."""
    raw = fcntl.ioctl(fd, LOOP_GET_STATUS64, bytes(_INFO.size))
    dev, inode, device, offset, limit, _, _, _, flags, *_ = _INFO.unpack(raw)
    return LoopInfo(_decode(dev), inode, _decode(device), offset, limit, flags, raw)


def read_status(path: str) -> LoopInfo | None:
    """`status` of the device at `path`; None where it cannot be asked or is free."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return status(fd)
    except OSError:
        return None
    finally:
        os.close(fd)


def info(offset: int, sizelimit: int, flags: int, name: str) -> bytes:
    """A `loop_info64` to configure a device with."""
    return _INFO.pack(0, 0, 0, offset, sizelimit, 0, 0, 0, flags, os.fsencode(name)[:63], b"", b"")


def configure(fd: int, backing: int, sector_size: int, details: bytes) -> None:
    """Attach `backing` to the loop device `fd` in one step. `OSError` (EBUSY) where it is taken."""
    fcntl.ioctl(fd, LOOP_CONFIGURE, _CONFIG.pack(backing, sector_size) + details + bytes(64))


def set_flags(fd: int, flags: int) -> None:
    """Change the flags that can be changed (AUTOCLEAR, PARTSCAN)."""
    raw = bytearray(status(fd).raw)
    struct.pack_into("=I", raw, 52, flags)
    fcntl.ioctl(fd, LOOP_SET_STATUS64, bytes(raw))


def _decode(dev: int) -> int:
    """The kernel's number encoding (huge_encode_dev) as `os.makedev` writes it."""
    return os.makedev((dev >> 8) & 0xFFF, (dev & 0xFF) | ((dev >> 12) & 0xFFF00))
