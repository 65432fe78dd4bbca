"""Single small files of a filesystem that nobody mounted, or that is mounted already.

Invariant: nothing is ever written to the source. ext is read by debugfs and FAT by
mtools, in user space; XFS and btrfs by a mount that is read-only twice (the mount,
and the loop device below it), replays no log, and is made on devices only, never on
image files, whose content the kernel should not have to trust.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from imager import command
from imager.errors import CommandError, ImagerError

LONGEST = 64 << 10
"""A file that is longer is not read."""
_MOST_NAMES = 4096
_SAFE = re.compile(r"[A-Za-z0-9_.+@/-]+")


class Files(Protocol):
    """Files by their paths below a filesystem's root, without a leading slash."""

    def read(self, path: str) -> bytes | None:
        """The content of a plain file of at most `LONGEST` bytes; None where there is none."""

    def names(self, path: str) -> tuple[str, ...]:
        """Names in a folder; none where there is no such folder."""


def _is_safe(path: str) -> bool:
    """These programs parse what they are told: only plain characters come through."""
    return _SAFE.fullmatch(path) is not None and ".." not in path.split("/")


class Ext:
    """ext2, ext3, ext4 at `start` of the open descriptor `fd`, by debugfs."""

    def __init__(self, fd: int, start: int) -> None:
        self._place = f"/proc/{os.getpid()}/fd/{fd}?offset={start}"

    def _ask(self, request: str) -> bytes:
        try:
            return command.run(["debugfs", "-R", request, self._place], timeout=30).stdout
        except CommandError:
            return b""

    def read(self, path: str) -> bytes | None:
        if not _is_safe(path):
            return None
        said = self._ask(f"stat /{path}").decode(errors="replace")
        size = re.search(r"\bSize:\s+(\d+)", said)
        if "Type: regular" not in said or size is None or int(size[1]) > LONGEST:
            return None
        return self._ask(f"cat /{path}")[:LONGEST]

    def names(self, path: str) -> tuple[str, ...]:
        if not _is_safe(path):
            return ()
        said = self._ask(f"ls -p /{path}").decode(errors="replace")
        found = (line.split("/") for line in said.splitlines())
        return tuple(sorted(f[5] for f in found if len(f) > 5 and f[5] not in (".", "..")))[:_MOST_NAMES]


class Fat:
    """FAT at `start` of the open descriptor `fd`, by mtools."""

    def __init__(self, fd: int, start: int) -> None:
        self._place = f"/proc/{os.getpid()}/fd/{fd}@@{start}"

    def _ask(self, program: str, *arguments: str) -> bytes:
        environment = {"MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": "/dev/null"}
        try:
            argv = [program, *arguments[:-1], "-i", self._place, arguments[-1]]
            return command.run(argv, timeout=30, env=environment).stdout
        except CommandError:
            return b""

    def read(self, path: str) -> bytes | None:
        return (self._ask("mtype", f"::/{path}")[:LONGEST] or None) if _is_safe(path) else None

    def names(self, path: str) -> tuple[str, ...]:
        if not _is_safe(path):
            return ()
        lines = self._ask("mdir", "-b", f"::/{path}").decode(errors="replace").splitlines()
        return tuple(sorted(line.rstrip("/").rsplit("/", 1)[-1] for line in lines))[:_MOST_NAMES]


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
            return tuple(sorted(os.listdir(place)))[:_MOST_NAMES] if place else ()
        except OSError:
            return ()


@contextmanager
def looked_into(device: str, kind: str, start: int, size: int) -> Iterator[Folder]:
    """XFS or btrfs on a device, mounted for as long as the context lasts. Needs root.

    Raises `ImagerError` where that cannot be.
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


__all__ = ["LONGEST", "Ext", "Fat", "Files", "Folder", "ImagerError", "looked_into", "may_look_into"]
