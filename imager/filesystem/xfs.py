"""XFS, versions 4 and 5: what is in use, as all but what its free-space b-trees list.

Invariant: a map comes only from a filesystem whose log holds nothing to
replay, or nothing but its superblock; whose b-trees are whole and whose
counts agree. The walk is `native/src/fs/xfs.rs`, which names its sources.
"""

from __future__ import annotations

from imager.filesystem import core
from imager.filesystem.used import Unknown, Used


def probe(fd: int, size: int, *, start: int = 0, sector: int = 512) -> str | None:
    """`xfs`, or None."""
    return core.probe("xfs", fd, size, start)


def used_blocks(fd: int, size: int, *, start: int = 0, sector: int = 512) -> Used | Unknown:
    """Its map; see `used.Reader`."""
    return core.used_blocks("xfs", fd, size, start)
