"""Block device ioctls, by name.

Invariant: request numbers are computed for this architecture, and a call
either returns the kernel's answer or raises the kernel's `OSError`.
"""

from __future__ import annotations

import fcntl
import os
import struct

_ODD = os.uname().machine.startswith(("ppc", "mips", "sparc", "alpha"))
_NONE, _READ = (0x20000000, 0x40000000) if _ODD else (0, 0x80000000)


def _io(number: int) -> int:
    return _NONE | 0x12 << 8 | number


def _ior(number: int, size: int) -> int:
    return _READ | size << 16 | 0x12 << 8 | number


BLKROGET = _io(94)
BLKRRPART = _io(95)
BLKFLSBUF = _io(97)
BLKSSZGET = _io(104)
BLKPBSZGET = _io(123)
BLKDISCARD = _io(119)
BLKZEROOUT = _io(127)
BLKGETSIZE64 = _ior(114, struct.calcsize("N"))  # declared with size_t
BLKGETDISKSEQ = _ior(128, 8)


def get_int(fd: int, request: int) -> int:
    """A request that fills in a C int."""
    return int(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])


def get_u64(fd: int, request: int) -> int:
    """A request that fills in 64 bits."""
    return int(struct.unpack("Q", fcntl.ioctl(fd, request, bytes(8)))[0])


def call(fd: int, request: int) -> None:
    """A request without an argument."""
    fcntl.ioctl(fd, request, 0)


def range_call(fd: int, request: int, start: int, length: int) -> None:
    """A request on a range of bytes."""
    fcntl.ioctl(fd, request, struct.pack("QQ", start, length))
