"""One filesystem's life in the lab: filled, changed, read back; mounted where possible.

Invariant: what `expected` tells is what the files are meant to be: read from
the mounted source, or from the staged tree that the filesystem was made
from; never from a restored copy.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from imager.lab import changes, disk, offline, tree
from imager.lab.disk import BTRFS, ESP, EXT4, XFS, Partition
from imager.lab.mounting import mounted
from imager.lab.workload import SYSTEM, Filler, Stock

Progress = Callable[[int], None]


class Changed(Struct, frozen=True):
    """What a round of changes did to a filesystem."""

    counts: Counter[str]
    remark: str


class Filesystem(Struct, frozen=True):
    """A partition, and the folders that the lab works with. `seed` decides its content."""

    part: Partition
    folder: Path
    seed: int

    @property
    def staged(self) -> Path:
        """The tree that an unmounted filesystem is made from."""
        return self.folder / f"tree-{self.part.name}"

    def budget(self) -> int:
        """How many bytes of files it gets."""
        return self.part.size // 5

    def build(self, path: str, progress: Progress) -> Stock:
        """Make the filesystem at `path` and fill it."""
        if self.part.mount:
            disk.make_filesystem(self.part, path, None)
            with mounted(path, self.part.name, self._point()) as root:
                return self._fill(root, progress)
        self.staged.mkdir()
        stock = self._fill(self.staged, progress)
        disk.make_filesystem(self.part, path, self.staged)
        return stock

    def change(self, path: str, number: int, renew: Callable[[Partition], None]) -> Changed:
        """Make round `number` of changes inside the filesystem at `path`."""
        if self.part.mount:
            with mounted(path, self.part.name, self._point()) as root:
                planned = changes.plan(root, number, self.seed)
                changes.apply(root, planned)
            return Changed(changes.summary(planned), "mounted")
        planned = changes.plan(self.staged, number, self.seed)
        changes.apply(self.staged, planned)
        if self.part.kind is ESP:
            remark = offline.change_fat(path, self.staged, planned)
        elif self.part.kind is EXT4:
            remark = offline.change_ext4(path, self.staged, planned)
        else:
            renew(self.part)
            disk.make_filesystem(self.part, path, self.staged)
            remark = f"made anew by mkfs.{self.part.name} (no tool changes it unmounted)"
        return Changed(changes.summary(planned), remark)

    def expected(self, path: str) -> tree.Listing:
        """What the files are to be, from the source at `path`."""
        if self.part.mount:
            with mounted(path, self.part.name, self._point(), read_only=True) as root:
                return tree.scan(root)
        return tree.bare(tree.scan(self.staged))

    def found(self, path: str) -> tree.Listing | None:
        """What the files of the copy at `path` are, as far as `expected` tells.

        None where no tool reads them without mounting.
        """
        if self.part.mount:
            with mounted(path, self.part.name, self._point(), read_only=True) as root:
                return tree.scan(root)
        if self.part.kind is XFS:
            return None
        extract = {
            ESP: offline.extract_fat,
            EXT4: offline.extract_ext4,
            BTRFS: offline.extract_btrfs,
        }[self.part.kind]
        with tempfile.TemporaryDirectory(prefix="found-", dir=self.folder) as name:
            extract(path, Path(name))
            return tree.bare(tree.scan(name))

    def _point(self) -> Path:
        return self.folder / "mnt" / self.part.name

    def _fill(self, root: Path, progress: Progress) -> Stock:
        filler = Filler(root, self.seed, progress)
        if self.part.kind is ESP:
            return filler.fat(self.budget())
        plain = self.part.kind is XFS and not self.part.mount
        return filler.posix(SYSTEM[self.part.name], self.budget(), plain_names=plain)
