"""The lab's own mounts: made below its folder, and all gone when it ends.

Invariant: only mount points below the folder given are ever unmounted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from imager import command
from imager.device import mounts
from imager.errors import CommandError

_TRIES = 20


@contextmanager
def mounted(device: str, kind: str, at: Path, *, read_only: bool = False) -> Iterator[Path]:
    """The filesystem on `device`, mounted at `at` for as long as the context lasts."""
    at.mkdir(parents=True, exist_ok=True)
    options = ["nodev", "nosuid", "noexec", "noatime", "ro" if read_only else "rw"]
    if kind == "xfs":
        options.append("nouuid")  # a copy of it was mounted a moment ago
    command.run(["mount", "-t", kind, "-o", ",".join(options), device, str(at)])
    try:
        yield at
    finally:
        _unmount(at)
        if kind == "btrfs":  # the kernel remembers devices by identity, and the copies share theirs
            command.run(["btrfs", "device", "scan", "--forget", device], ok=tuple(range(256)))


def sweep(folder: Path) -> list[str]:
    """Unmount whatever is still mounted below `folder`; returns what could not be."""
    below = f"{folder.resolve()}/"
    for point in sorted(_points(below), reverse=True):
        try:
            _unmount(Path(point))
        except CommandError:
            continue  # reported by what is left
    return sorted(_points(below))


def _points(below: str) -> list[str]:
    return [m.target for m in mounts.mounts(["/proc/self/mountinfo"]) if m.target.startswith(below)]


def _unmount(at: Path) -> None:
    """Another program (a desktop's indexer, say) may look into it for a moment: try for a while."""
    for attempt in range(_TRIES):
        try:
            command.run(["umount", str(at)])
            return
        except CommandError:
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.05)
