"""ext2, ext3 and ext4: what is in use, by their block bitmaps.

Invariant: a map comes only from a filesystem that was left cleanly, or whose
journal was replayed in memory, exactly; whose descriptors, checksums and
counts agree. All metadata counts as used, whatever the bitmaps say. The walk
is `native/src/fs/ext.rs`, which names its sources.
"""

from __future__ import annotations

from imager.filesystem import core
from imager.filesystem.used import Unknown, Used


def probe(fd: int, size: int, *, start: int = 0, sector: int = 512) -> str | None:
    """`ext2`, `ext3` or `ext4`, as the features in the superblock say."""
    return core.probe("ext", fd, size, start)


def used_blocks(fd: int, size: int, *, start: int = 0, sector: int = 512) -> Used | Unknown:
    """Its map; see `used.Reader`."""
    return core.used_blocks("ext", fd, size, start)
