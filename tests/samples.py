"""The small filesystems of fixtures/filesystems, unpacked into sparse files."""

from __future__ import annotations

import os
from pathlib import Path

import zstandard

FOLDER = Path(__file__).parents[1] / "fixtures/filesystems"
PAGE = 4096
KINDS = {"ext2": "ext2", "ext4": "ext4", "bigalloc": "ext4", "xfs4": "xfs", "xfs5": "xfs", "btrfs": "btrfs"}
"Samples, and what `maps.probe` calls them."
UNREPLAYED = {"unreplayed3": "ext3", "unreplayed4": "ext4"}
"Those that were mounted when they were copied."


class Sample:
    """A filesystem's size, and its pages that are not zero, by number."""

    def __init__(self, name: str) -> None:
        raw = zstandard.ZstdDecompressor().decompress((FOLDER / f"{name}.pages.zst").read_bytes(), 1 << 23)
        self.size = int.from_bytes(raw[:8], "little")
        self.pages = {
            int.from_bytes(raw[at : at + 8], "little"): raw[at + 8 : at + 8 + PAGE]
            for at in range(8, len(raw), 8 + PAGE)
        }

    def write(self, fd: int, start: int = 0) -> None:
        """Put it into a file, from byte `start` on."""
        os.ftruncate(fd, start + self.size)
        for number, page in self.pages.items():
            os.pwrite(fd, page, start + number * PAGE)
