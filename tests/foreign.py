"""FAT, exFAT and NTFS under test, which the kernel need not know: filled and read in user space.

FAT by mtools; exFAT by a FUSE driver on a loop device; NTFS by ntfs-3g.
"""

from __future__ import annotations

import os
import random
import re
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imager import command
from imager.device.loop import attach
from imager.extents import Extents
from tests.filesystems import MIB, Listing, listing

MAKE = {"fat": ["mkfs.fat"], "exfat": ["mkfs.exfat"], "ntfs": ["mkntfs", "-Q", "-q", "-F"]}
CHECK = {"fat": ["fsck.fat", "-n"], "exfat": ["fsck.exfat", "-n"], "ntfs": ["ntfsfix", "-n"]}
PARTCLONE = {"fat": "partclone.fat", "exfat": "partclone.exfat", "ntfs": "partclone.ntfs"}
TOOLS = ["mcopy", "mmd", "mdel", "mount.exfat-fuse", "ntfs-3g", "ntfscp", *PARTCLONE.values()]
TOOLS += [argv[0] for argv in (*MAKE.values(), *CHECK.values())]


def make(kind: str, image: Path, size: int, options: str = "") -> None:
    """A new filesystem in a sparse file; `options` as on mkfs's command line."""
    with open(image, "wb") as file:
        file.truncate(size)
    subprocess.run([*MAKE[kind], *options.split(), str(image)], check=True, capture_output=True)


def without_fuse() -> str | None:
    """Why nothing can be mounted by FUSE; None where it can."""
    return None if os.geteuid() == 0 and os.path.exists("/dev/fuse") else "needs root and FUSE"


@contextmanager
def mounted(kind: str, image: Path) -> Iterator[Path]:
    """exFAT or NTFS, mounted beside its image."""
    root = image.parent / "mnt"
    root.mkdir(exist_ok=True)
    if kind == "ntfs":
        with _mount(["ntfs-3g", str(image), str(root)], root):
            yield root
        return
    with attach(image) as device, _mount(["mount.exfat-fuse", device.path, str(root)], root):
        yield root


@contextmanager
def _mount(argv: list[str], root: Path) -> Iterator[None]:
    command.run(argv)
    try:
        yield
    finally:
        command.run(["umount", str(root)])


def tree(root: Path, seed: int, most: int) -> Iterator[tuple[str, bytes]]:
    """Paths and contents of many sizes, their folders first."""
    chance = random.Random(seed)
    written, number = 0, 0
    while written < most:
        size = chance.choice((0, 20, 700, 4096, 9000, 70_000, 200_000))
        name = f"d{chance.randrange(6)}/file {number}-{'n' * chance.randrange(30)}"
        yield name, chance.randbytes(min(size, most))
        written += size + 2048
        number += 1


def fill(kind: str, image: Path, seed: int, most: int) -> None:
    """Files and folders; a third of them deleted, and new ones made where they were."""
    if kind == "fat":
        _fill_fat(image, seed, most)
        return
    with mounted(kind, image) as root:
        for round_, share in enumerate((most, most // 3)):
            made = []
            for name, content in tree(root, seed + round_, share):
                path = root / f"r{round_}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                made.append(path)
            for path in random.Random(seed).sample(made, len(made) // 3):
                path.unlink()


def _fill_fat(image: Path, seed: int, most: int) -> None:
    for round_, share in enumerate((most, most // 3)):
        folder = image.parent / f"tree{seed}-{round_}"
        for name, content in tree(folder, seed + round_, share):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        command.run(["mcopy", "-Qs", "-i", str(image), str(folder), f"::r{round_}"], env=_MTOOLS)
        gone = random.Random(seed).sample(sorted(p for p in folder.rglob("*") if p.is_file()), 4)
        for path in gone:
            place = f"::r{round_}/{path.relative_to(folder)}"
            command.run(["mdel", "-i", str(image), place], env=_MTOOLS)


_MTOOLS = {"MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": "/dev/null"}


def found(kind: str, image: Path) -> Listing:
    """Every file with its digest."""
    if kind != "fat":
        with mounted(kind, image) as root:
            return listing(root)
    out = image.parent / f"out-{image.name}"
    out.mkdir(exist_ok=True)
    command.run(["mcopy", "-Qsn", "-i", str(image), "::*", str(out)], env=_MTOOLS)
    return listing(out)


def clusters(image: Path) -> Extents:
    """What the files of a FAT take, by mtools."""
    raw = image.read_bytes()[:64]
    sector, per, reserved, fats, roots, _, _, fat = struct.unpack_from("<HBHBHHBH", raw, 11)
    first = (reserved + fats * fat) * sector + roots * 32
    names = [name for name, (mode, _) in found("fat", image).items() if stat.S_ISREG(mode)]
    places = [f"::{name}" for name in names]
    said = command.text(["mshowfat", "-i", str(image), *places], env=_MTOOLS)
    out = []
    for run in re.findall(r"<(\d+(?:-\d+)?)>", said):
        begin, _, end = run.partition("-")
        out.append((int(begin) - 2, int(end or begin) - 1))
    return Extents.of((first + a * per * sector, first + b * per * sector) for a, b in out)


def checked(kind: str, image: Path) -> None:
    """The filesystem's own checker finds nothing."""
    argv = [*CHECK[kind], str(image)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def changed(image: Path, change: Callable[[bytearray], None]) -> Path:
    """A copy of an image, with some of its bytes changed."""
    raw = bytearray(image.read_bytes())
    change(raw)
    copy = image.with_name(f"changed-{image.name}")
    copy.write_bytes(raw)
    return copy


__all__ = ["MIB", "changed", "checked", "fill", "found", "make", "mounted", "without_fuse"]
