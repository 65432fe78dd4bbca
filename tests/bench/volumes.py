"""The filesystems that `filesystems.py` images: one of each kind, made once and kept beside the disk.

Invariant: ext4 and XFS are those of the benchmark's disk; the others hold the same two halves that its XFS
holds, prose and noise, and some thousand small files, a third of them deleted again. A volume is kept under
the number of the recipe, so that a changed recipe makes it anew.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import content
import disk
import sparse

sys.path.insert(0, str(Path(__file__).parents[2]))

from imager.device.loop import attach
from imager.lab.mounting import mounted

VERSION = 1
"""Of the recipes."""
MIB = 1 << 20
TIB = 1 << 40
SIZE = 2048 * MIB
LARGE = 150 * MIB
"""Bytes of noise, and of prose."""
SMALL = 6000
"""Small files."""
KINDS = ("ext4", "xfs", "btrfs", "fat", "exfat", "ntfs")


def cache() -> Path:
    """Where they are kept."""
    folder = Path(tempfile.gettempdir()) / "imager-bench-cache"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def volume(kind: str, image: Path) -> None:
    """Put a filesystem of that kind at `image`."""
    if kind in ("ext4", "xfs"):
        stored = cache() / "disk.img"
        if not stored.exists():
            disk.cached(image)
            image.unlink()
        sparse.copy(stored, image, disk.ROOT if kind == "ext4" else disk.DATA)
        return
    stored = cache() / f"{kind}-{VERSION}.img"
    if not stored.exists():
        _made(stored, lambda made: _filled(kind, made))
    sparse.copy(stored, image)


def huge(kind: str, count: int) -> Path:
    """A filesystem of 4 TiB with so many files, where it is kept: ext4 or xfs."""
    stored = cache() / f"{kind}-4T-{count}-{VERSION}.img"
    if not stored.exists():
        _made(stored, lambda made: _crowded(kind, made, count))
    return stored


def _made(stored: Path, make: Callable[[Path], None]) -> None:
    """Make it beside, then move it into its place: what is there is whole."""
    beside = stored.with_suffix(f".{os.getpid()}")
    try:
        make(beside)
        beside.replace(stored)
    finally:
        beside.unlink(missing_ok=True)


def _call(*argv: str) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{argv[0]} failed: {done.stderr.strip() or done.stdout.strip()}")


def _tree(root: Path) -> None:
    """The files, in folders of a few hundred."""
    for kind, make in (("media", content.noise), ("logs", content.prose)):
        (root / kind).mkdir(parents=True)
        left, number = LARGE, 0
        while left:
            size = min(left, (1 << number % 6) * MIB)
            content.write(root / kind / f"{kind}-{number}", make(disk.hash_seed(kind, number), size))
            left, number = left - size, number + 1
    chance = random.Random(1)
    words = b"".join(content.prose(2, MIB))
    for number in range(SMALL):
        folder = root / "small" / str(number // 300)
        folder.mkdir(parents=True, exist_ok=True)
        size = int(chance.paretovariate(0.9) * 300) % 60_000
        at = chance.randrange(MIB - size)
        (folder / f"file-{number}").write_bytes(words[at : at + size])


def _small(root: Path) -> list[Path]:
    """Those of the small files that are deleted again."""
    files = sorted((root / "small").rglob("file-*"))
    return random.Random(3).sample(files, len(files) // 3)


def _filled(kind: str, image: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="imager-bench-build-") as name:
        tree, root = Path(name) / "tree", Path(name) / "root"
        _tree(tree)
        root.mkdir()
        with image.open("wb") as file:
            file.truncate(SIZE)
        if kind == "btrfs":
            _call("mkfs.btrfs", "-qf", str(image))
            with attach(image) as device, mounted(device.path, "btrfs", root):
                _copy(tree, root)
        elif kind == "fat":
            _call("mkfs.fat", "-F", "32", str(image))
            _call("mcopy", "-Qs", "-i", str(image), *map(str, sorted(tree.iterdir())), "::")
            gone = [f"::{path.relative_to(tree)}" for path in _small(tree)]
            for at in range(0, len(gone), 200):
                _call("mdel", "-i", str(image), *gone[at : at + 200])
        elif kind == "exfat":
            _call("mkfs.exfat", str(image))
            with attach(image) as device:
                _by_fuse("mount.exfat-fuse", device.path, root, tree)
        else:
            _call("mkntfs", "-Q", "-q", "-F", str(image))
            _by_fuse("ntfs-3g", str(image), root, tree)


def _by_fuse(program: str, source: str, root: Path, tree: Path) -> None:
    _call(program, source, str(root))
    try:
        _copy(tree, root)
    finally:
        _call("umount", str(root))


def _copy(tree: Path, root: Path) -> None:
    shutil.copytree(tree, root, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for path in _small(root):
        path.unlink()


def _crowded(kind: str, image: Path, count: int) -> None:
    """4 TiB; a third of the files has content, and every seventh is deleted again."""
    with image.open("wb") as file:
        file.truncate(4 * TIB)
    _call(*{"ext4": ["mkfs.ext4", "-qF"], "xfs": ["mkfs.xfs", "-qf"]}[kind], str(image))
    with (
        tempfile.TemporaryDirectory(prefix="imager-bench-mnt-") as name,
        attach(image) as device,
        mounted(device.path, kind, Path(name)) as root,
    ):
        for number in range(count):
            if number % 1000 == 0:
                folder = root / f"{number // 100_000}" / f"{number // 1000}"
                folder.mkdir(parents=True)
            fd = os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT)
            if number % 3 == 0:
                os.write(fd, b"x" * (number % 9000))
            os.close(fd)
        os.sync()
        for number in range(0, count, 7):
            os.unlink(root / f"{number // 100_000}" / f"{number // 1000}" / f"{number}")
