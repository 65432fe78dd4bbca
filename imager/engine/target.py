"""A restore's target, open for writing: zeroing, flushing, reading back.

Invariant: a range that `zero` has handled reads as zeroes: a hole of a file,
or a device's zeroing as the kernel guarantees it, or zeroes written. A
discard, which guarantees nothing, is never used for that. The first `HEAD` bytes are
cleared before anything else is written and filled in last, so that a target
that is not whole never looks like a disk or a filesystem.
"""

from __future__ import annotations

import errno
import os

from imager._native import WriteError
from imager.device import blockio, ioctl, sysfs
from imager.device.guard import Guarded
from imager.engine.compare import Readable
from imager.errors import TargetError
from imager.units import MIB, format_size

HEAD = MIB
_COARSEST = 4096
"The largest sector that a device has: discards end at multiples of it."
_NOT_SO = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL, errno.EPERM, errno.ENOTTY)


class Target:
    """A guarded device or file. Every failure is a `TargetError` that names target and offset."""

    def __init__(self, guarded: Guarded) -> None:
        self.guarded = guarded
        self.fd = guarded.fd
        self.path = guarded.path
        self.is_device = guarded.identity.is_device
        self._punch = True
        self._discards = True
        self._reader = -1
        self._writer = -1

    def prepare(self, size: int, *, keep: bool) -> None:
        """Give a file its size, empty unless its content is to be kept. A device has its size."""
        if self.is_device:
            return
        try:
            if not keep:
                os.ftruncate(self.fd, 0)
            if os.fstat(self.fd).st_size != size:
                os.ftruncate(self.fd, size)
        except OSError as error:
            hint = "this filesystem's files cannot be that large" if error.errno == errno.EFBIG else None
            raise TargetError(
                f"cannot give {self.path} its size of {format_size(size)}: {error.strerror}", hint=hint
            ) from error

    def zero(self, start: int, end: int) -> None:
        """Make `[start, end)` read as zeroes, in the cheapest way that guarantees it."""
        if start >= end:
            return
        if self._punch:
            # On a device this is the kernel's zeroing by unmapping: allowed to be refused, not to be wrong.
            mode = blockio.FALLOC_FL_PUNCH_HOLE | blockio.FALLOC_FL_KEEP_SIZE
            try:
                blockio.fallocate(self.fd, mode, start, end - start)
                return
            except OSError as error:
                if error.errno not in _NOT_SO:
                    raise self.failed(start, error) from error
                # A range that is no multiple of the sector is refused by itself; others need not be.
                self._punch = error.errno == errno.EINVAL
        try:
            blockio.zero_range(self.fd, start, end - start)
        except OSError as error:
            raise self.failed(start, error) from error

    def discard(self, start: int, end: int) -> bool:
        """Say that nothing needs `[start, end)`: a hole of a file, a device's discard.

        What stands there afterwards is unknown. False where the target takes no discards: all is as it was.
        """
        if self.is_device:
            end -= end % _COARSEST
        if start >= end or not self._discards:
            return self._discards
        try:
            if self.is_device:
                self._discards = blockio.discard(self.fd, start, end - start)
            else:
                mode = blockio.FALLOC_FL_PUNCH_HOLE | blockio.FALLOC_FL_KEEP_SIZE
                blockio.fallocate(self.fd, mode, start, end - start)
        except OSError:
            # Advice that is not taken harms nothing; if the target fails, what is written will show it.
            self._discards = False
        return self._discards

    def flush(self) -> None:
        """All that was written is on the medium."""
        try:
            blockio.flush(self.fd)
        except OSError as error:
            raise TargetError(
                f"{self.path} did not take what was written: {error.strerror}",
                hint="the target may be failing; see the kernel's log (dmesg), and try another one",
            ) from error

    def forget(self) -> None:
        """Flush, and drop cached pages, so that what is read next comes from the medium."""
        self.flush()
        try:
            blockio.drop_cache(self.fd)
        except OSError as error:
            raise TargetError(f"{self.path}: {error.strerror}") from error

    def writer(self) -> tuple[int, bool]:
        """The descriptor for whole blocks, and whether it is one for direct I/O.

        Past the page cache a fast device is written several times as fast; a
        rotating disk gains by the kernel's sorting what waits there.
        """
        if self._writer < 0 and self.is_device and not self._rotates():
            fd = os.open(self.guarded.proc_path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
            if self._coarse(fd):
                os.close(fd)
            else:
                self._writer = fd
        return (self._writer, True) if self._writer >= 0 else (self.fd, False)

    def _rotates(self) -> bool:
        if self.guarded.identity.kind == "loop":
            return False  # it says what the disk below it does; the file's pages are sorted there
        node = sysfs.read_node(sysfs.name_of(os.fstat(self.fd).st_rdev) or "")
        return node is None or node.rotational

    def reader(self, size: int) -> Readable:
        """The target for reading back, past the page cache where it can be read so."""
        if self._reader < 0:
            try:
                self._reader = os.open(self.guarded.proc_path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                direct = True
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise TargetError(f"cannot read {self.path} back: {error.strerror}") from error
                self._reader = os.open(self.guarded.proc_path, os.O_RDONLY | os.O_CLOEXEC)
                direct = False
            self._direct = direct and not self._coarse(self._reader)
            if direct and not self._direct:
                os.close(self._reader)
                self._reader = os.open(self.guarded.proc_path, os.O_RDONLY | os.O_CLOEXEC)
        return Readable(self._reader, self.path, size, self._direct, not self.is_device, TargetError)

    def _coarse(self, fd: int) -> bool:
        """Whether direct reads need more than the 4 KiB that every image's blocks are multiples of."""
        need = blockio.alignment(fd)
        return max(need.memory, need.offset) > 4096

    def rescan(self) -> bool:
        """Have the kernel read a disk's partition table anew. False where it would not."""
        try:
            ioctl.call(self.fd, ioctl.BLKRRPART)
        except OSError as error:
            # EINVAL: a device that has no partitions for the kernel, such as most loop devices.
            return error.errno in (errno.EINVAL, errno.ENOTTY)
        return True

    def failed(self, offset: int | None, error: OSError) -> TargetError:
        """The error for a write that failed at `offset`."""
        return failed(self.path, offset, error)

    def close(self) -> None:
        """Close what was opened here; the guarded descriptor is the guard's."""
        for fd in (self._reader, self._writer):
            if fd >= 0:
                os.close(fd)
        self._reader = self._writer = -1


def failed(path: str, offset: int | None, error: OSError) -> TargetError:
    """What a failing write means."""
    if isinstance(error, WriteError) and isinstance(error.filename, int):
        offset = error.filename  # the core keeps the offset where OSError keeps a file's name
    where = f" at byte {offset}" if offset is not None else ""
    hint = "the target may be failing; see the kernel's log (dmesg), and try another one"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "make room, then go on with --resume"
    if error.errno == errno.EFBIG:
        hint = "this filesystem's files cannot be that large"
    return TargetError(f"{path} cannot be written{where}: {error.strerror or error}", hint=hint)
