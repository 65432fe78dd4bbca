"""exFAT: what is in use, by its allocation bitmap.

Invariant: a map comes only from a volume that was unmounted cleanly and whose boot
region and bitmap hold what they must. The walk is `native/src/fs/exfat.rs`, which names its sources.
"""

from __future__ import annotations

from imager.filesystem import core
from imager.filesystem.used import Unknown, Used


def probe(fd: int, size: int, *, start: int = 0, sector: int = 512) -> str | None:
    """`exfat`, or None."""
    return core.probe("exfat", fd, size, start)


def used_blocks(fd: int, size: int, *, start: int = 0, sector: int = 512) -> Used | Unknown:
    """Its map; see `used.Reader`."""
    return core.used_blocks("exfat", fd, size, start)
