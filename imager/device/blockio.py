"""Sizes, alignment, flushing and zeroing, of devices and files alike.

Invariant: `zero_range` leaves a range that reads as zeroes or raises; a
discard is never taken for a zero, because devices may return old data.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

from msgspec import Struct

from imager.device import ioctl, sysfs
from imager.errors import TargetError

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
_STATX_DIOALIGN = 0x2000
_AT_EMPTY_PATH = 0x1000
_SPAN = 1 << 30  # one zeroing call at most, so that it can be interrupted
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EINVAL, errno.ENOSYS, errno.EPERM)


class Alignment(Struct, frozen=True):
    """What direct I/O asks of memory addresses and of offsets and lengths."""

    memory: int
    offset: int


class ZeroCapability(Struct, frozen=True):
    """What a target can do for zeroes without their being sent."""

    discard: bool  # says "no longer needed"; reads are then undefined
    write_zeroes: bool  # the device zeroes by itself
    punch: bool  # a hole that reads as zeroes


def is_block(fd: int) -> bool:
    return stat.S_ISBLK(os.fstat(fd).st_mode)


def size(fd: int) -> int:
    """Bytes of an open device or file."""
    return ioctl.get_u64(fd, ioctl.BLKGETSIZE64) if is_block(fd) else os.fstat(fd).st_size


def sector_sizes(fd: int) -> tuple[int, int]:
    """Logical and physical sector size; 512 for a file."""
    if not is_block(fd):
        return 512, 512
    return ioctl.get_int(fd, ioctl.BLKSSZGET), ioctl.get_int(fd, ioctl.BLKPBSZGET)


def read_only(fd: int) -> bool:
    """Whether the device is set read-only; a file never is, by this test."""
    return is_block(fd) and ioctl.get_int(fd, ioctl.BLKROGET) != 0


def disk_sequence(fd: int) -> int | None:
    """The number the kernel gave this attachment of the disk; None before Linux 5.15."""
    try:
        return ioctl.get_u64(fd, ioctl.BLKGETDISKSEQ)
    except OSError:
        return None


def flush(fd: int) -> None:
    """All that was written is on the medium."""
    os.fsync(fd)


def drop_cache(fd: int) -> None:
    """Flush, then forget cached pages, so that the next read asks the medium.

    Device pages go by BLKFLSBUF (root) and by advice; file pages by advice.
    """
    flush(fd)
    if is_block(fd):
        try:
            ioctl.call(fd, ioctl.BLKFLSBUF)
        except PermissionError:
            pass
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def alignment(fd: int) -> Alignment:
    """What direct I/O needs here: by statx where the kernel tells, else the logical sector."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(256)
    if hasattr(libc, "statx") and libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) == 0:
        mask = struct.unpack_from("=I", buffer.raw, 0)[0]
        memory, offset = struct.unpack_from("=II", buffer.raw, 152)
        if mask & _STATX_DIOALIGN and memory and offset:
            return Alignment(memory, offset)
    if is_block(fd):
        logical = sector_sizes(fd)[0]
        return Alignment(logical, logical)
    return Alignment(4096, 4096)


def zero_capability(fd: int, sys: str = sysfs.SYS) -> ZeroCapability:
    """What zeroing and discarding this target supports, from the kernel's queue limits."""
    if not is_block(fd):
        return ZeroCapability(discard=False, write_zeroes=False, punch=True)
    name = sysfs.name_of(os.fstat(fd).st_rdev, sys)
    node = sysfs.read_node(name, sys) if name else None
    if node is None:
        return ZeroCapability(False, False, False)
    queue = f"{sys}/class/block/{node.disk}/queue"
    discard = (sysfs.number(queue, "discard_max_bytes") or 0) > 0
    zeroes = (sysfs.number(queue, "write_zeroes_max_bytes") or 0) > 0
    return ZeroCapability(discard=discard, write_zeroes=zeroes, punch=zeroes)


def discard(fd: int, start: int, length: int) -> bool:
    """Tell a device that a range holds nothing. False where it does not take that.

    What the range reads as afterwards is unknown.
    """
    try:
        for at, span in _spans(start, length):
            ioctl.range_call(fd, ioctl.BLKDISCARD, at, span)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def zero_range(fd: int, start: int, length: int) -> None:
    """Make a range read as zeroes, in the cheapest way that proves it.

    A file gets a hole (it grows where the range ends past its end). A device
    zeroes by BLKZEROOUT, which the kernel carries out by unmapping, by a
    command of the device, or by writing.
    """
    try:
        if is_block(fd):
            for at, span in _spans(start, length):
                ioctl.range_call(fd, ioctl.BLKZEROOUT, at, span)
            return
        if os.fstat(fd).st_size < start + length:
            os.ftruncate(fd, start + length)
        fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, length)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise TargetError(f"cannot zero {length} bytes at {start}: {error.strerror}") from error
        _write_zeroes(fd, start, length)


def _write_zeroes(fd: int, start: int, length: int) -> None:
    zeroes = bytes(1 << 20)
    at, end = start, start + length
    while at < end:
        try:
            at += os.pwrite(fd, zeroes[: end - at], at)
        except OSError as error:
            raise TargetError(f"cannot write zeroes at {at}: {error.strerror}") from error


def _spans(start: int, length: int) -> list[tuple[int, int]]:
    end = start + length
    return [(at, min(_SPAN, end - at)) for at in range(start, end, _SPAN)]


def fallocate(fd: int, mode: int, start: int, length: int) -> None:
    """Linux fallocate with a mode; raises `OSError`."""
    import ctypes

    if length <= 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.fallocate64 if hasattr(libc, "fallocate64") else libc.fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if call(fd, mode, start, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
