"""Loop devices: files as block devices, for as long as they are needed.

Invariant: a device attached here is detached here, by name, and only while
it still stands for the file that it was attached to. It clears itself
(AUTOCLEAR) should this process die, partitions included.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from types import TracebackType
from typing import Self

from imager import command
from imager.device import loop_ioctl, sysfs
from imager.errors import CommandError, TargetError

CONTROL = "/dev/loop-control"
_TRIES = 200
_HINT = "loop devices need root (CAP_SYS_ADMIN) and /dev/loop-control; work on the image file itself instead"


class LoopDevice:
    """An attached loop device. Use it as a context manager, or call `detach`."""

    def __init__(self, name: str, backing: str, fd: int, info: loop_ioctl.LoopInfo) -> None:
        self.name = name
        self.path = f"/dev/{name}"
        self.backing = backing
        self._fd = fd
        self._info = info

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def partitions(self) -> dict[int, str]:
        """The partitions that the kernel knows now: number to device path."""
        node = sysfs.read_node(self.name)
        parts = [sysfs.read_node(name) for name in node.partitions] if node else []
        return {p.number: p.path for p in parts if p and p.number is not None}

    def add_partitions(self) -> dict[int, str]:
        """Have the kernel take the partition table from the device, replacing what it knew.

        Works also where the kernel parses no tables. Missing nodes are made.
        """
        try:
            loop_ioctl.set_flags(self._fd, self._flags() | loop_ioctl.PARTSCAN)
        except OSError:
            pass  # only makes clearing up after a killed process less thorough
        old = self.partitions()
        command.run(["partx", "--update" if old else "--add", self.path], ok=(0, 1))
        if old:  # an update leaves those that stand after the table's last one
            listed = command.text(["partx", "--show", "--noheadings", "--output", "NR", self.path], ok=(0, 1))
            for number in old.keys() - {int(n) for n in listed.split()}:
                command.run(["partx", "--delete", "--nr", str(number), self.path], ok=(0, 1))
        found = self.partitions()
        for path in found.values():
            _ensure_node(path)
        return found

    def remove_partitions(self) -> None:
        """Have the kernel forget the partitions. Raises where one of them is in use."""
        if not self.partitions():
            return
        command.run(["partx", "--delete", self.path], ok=(0, 1))
        left = sorted(self.partitions().values())
        if left:
            raise TargetError(f"cannot remove {', '.join(left)}: in use", hint="unmount it first")

    def update_capacity(self) -> int:
        """Take on the backing file's present size; returns it."""
        fcntl.ioctl(self._fd, loop_ioctl.LOOP_SET_CAPACITY, 0)
        node = sysfs.read_node(self.name)
        return node.size if node else 0

    def detach(self) -> None:
        """Detach this device; nothing happens where it was detached already."""
        if self._fd < 0:
            return
        try:
            if self._still_ours():
                self.remove_partitions()
                _clear(self._fd)
        finally:
            os.close(self._fd)
            self._fd = -1
        self._await_free()

    def _flags(self) -> int:
        return loop_ioctl.status(self._fd).flags

    def _still_ours(self) -> bool:
        try:
            now = loop_ioctl.status(self._fd)
        except OSError:
            return False
        return now.file == self._info.file and now.offset == self._info.offset

    def _await_free(self) -> None:
        """Clearing ends with the last close, another program's (udev, blkid) perhaps."""
        for _ in range(50):
            now = loop_ioctl.read_status(self.path)
            if now is None or now.file != self._info.file:
                return
            time.sleep(0.01)


def attach(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    sector_size: int = 0,
    direct_io: bool = False,
    offset: int = 0,
    sizelimit: int = 0,
) -> LoopDevice:
    """Attach a file (or device) to a free loop device.

    `sector_size` 0 leaves the choice to the kernel (512). Raises `TargetError`.
    """
    name = os.path.realpath(path)
    flags = loop_ioctl.AUTOCLEAR
    flags |= loop_ioctl.READ_ONLY if read_only else 0
    flags |= loop_ioctl.DIRECT_IO if direct_io else 0
    try:
        backing = os.open(name, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise TargetError(f"cannot attach {name}: {error.strerror}") from error
    try:
        for attempt in range(_TRIES):
            device = _try_free(name, backing, sector_size, offset, sizelimit, flags)
            if device is not None:
                return device
            time.sleep(min(0.001 * attempt, 0.05))
    except OSError as error:
        hint = _HINT if error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT) else None
        raise TargetError(f"cannot attach {name} to a loop device: {error.strerror}", hint=hint) from error
    finally:
        os.close(backing)
    raise TargetError(f"cannot attach {name}: no loop device stayed free", hint="detach some: losetup --list")


def _try_free(name: str, backing: int, sector: int, offset: int, limit: int, flags: int) -> LoopDevice | None:
    """Attach to the device that the kernel calls free; None where someone else was quicker."""
    control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        index = fcntl.ioctl(control, loop_ioctl.LOOP_CTL_GET_FREE, 0)
    finally:
        os.close(control)
    device = f"/dev/loop{index}"
    _ensure_node(device)
    mode = os.O_RDONLY if flags & loop_ioctl.READ_ONLY else os.O_RDWR
    try:
        fd = os.open(device, mode | os.O_CLOEXEC)
    except OSError as error:
        # Free a moment ago, and now on its way out with whoever had it before.
        if error.errno in (errno.EBUSY, errno.ENXIO, errno.ENODEV):
            return None
        raise
    try:
        loop_ioctl.configure(fd, backing, sector, loop_ioctl.info(offset, limit, flags, name))
        return LoopDevice(f"loop{index}", name, fd, loop_ioctl.status(fd))
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EBUSY, errno.ENXIO):
            return None
        raise


def _clear(fd: int) -> None:
    try:
        fcntl.ioctl(fd, loop_ioctl.LOOP_CLR_FD, 0)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise TargetError(f"cannot detach the loop device: {error.strerror}") from error


def _ensure_node(path: str) -> None:
    """Make the device node where devtmpfs or udev did not (containers, chroots)."""
    for _ in range(20):
        if os.path.exists(path):
            return
        if not os.path.exists("/run/udev/control"):
            break
        time.sleep(0.05)
    dev = sysfs.device_number(sysfs.text(sysfs.SYS, "class/block", os.path.basename(path), "dev"))
    if dev is None:
        raise CommandError(f"{path} does not exist and the kernel does not know it")
    try:
        os.mknod(path, stat.S_IFBLK | 0o660, dev)
    except FileExistsError:
        return
