"""Where the lab's disks stand: on loop devices, or in files alone.

Invariant: a disk is worked on through its partitions and seen as one image;
after `settle`, the image (its file, and the loop device over it) shows all
that was done to the partitions. Only files below the lab's folder are written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from imager.device import ioctl, loop
from imager.errors import CommandError, ImagerError, TargetError
from imager.lab import disk, raw
from imager.lab.disk import Partition

_SYS_ADMIN = 21


class SourceDisk(Protocol):
    """The disk that is backed up."""

    source: str
    """What a backup reads: the loop device, or the file."""
    image: Path
    """The file that holds its bytes."""

    def parts(self) -> dict[int, str]:
        """Where each partition is worked on, by number."""

    def renew(self, part: Partition) -> None:
        """Make ready for a filesystem to be made anew in the partition."""

    def settle(self) -> None:
        """Bring what was done to the partitions into the image."""


class TargetDisk(Protocol):
    """A disk that is restored to. What stands on it before stays wherever nothing is written."""

    target: str
    image: Path

    def parts(self) -> AbstractContextManager[dict[int, str]]:
        """The restored partitions, to look at."""


def without_devices() -> str | None:
    """Why loop devices and mounts cannot be used here; None where they can."""
    if os.geteuid() != 0:
        return "loop devices and mounts need root"
    status = Path("/proc/self/status").read_text().splitlines()
    effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    if not effective >> _SYS_ADMIN & 1:
        return "loop devices and mounts need CAP_SYS_ADMIN"
    with tempfile.NamedTemporaryFile(prefix="imager-lab-") as file:
        file.truncate(1 << 20)
        try:
            with loop.attach(file.name):
                return None
        except ImagerError as error:
            return error.message


class LoopSource:
    """A disk on a loop device whose partitions the kernel knows."""

    def __init__(self, stack: ExitStack, folder: Path, size: int, partitions: Sequence[Partition]) -> None:
        self.image = folder / "disk.img"
        disk.make_empty(self.image, size)
        disk.write_table(self.image, partitions)
        self._loop = stack.enter_context(loop.attach(self.image))
        self.source = self._loop.path
        self._parts = _known(self._loop, len(partitions))

    def parts(self) -> dict[int, str]:
        return self._parts

    def renew(self, part: Partition) -> None:
        """A device keeps its size whatever was in it; mkfs needs nothing else."""

    def settle(self) -> None:
        for path in (*self._parts.values(), self.source):
            _flush(path)


class FileSource:
    """A disk put together from one file a partition."""

    def __init__(self, folder: Path, size: int, partitions: Sequence[Partition]) -> None:
        self.image = folder / "disk.img"
        self.source = str(self.image)
        self._size = size
        self._partitions = partitions
        self._folder = folder / "partitions"
        self._folder.mkdir()
        disk.make_empty(self.image, size)
        with self.image.open("rb") as file:
            self._gap = file.read(partitions[0].start)
        for part in partitions:
            self.renew(part)

    def parts(self) -> dict[int, str]:
        return {part.number: str(self._path(part)) for part in self._partitions}

    def renew(self, part: Partition) -> None:
        with self._path(part).open("wb") as file:
            file.truncate(part.size)

    def settle(self) -> None:
        with self.image.open("r+b") as file:
            file.truncate(0)
            file.truncate(self._size)
            file.write(self._gap)
            file.flush()
            for part in self._partitions:
                with self._path(part).open("rb") as source:
                    raw.copy(source.fileno(), 0, part.size, file.fileno(), part.start)
        disk.write_table(self.image, self._partitions)

    def _path(self, part: Partition) -> Path:
        return self._folder / f"{part.number}-{part.name}.img"


class LoopTarget:
    """A loop device over a file that is there."""

    def __init__(self, stack: ExitStack, image: Path, partitions: Sequence[Partition]) -> None:
        self.image = image
        self._count = len(partitions)
        self._loop = stack.enter_context(loop.attach(image))
        self.target = self._loop.path

    @contextmanager
    def parts(self) -> Iterator[dict[int, str]]:
        _flush(self.target)
        try:
            yield _known(self._loop, self._count)
        finally:
            self._loop.remove_partitions()


class FileTarget:
    """A file that is there; its partitions are copied out of it to be looked at."""

    def __init__(self, image: Path, partitions: Sequence[Partition]) -> None:
        self.image = image
        self.target = str(image)
        self._partitions = partitions

    @contextmanager
    def parts(self) -> Iterator[dict[int, str]]:
        with tempfile.TemporaryDirectory(prefix="restored-", dir=self.image.parent) as name:
            found = {}
            with self.image.open("rb") as image:
                for part in self._partitions:
                    path = Path(name, f"{part.number}-{part.name}.img")
                    with path.open("wb") as file:
                        file.truncate(part.size)
                        raw.copy(image.fileno(), part.start, part.size, file.fileno(), 0)
                    found[part.number] = str(path)
            yield found


def _known(device: loop.LoopDevice, count: int) -> dict[int, str]:
    found = device.add_partitions()
    if sorted(found) != list(range(1, count + 1)):
        raise TargetError(f"{device.path} should show {count} partitions, and shows {sorted(found)}")
    return found


def _flush(path: str) -> None:
    """Write out what is cached for a block device, and forget it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CommandError(f"cannot open {path}: {error.strerror}") from error
    try:
        os.fsync(fd)
        ioctl.call(fd, ioctl.BLKFLSBUF)
    finally:
        os.close(fd)
