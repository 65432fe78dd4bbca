"""What the kernel says is mounted and what it swaps to.

Invariant: every mount counts: bind mounts, those with anonymous device
numbers (btrfs, overlay, FUSE), and those that process 1 sees and we do not.
A line that cannot be understood is skipped, never guessed at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from msgspec import Struct

from imager.device.sysfs import device_number


class Mount(Struct, frozen=True):
    """One mount. `dev` is the filesystem's device number, anonymous for some."""

    dev: int
    root: str  # which folder of the filesystem is mounted
    target: str
    fstype: str
    source: str
    options: str

    def option(self, *keys: str) -> list[str]:
        """The values of `key=value` options, in order."""
        split = re.split(r"(?<!\\),", self.options)
        return [value for key, _, value in (o.partition("=") for o in split) if key in keys and value]


class Swap(Struct, frozen=True):
    """One active swap area: a device's or a file's path."""

    path: str
    kind: str
    size: int


def unescape(field: str) -> str:
    """Undo the kernel's octal escapes: `\\040` is a space."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), field)


def parse_mountinfo(content: str) -> list[Mount]:
    """The lines of `/proc/PID/mountinfo`."""
    mounts = []
    for line in content.splitlines():
        before, found, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        dev = device_number(left[2]) if len(left) >= 6 else None
        if not found or dev is None or len(right) < 3:
            continue
        options = f"{left[5]},{unescape(right[2])}"
        mounts.append(Mount(dev, unescape(left[3]), unescape(left[4]), right[0], unescape(right[1]), options))
    return mounts


def parse_swaps(content: str) -> list[Swap]:
    """The lines of `/proc/swaps`."""
    swaps = []
    for line in content.splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 3 and fields[2].isdigit():
            path = unescape(fields[0]).removesuffix(" (deleted)")
            swaps.append(Swap(path, fields[1], int(fields[2]) * 1024))
    return swaps


def mounts(sources: Iterable[str] = ("/proc/self/mountinfo", "/proc/1/mountinfo")) -> list[Mount]:
    """Every mount that this process or process 1 sees, each once."""
    found: dict[Mount, None] = {}
    for path in sources:
        found.update(dict.fromkeys(parse_mountinfo(_read(path))))
    return list(found)


def swaps(path: str = "/proc/swaps") -> list[Swap]:
    return parse_swaps(_read(path))


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError:
        return ""


def is_within(path: str, folder: str) -> bool:
    """Whether the canonical `path` is `folder` or lies inside it."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
