"""NTFS: what is in use, by `$Bitmap`.

Invariant: a map comes only from a volume that is neither dirty nor hibernated and
whose log holds nothing to replay. The walk is `native/src/fs/ntfs.rs`, which names its sources.
"""

from __future__ import annotations

from imager.filesystem import core
from imager.filesystem.used import Unknown, Used


def probe(fd: int, size: int, *, start: int = 0, sector: int = 512) -> str | None:
    """`ntfs`, or None."""
    return core.probe("ntfs", fd, size, start)


def used_blocks(fd: int, size: int, *, start: int = 0, sector: int = 512) -> Used | Unknown:
    """Its map; see `used.Reader`."""
    return core.used_blocks("ntfs", fd, size, start)
