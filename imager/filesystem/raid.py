"""A member of a Linux software RAID: alone, nothing of it tells what is in use.

Invariant: there is never a map.
"""

from __future__ import annotations

from imager.device import md
from imager.device.window import Window
from imager.filesystem.used import Unknown, Used


def probe(fd: int, size: int, *, start: int = 0, sector: int = 512) -> str | None:
    """`linux_raid_member`, or None."""
    try:
        return "linux_raid_member" if md.read_member(Window(fd, start, size).read, size) else None
    except OSError:
        return None


def used_blocks(fd: int, size: int, *, start: int = 0, sector: int = 512) -> Used | Unknown:
    """`Unknown`; see `used.Reader`."""
    return Unknown("it is a member of a software RAID: what is in use is known to the array alone")
