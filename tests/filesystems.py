"""Filesystems under test: made, filled, copied by their used blocks alone, and judged by others.

What a used-block map is worth is proved by what never saw it: the kernel, the
filesystems' own checkers, and partclone's maps.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import random
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from imager import command
from imager.device.loop import attach
from imager.engine import unused
from imager.errors import CommandError
from imager.extents import Extents
from imager.filesystem import maps
from imager.filesystem.used import Unknown, Used
from imager.lab.mounting import mounted
from imager.lab.raw import fill_with_noise
from tests.workbench import Workbench, state_in

MIB = 1 << 20
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
FICLONE = 0x40049409
Listing = dict[str, tuple[int, str]]

MAKE = {
    "ext": ["mke2fs", "-qF"],
    "xfs": ["mkfs.xfs", "-qf"],
    "btrfs": ["mkfs.btrfs", "-qf"],
}
CHECK = {
    "ext": [["e2fsck", "-fn"]],
    "xfs": [["xfs_repair", "-n"]],
    "btrfs": [["btrfs", "check", "--check-data-csum"]],
}
MOUNT = {"ext": "ext4", "xfs": "xfs", "btrfs": "btrfs"}
PARTCLONE = {"ext": "partclone.extfs", "xfs": "partclone.xfs", "btrfs": "partclone.btrfs"}


def make(kind: str, image: Path, size: int, options: str = "") -> None:
    """A new filesystem in a sparse file; `options` as on mkfs's command line. ext: ext2, unless they tell."""
    with open(image, "wb") as file:
        file.truncate(size)
    argv = [*MAKE[kind], *options.split(), str(image)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr[:200]}"


def make_full(kind: str, image: Path, size: int, options: str, tree: Path) -> None:
    """A new filesystem that mkfs fills from a folder of files, where the kernel mounts none of its kind."""
    if kind == "ext":
        return make(kind, image, size, f"{options} -d {tree}")
    lines = [f"{path.name} ---644 0 0 {path}" for path in sorted(tree.iterdir())]
    proto = image.with_suffix(".proto")
    proto.write_text("\n".join(["/", "0 0", "d--755 0 0", *lines, "$", "$", ""]))
    return make(kind, image, size, f"{options} -p {proto}")


def mountable(kind: str, image: Path) -> bool:
    """Whether this kernel knows all that the filesystem has."""
    try:
        with mount(kind, image):
            return True
    except CommandError:
        return False


@contextmanager
def mount(kind: str, image: Path, *, read_only: bool = False) -> Iterator[Path]:
    """The filesystem in a file, mounted beside it."""
    with (
        attach(image, read_only=read_only) as device,
        mounted(device.path, MOUNT[kind], image.parent / "mnt", read_only=read_only) as root,
    ):
        yield root


def fill(root: Path, seed: int, *, kind: str = "ext", most: int = 6 * MIB) -> None:
    """Files of many sizes, holes, preallocation, links, names; many of them deleted again."""
    chance = random.Random(seed)
    made: list[Path] = []
    written = 0
    while written < most:
        folder = root / f"d{chance.randrange(8)}" / f"e{chance.randrange(4)}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"file-{len(made)}-{'n' * chance.randrange(60)}"
        size = chance.choice((0, 20, 700, 4096, 9000, 70_000, 300_000, 900_000))
        path.write_bytes(chance.randbytes(size))
        written += size + 4096
        made.append(path)
        if chance.random() < 0.1:
            path.with_suffix(".link").symlink_to("x" * chance.randrange(1, 200))
    for path in chance.sample(made, len(made) // 3):
        path.unlink()
    left = [path for path in made if path.exists()]
    with open(root / "holes", "wb") as file:
        for at in range(0, 4 * MIB, 300_000):
            file.seek(at)
            file.write(chance.randbytes(5000))
    with open(root / "room", "wb") as file:
        file.write(b"begun")
        try:
            os.posix_fallocate(file.fileno(), 0, MIB)
        except OSError:
            pass  # ext2 has none
    for path in chance.sample(left, len(left) // 6):
        os.truncate(path, path.stat().st_size // 2)
    if kind == "btrfs":
        subvolume = root / "sub"
        command.run(["btrfs", "subvolume", "create", str(subvolume)])
        (subvolume / "inside").write_bytes(chance.randbytes(200_000))
        command.run(["btrfs", "subvolume", "snapshot", str(subvolume), str(root / "snap")])
        (subvolume / "inside").write_bytes(chance.randbytes(90_000))
        (root / "after").write_bytes(chance.randbytes(100_000))
    if kind in ("xfs", "btrfs"):
        _clone(left[0], root / "clone")


def _clone(source: Path, target: Path) -> None:
    """Share the blocks, where the filesystem can."""
    with open(source, "rb") as one, open(target, "wb") as other:
        try:
            fcntl.ioctl(other.fileno(), FICLONE, one.fileno())
        except OSError:
            other.write(b"no reflink here")


def listing(root: Path) -> Listing:
    """Every entry: its mode, and the digest of what it holds."""
    found: Listing = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder) / name
            mode = path.lstat().st_mode
            what = ""
            if stat.S_ISLNK(mode):
                what = os.readlink(path)
            elif stat.S_ISREG(mode):
                what = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(root))] = (mode, what)
    return found


def used(image: Path | str) -> Used | Unknown:
    """What the dispatcher says of a file or device."""
    fd = os.open(image, os.O_RDONLY)
    try:
        return maps.used_blocks(fd, 0, os.lseek(fd, 0, os.SEEK_END))
    finally:
        os.close(fd)


def restore_used(image: Path, extents: Extents, target: Path) -> None:
    """What a backup, and a restore onto a target full of random bytes, leave of the used blocks alone.

    What the backup kept beyond `extents` (whole blocks, the ends) is overwritten with noise again.
    """
    size = image.stat().st_size
    fill_with_noise(target, size)
    with tempfile.TemporaryDirectory(prefix="repo-", dir=image.parent) as name, state_in(Path(name, "state")):
        place = Workbench(Path(name), block_size=4096)
        summary = place.backup(image)
        [part] = summary.images[0].parts
        assert not part.every_block, part
        assert extents.total <= part.used <= extents.blocks(4096).total * 4096 + 2 * unused.EDGE
        restored = place.restore(summary.set, target, delta=True, overwrite=True, unused="leave")
        assert restored.bytes_unused == size - part.used
    noise = random.Random(size).randbytes(MIB)
    with open(target, "r+b") as out:
        for start, end in extents.complement(size):
            out.seek(start)
            while start < end:
                out.write(noise[: end - start])
                start += MIB


def checked(kind: str, image: Path) -> None:
    """The filesystem's own checker finds nothing."""
    for argv in CHECK[kind]:
        done = subprocess.run([*argv, str(image)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{argv}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


def scrubbed(root: Path) -> None:
    """btrfs reads every block with its checksum, all copies."""
    done = command.run(["btrfs", "scrub", "start", "-B", str(root)], ok=tuple(range(256)))
    assert done.returncode == 0 and b"no errors found" in done.stdout, done.stdout + done.stderr


def domain(kind: str, image: Path) -> Extents:
    """What partclone calls used. Its exit code says nothing."""
    out = image.with_suffix(".domain")
    argv = [PARTCLONE[kind], "-q", "-D", "-L", "/dev/null", "-s", str(image), "-o", str(out)]
    subprocess.run(argv, capture_output=True, check=False)
    lines = [line.split() for line in out.read_text().splitlines() if not line.startswith("#")]
    out.unlink()
    areas = [(int(a, 16), int(b, 16)) for a, b, mark in (f for f in lines if len(f) == 3) if mark == "+"]
    return Extents.of((start, start + length) for start, length in areas)


@contextmanager
def frozen(root: Path) -> Iterator[None]:
    """The filesystem that `root` is on, frozen."""
    fd = os.open(root, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FIFREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(fd, FITHAW, 0)
    finally:
        os.close(fd)


def copy(source: Path, target: Path) -> None:
    """What a file holds now, whatever its filesystem is doing meanwhile; holes stay holes."""
    subprocess.run(["cp", "--sparse=always", str(source), str(target)], check=True)


def sync(paths: Sequence[Path]) -> None:
    """fsync each."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def syncfs(root: Path) -> None:
    """Have the whole filesystem written out."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(root, os.O_RDONLY)
    assert libc.syncfs(fd) == 0
    os.close(fd)
