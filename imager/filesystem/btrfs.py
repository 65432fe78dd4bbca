"""btrfs on one device: what is in use, by its extent tree, through its chunk tree.

Invariant: every node that is read is verified (checksum, place, generation,
level), every copy of a block counts as used, and the extents add up to what
the superblock says; else there is no map. The walk is
`native/src/fs/btrfs.rs`, which names its sources.
"""

from __future__ import annotations

from imager.filesystem import core
from imager.filesystem.used import Unknown, Used


def probe(fd: int, size: int, *, start: int = 0, sector: int = 512) -> str | None:
    """`btrfs`, or None."""
    return core.probe("btrfs", fd, size, start)


def used_blocks(fd: int, size: int, *, start: int = 0, sector: int = 512) -> Used | Unknown:
    """Its map; see `used.Reader`."""
    return core.used_blocks("btrfs", fd, size, start)
