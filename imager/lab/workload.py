"""The files that the lab's filesystems hold: some of this machine's own, some made.

Invariant: everything is made by ordinary system calls below the folder
given; a file of this system is read, never linked to or changed. What is
generated depends on the seed alone.
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from msgspec import Struct, field

from imager.lab import content
from imager.units import KIB, MIB

SYSTEM = {
    "ext4": ("/usr/bin", "/usr/sbin", "/usr/lib"),
    "xfs": ("/usr/lib", "/usr/include"),
    "btrfs": ("/usr/share",),
}
"""Where each filesystem's share of real files comes from."""

_LIMIT = 8 * MIB


class Stock(Struct):
    """What was put into a tree."""

    files: int = 0
    folders: int = 0
    bytes: int = 0
    symlinks: int = 0
    hard_links: int = 0
    sparse: int = 0
    attributes: int = 0
    lacking: list[str] = field(default_factory=list)


class Filler:
    """Fills one tree; `progress` is told the bytes written as they are."""

    def __init__(self, root: Path, seed: int, progress: Callable[[int], None]) -> None:
        self.root = root
        self.stock = Stock()
        self._source = random.Random(seed)
        self._prose = content.Prose(self._source)
        self._progress = progress

    def posix(self, system: Iterable[str], budget: int, *, plain_names: bool = False) -> Stock:
        """About `budget` bytes of everything that a Unix filesystem can hold.

        `plain_names`: no names and links that a mkfs.xfs prototype cannot say.
        """
        self._system(system, budget * 45 // 100)
        self._series("logs", "log", budget * 23 // 100, self._prose.write)
        self._series("media", "bin", budget * 22 // 100, lambda size: content.noise(self._source, size))
        self._small(budget * 2 // 100)
        self._sparse(budget * 5 // 100)
        self._links(plain_names)
        self._attributes()
        self._oddities(plain_names)
        return self.stock

    def fat(self, budget: int) -> Stock:
        """What an EFI system partition holds: a loader, kernels, text."""
        self._folder("EFI/BOOT")
        self._file("EFI/BOOT/BOOTX64.EFI", content.noise(self._source, budget // 6))
        self._series("EFI/debian", "img", budget // 2, lambda size: content.noise(self._source, size))
        self._series("loader", "conf", budget // 6, self._prose.write)
        self._folder("fonts")
        for number in range(120):
            self._file(f"fonts/f{number:03}.pf2", self._prose.write(self._source.randint(100, 12 * KIB)))
        return self.stock

    def _system(self, roots: Iterable[str], budget: int) -> None:
        """Copy files and links of this machine, in name order, until the budget is used up.

        Their number is bounded too: mkfs.btrfs reckons with a lot of room for each.
        """
        left = budget
        most = 200 + budget // (24 * KIB)
        for path, info in _walk(roots):
            if info.st_size > min(_LIMIT, budget // 4):
                continue
            if left < info.st_size or self.stock.files + self.stock.symlinks >= most:
                return
            target = self.root / path.lstrip("/")
            if target.exists() or target.is_symlink():
                continue
            self._folder(os.path.dirname(path).lstrip("/"))
            if stat.S_ISLNK(info.st_mode):
                target.symlink_to(os.readlink(path))
                self.stock.symlinks += 1
                continue
            try:
                data = Path(path).read_bytes()
            except OSError:  # not for this user's eyes, or gone meanwhile
                continue
            self._file(path.lstrip("/"), [data])
            os.chmod(target, stat.S_IMODE(info.st_mode) & 0o777 | stat.S_IRUSR)
            os.utime(target, ns=(info.st_mtime_ns, info.st_mtime_ns))
            left -= len(data)

    def _series(self, folder: str, suffix: str, budget: int, make: Callable[[int], Iterator[bytes]]) -> None:
        """Files of 64 KiB to 4 MiB, until the budget is used up."""
        self._folder(folder)
        left, number = budget, 0
        while left > 0:
            size = min(left, (64 * KIB << number % 7) + self._source.randrange(4096))
            self._file(f"{folder}/{number:04}.{suffix}", make(size))
            left, number = left - size, number + 1

    def _small(self, budget: int) -> None:
        left, number = budget, 0
        while left > 0:
            size = self._source.randint(20, 2000)
            if number % 64 == 0:
                self._folder(f"many/{number // 64:03}")
            self._file(f"many/{number // 64:03}/{number:06}.txt", self._prose.write(size))
            left, number = left - size, number + 1

    def _sparse(self, budget: int) -> None:
        """Files of mostly holes, as virtual machines' disks are."""
        self._folder("sparse")
        large = max(4 * MIB, budget * 8)
        for name, islands, logical in (
            ("disk.img", 8, large),
            ("table.db", 5, large // 4),
            ("nothing.img", 0, MIB),
        ):
            path = self.root / "sparse" / name
            with path.open("wb") as file:
                file.truncate(logical)
                for _ in range(islands):
                    size = min(budget // 13, logical // 16)
                    file.seek(self._source.randrange(logical - size))
                    for piece in content.noise(self._source, size):
                        file.write(piece)
                        self._count(len(piece))
            self.stock.files += 1
            self.stock.sparse += 1

    def _links(self, short: bool) -> None:
        self._folder("links")
        for number in range(6):
            name = f"links/name-{number}"
            self._file(name, self._prose.write(3000 * number))
            os.link(self.root / name, self.root / f"links/also-{number}")
            (self.root / f"links/soft-{number}").symlink_to(f"../links/name-{number}")
            self.stock.hard_links += 1
            self.stock.symlinks += 1
        # mkfs.xfs gives a link that needs a block of its own (some 300 bytes) a wrong checksum
        length = 20 if short else 200
        for name, aim in (
            ("absolute", "/usr/bin/env"),
            ("dangling", "no/such/file"),
            ("long", "x/" * length + "y"),
        ):
            (self.root / "links" / name).symlink_to(aim)
            self.stock.symlinks += 1

    def _attributes(self) -> None:
        self._folder("attributes")
        for number in range(12):
            name = f"attributes/a{number:02}"
            self._file(name, self._prose.write(500 * number))
            try:
                os.setxattr(self.root / name, "user.lab.note", self._source.randbytes(1 + number * 40))
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EPERM):
                    raise
                self.stock.lacking.append("extended attributes")
                return
            self.stock.attributes += 1

    def _oddities(self, plain_names: bool) -> None:
        self._folder("odd/" + "/".join(f"level{n}" for n in range(20)))
        self._folder("odd/empty-folder")
        self._file("odd/empty", [])
        self._file("odd/private", [b"for nobody else\n"])
        os.chmod(self.root / "odd/private", 0o600)
        if not plain_names:
            self._file("odd/name with  blanks", [b"blanks\n"])
            self._file("odd/Grüße-日本.txt", ["Grüße\n".encode()])
            self._file("odd/" + "n" * 255, [b"long\n"])

    def _folder(self, name: str) -> None:
        path = self.root / name
        missing = [
            p for p in (path, *path.parents) if p != self.root and self.root in p.parents and not p.exists()
        ]
        for folder in reversed(missing):
            folder.mkdir()
            self.stock.folders += 1

    def _file(self, name: str, pieces: Iterable[bytes]) -> None:
        with (self.root / name).open("wb") as file:
            for piece in pieces:
                file.write(piece)
                self._count(len(piece))
        self.stock.files += 1

    def _count(self, written: int) -> None:
        self.stock.bytes += written
        self._progress(written)


def _walk(roots: Iterable[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Regular files and links below the folders, in name order, those with odd names left out."""
    for root in roots:
        if os.path.islink(root):
            continue
        for folder, names, files in os.walk(root):
            names.sort()
            for name in sorted(files):
                path = os.path.join(folder, name)
                if not path.isascii() or any(c.isspace() or c in "\"'\\" for c in path):
                    continue
                try:
                    info = os.lstat(path)
                except OSError:
                    continue
                if stat.S_ISREG(info.st_mode) or stat.S_ISLNK(info.st_mode):
                    yield path, info
