"""Single small files of a filesystem that the kernel reads: mounted already, or for a moment.

Invariant: nothing is ever written to the source. A mount is read-only twice (the mount, and the
loop device below it), replays no log, and is made on devices only, never on image files, whose
content the kernel should not have to trust.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from imager import command
from imager.filesystem.files import LONGEST, MOST_NAMES


class Folder:
    """A filesystem that is mounted at `root`. No link leads out of it."""

    def __init__(self, root: str) -> None:
        self._root = os.path.realpath(root)

    def _inside(self, path: str) -> str | None:
        real = os.path.realpath(os.path.join(self._root, path))
        below = self._root.rstrip("/") + "/"
        return real if real.startswith(below) or real == self._root else None

    def read(self, path: str) -> bytes | None:
        place = self._inside(path)
        try:
            if place is None or not os.path.isfile(place) or os.path.getsize(place) > LONGEST:
                return None
            with open(place, "rb") as file:
                return file.read(LONGEST)
        except OSError:
            return None

    def names(self, path: str) -> tuple[str, ...]:
        place = self._inside(path)
        try:
            return tuple(sorted(os.listdir(place)))[:MOST_NAMES] if place else ()
        except OSError:
            return ()


@contextmanager
def looked_into(device: str, kind: str, start: int, size: int) -> Iterator[Folder]:
    """XFS or btrfs on a device, mounted for as long as the context lasts. Needs root.

    Raises `errors.ImagerError` where that cannot be.
    """
    from imager.device.loop import attach

    options = ["ro", "nodev", "nosuid", "noexec", "noatime"]
    options += ["norecovery", "nouuid"] if kind == "xfs" else ["rescue=nologreplay"]
    with (
        tempfile.TemporaryDirectory(prefix="imager-look-") as folder,
        attach(device, read_only=True, offset=start, sizelimit=size) as loop,
    ):
        command.run(["mount", "-t", kind, "-o", ",".join(options), loop.path, folder], timeout=60)
        try:
            yield Folder(folder)
        finally:
            command.run(["umount", folder], timeout=60)
            if kind == "btrfs":  # the kernel remembers devices by identity
                command.run(["btrfs", "device", "scan", "--forget", loop.path], ok=tuple(range(256)))


def may_look_into(kind: str, uuid: str | None, devices: int) -> str | None:
    """Why a filesystem may not be mounted to look into it; None where it may."""
    if os.geteuid() != 0:
        return "only root may mount it to look into it"
    if kind == "btrfs" and (devices != 1 or uuid is None or os.path.exists(f"/sys/fs/btrfs/{uuid}")):
        # Two of one identity at once are one to the kernel.
        return "a btrfs of the same identity is mounted, or it has several devices"
    return None
