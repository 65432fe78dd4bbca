"""The lab's disk: a GPT with the filesystems whose tools are here.

Invariant: partitions and their sizes follow from the disk's size and the
tools that are installed, and whatever is left out is named with its reason.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from imager import command
from imager.errors import CommandError, UsageError
from imager.lab import offline
from imager.units import MIB, format_size

SMALLEST = 192 * MIB
"""The least size of a lab disk: an EFI system partition, a small ext4, and the gaps."""

_FDISK = "install the package fdisk (util-linux): the lab needs a partition table"
_GAP = 768 << 10
"""Where random bytes stand outside any partition, as a boot loader's do."""


class Kind(Struct, frozen=True):
    """A filesystem that the lab knows. `weight` is its share of the disk's free size."""

    name: str
    type: str
    tools: tuple[str, ...]
    offline_tools: tuple[str, ...]
    smallest: int
    weight: int


ESP = Kind("fat", "U", ("mkfs.fat", "fsck.fat", "mcopy", "mmd", "mdel", "mmove", "mattrib"), (), 40 * MIB, 0)
EXT4 = Kind("ext4", "L", ("mkfs.ext4", "e2fsck"), ("debugfs",), 64 * MIB, 3)
XFS = Kind("xfs", "L", ("mkfs.xfs", "xfs_repair"), (), 320 * MIB, 3)
BTRFS = Kind("btrfs", "L", ("mkfs.btrfs", "btrfs"), (), 256 * MIB, 2)
KINDS = (ESP, EXT4, XFS, BTRFS)


class LeftOut(Struct, frozen=True):
    """A filesystem that this lab goes without."""

    name: str
    why: str


class Partition(Struct, frozen=True):
    """A place on the disk, in bytes; `mount` says whether it is worked on mounted."""

    number: int
    kind: Kind
    start: int
    size: int
    uuid: str
    mount: bool

    @property
    def name(self) -> str:
        return self.kind.name


def choose(size: int, devices: bool) -> tuple[tuple[Partition, ...], tuple[LeftOut, ...]]:
    """Lay out a disk of `size` bytes. `devices`: loop devices and mounts may be used.

    Raises `UsageError` where the disk is too small, `CommandError` where sfdisk or ext4's tools are missing.
    """
    if size < SMALLEST:
        raise UsageError(
            f"{format_size(size)} is too small", hint=f"--size {format_size(SMALLEST)} is the least"
        )
    if command.find("sfdisk") is None:
        raise CommandError("sfdisk is not installed", hint=_FDISK)
    kinds: list[tuple[Kind, bool]] = []
    left_out: list[LeftOut] = []
    room = size - 2 * MIB
    for kind in KINDS:
        mount = devices and kind is not ESP and _mountable(kind.name)
        missing = _missing(kind, mount)
        if missing and kind is EXT4:
            raise CommandError(f"{missing} is not installed", hint="install e2fsprogs: the lab needs ext4")
        if missing:
            left_out.append(LeftOut(kind.name, f"{missing} is not installed"))
        elif room < kind.smallest:
            why = f"needs {format_size(kind.smallest)}, and a disk of {format_size(size)} has no room for it"
            left_out.append(LeftOut(kind.name, why))
        else:
            kinds.append((kind, mount))
            room -= kind.smallest
    return _place(kinds, room), tuple(left_out)


def _place(kinds: Sequence[tuple[Kind, bool]], room: int) -> tuple[Partition, ...]:
    weights = sum(kind.weight for kind, _ in kinds)
    at = MIB
    out = []
    for number, (kind, mount) in enumerate(kinds, 1):
        size = (kind.smallest + room * kind.weight // weights) // MIB * MIB
        out.append(Partition(number, kind, at, size, str(uuid.uuid4()), mount))
        at += size
    return tuple(out)


def _missing(kind: Kind, mount: bool) -> str | None:
    tools = kind.tools if mount else kind.tools + kind.offline_tools
    return next((tool for tool in tools if command.find(tool) is None), None)


def _mountable(name: str) -> bool:
    """Whether this kernel mounts the filesystem, its module loaded if need be."""
    for _ in range(2):
        lines = Path("/proc/filesystems").read_text().splitlines()
        if any(line.split()[-1] == name for line in lines if line.split()):
            return True
        if command.find("modprobe") is None:
            return False
        command.run(["modprobe", "--quiet", name], ok=tuple(range(256)))
    return False


def make_empty(path: Path, size: int) -> None:
    """A file of `size` bytes without content, with room before the first partition in use."""
    with path.open("wb") as file:
        file.truncate(size)
        file.seek(_GAP)
        file.write(b"imager lab: bytes that belong to no partition\n" + os.urandom(64 << 10))


def write_table(path: Path, partitions: Sequence[Partition]) -> None:
    """Write the GPT, by sfdisk, into a plain file."""
    disk = uuid.uuid5(uuid.NAMESPACE_OID, partitions[0].uuid)
    lines = ["label: gpt", f"label-id: {disk}"]
    lines += [
        f"start={p.start // 512}, size={p.size // 512}, type={p.kind.type}, uuid={p.uuid}, name=lab-{p.name}"
        for p in partitions
    ]
    argv = ["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", str(path)]
    command.run(argv, stdin="\n".join([*lines, ""]).encode(), hint=_FDISK)


def make_filesystem(part: Partition, path: str, staged: Path | None) -> None:
    """Make the filesystem at `path` (a device or a file), holding the tree `staged` if there is one.

    Made again with the same `part`, it has the same identity. A file at `path` has the partition's size.
    """
    if part.kind is ESP:
        volume = part.uuid.replace("-", "")[:8]
        command.run(["mkfs.fat", "-F", "32", "-i", volume, "-n", "LAB-EFI", path])
        if staged:
            offline.fill_fat(path, staged)
    elif part.kind is EXT4:
        options = ["-q", "-F", "-b", str(offline.BLOCK), "-L", "lab-root", "-U", part.uuid]
        seed = ["-E", f"hash_seed={part.uuid}"]
        command.run(["mkfs.ext4", *options, *seed, *(["-d", str(staged)] if staged else []), path])
    elif part.kind is XFS:
        argv = ["mkfs.xfs", "-q", "-f", "-L", "lab-data", "-m", f"uuid={part.uuid}"]
        if staged:
            proto = staged.parent / f"{staged.name}.prototype"
            proto.write_text(offline.prototype(staged))
            argv += ["-p", str(proto)]
        command.run([*argv, path])
    else:
        options = ["-q", "-f", "-L", "lab-home", "-U", part.uuid]
        # with metadata kept twice, --rootdir reckons with twice the room and makes the file grow
        tree = ["-m", "single", "--rootdir", str(staged)] if staged else []
        before = os.stat(path).st_size
        command.run(["mkfs.btrfs", *options, *tree, path])
        if os.stat(path).st_size != before:
            raise CommandError(
                f"mkfs.btrfs made {path} grow: the files do not fit", hint="try a larger --size"
            )


def check_filesystem(part: Partition, path: str) -> str | None:
    """Have the filesystem's own checker read it, changing nothing; None or what it found."""
    argv = {
        "fat": ["fsck.fat", "-n", path],
        "ext4": ["e2fsck", "-f", "-n", path],
        "xfs": ["xfs_repair", "-n", path],
        "btrfs": ["btrfs", "check", "--readonly", path],
    }[part.name]
    done = command.run(argv, ok=tuple(range(256)))
    if done.returncode == 0:
        return None
    said = (done.stdout + b"\n" + done.stderr).decode(errors="replace").strip().splitlines()
    return f"{argv[0]} ended with code {done.returncode}: {said[-1] if said else 'no message'}"
