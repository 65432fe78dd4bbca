"""FAT12, FAT16 and FAT32: what is in use, by the first of its tables.

Invariant: a map comes only from a volume that was unmounted cleanly and whose tables
are alike; bad clusters are left out. The walk is `native/src/fs/fat.rs`, which names its sources.
"""

from __future__ import annotations

from imager.filesystem import core
from imager.filesystem.used import Unknown, Used


def probe(fd: int, size: int, *, start: int = 0, sector: int = 512) -> str | None:
    """`fat12`, `fat16` or `fat32`, or None."""
    return core.probe("fat", fd, size, start)


def used_blocks(fd: int, size: int, *, start: int = 0, sector: int = 512) -> Used | Unknown:
    """Its map; see `used.Reader`."""
    return core.used_blocks("fat", fd, size, start)
