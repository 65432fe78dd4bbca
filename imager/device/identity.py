"""Who a source or a target is, whatever the kernel calls it today.

Invariant: `key` never rests on a size or a kernel name alone: it is a WWN or
serial, a stack's or a table's UUID, a file's path, or, where a disk has
nothing of its own, this one attachment in this one boot. For a plain file
`identify` is one stat: no program is started and no library loaded.
"""

from __future__ import annotations

import os
import stat

from msgspec import Struct

from imager.errors import SourceError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from imager.device.partition_table import Table
    from imager.device.sysfs import Node

SYS = "/sys"
_DEPTH = 8  # loops over loops over ...


class Identity(Struct, frozen=True):
    """One source or target at one moment.

    `kind` is disk, partition, loop, dm, md, rom, file or stream. `dev` is the
    device's own number, for a file that of its filesystem. `fs_uuid` is
    looked up only where a device has no better identity.
    """

    kind: str
    path: str
    name: str
    key: str
    size: int = 0
    logical_sector: int = 512
    physical_sector: int = 512
    serial: str | None = None
    wwn: str | None = None
    model: str | None = None
    ptuuid: str | None = None
    partuuid: str | None = None
    fs_uuid: str | None = None
    stack_uuid: str | None = None
    number: int | None = None
    diskseq: int | None = None
    dev: int = 0
    inode: int = 0
    backing: str | None = None

    @property
    def is_device(self) -> bool:
        return self.kind not in ("file", "stream")

    @property
    def confirmation(self) -> str:
        """What a person types to confirm a write: the serial's last four characters, or the name."""
        return self.serial[-4:] if self.serial else self.name


def identify(path: str | os.PathLike[str], *, sys: str = SYS) -> Identity:
    """The identity of what `path` leads to; `-` and pipes are streams.

    Raises `SourceError` where nothing is there and `UsageError` for what
    cannot be a source, such as a folder.
    """
    given = os.fspath(path)
    if given == "-":
        return Identity("stream", "-", "-", "stream:")
    canonical = os.path.realpath(given)
    try:
        info = os.stat(canonical)
    except OSError as error:
        raise SourceError(f"{given}: {error.strerror}") from error
    mode = info.st_mode
    if stat.S_ISREG(mode):
        return Identity(
            "file",
            canonical,
            os.path.basename(canonical),
            f"file:{canonical}",
            size=info.st_size,
            dev=info.st_dev,
            inode=info.st_ino,
        )
    if stat.S_ISBLK(mode):
        return identify_device(info.st_rdev, sys=sys)
    if stat.S_ISFIFO(mode):
        return Identity("stream", canonical, os.path.basename(canonical), "stream:")
    what = "a folder" if stat.S_ISDIR(mode) else "neither a file nor a block device"
    raise UsageError(f"{given} is {what}", hint="name a block device, an image file, or - for standard input")


def identify_device(dev: int, *, sys: str = SYS) -> Identity:
    """The identity of the block device with this number."""
    from imager.device import sysfs

    name = sysfs.name_of(dev, sys)
    node = sysfs.read_node(name, sys) if name else None
    if node is None:
        raise SourceError(f"the kernel knows no block device {os.major(dev)}:{os.minor(dev)}")
    return identify_node(node, sys=sys)


def identify_node(node: Node, *, sys: str = SYS, depth: int = 0) -> Identity:
    """The identity of a device that sysfs has described."""
    from imager.device import sysfs

    disk = (sysfs.read_node(node.parent, sys) if node.parent else None) or node
    table = _table(disk)
    ptuuid = table.uuid if table else None
    partuuid = table.partition_uuid(node.number) if table and node.number is not None else None
    key = _strong_key(disk, ptuuid, sys, depth)
    fs_uuid = None
    if key is None:
        fs_uuid = _filesystem_uuid(disk.path)
        key = f"fs:{fs_uuid}" if fs_uuid else _moment_key(disk)
    if node.number is not None:
        key += f"/partuuid:{partuuid}" if partuuid else f"/part{node.number}"
    return Identity(
        kind=node.kind,
        path=node.path,
        name=node.stack_name or node.name,
        key=key,
        size=node.size,
        logical_sector=node.logical_sector,
        physical_sector=node.physical_sector,
        serial=disk.serial,
        wwn=disk.wwn,
        model=disk.model,
        ptuuid=ptuuid,
        partuuid=partuuid,
        fs_uuid=fs_uuid,
        stack_uuid=node.stack_uuid,
        number=node.number,
        diskseq=node.diskseq,
        dev=node.dev,
        backing=disk.backing,
    )


def difference(a: Identity, b: Identity) -> str | None:
    """Why `a` and `b` are not the same source; None where they are."""
    if "stream" in (a.kind, b.kind):
        return "a stream has no identity"
    if a.key == b.key:
        return None
    return f"{a.path} is {a.key}, {b.path} is {b.key}"


def same_source(a: Identity, b: Identity) -> bool:
    """Whether both are the same disk, partition or file, as far as its identity tells."""
    return difference(a, b) is None


def _strong_key(disk: Node, ptuuid: str | None, sys: str, depth: int) -> str | None:
    """NVMe namespaces share their controller's serial, so the WWN goes first."""
    if disk.kind == "loop":
        return _loop_key(disk, sys, depth)
    if disk.stack_uuid:
        return f"{disk.kind}:{disk.stack_uuid}"
    lun = f"#{disk.lun}" if disk.lun else ""
    if disk.wwn:
        return f"wwn:{normal_wwn(disk.wwn)}{lun}"
    if disk.serial:
        return f"serial:{disk.serial}{lun}"
    return f"ptuuid:{ptuuid}" if ptuuid else None


def _loop_key(disk: Node, sys: str, depth: int) -> str | None:
    """A loop device is what stands behind it, so the file and a loop over it are one source."""
    if not disk.backing or depth > _DEPTH:
        return None
    offset = f"@{disk.backing_offset}" if disk.backing_offset else ""
    try:
        info = os.stat(disk.backing)
    except OSError:
        return f"file:{disk.backing}{offset}"
    if not stat.S_ISBLK(info.st_mode):
        return f"file:{disk.backing}{offset}"
    from imager.device import sysfs

    name = sysfs.name_of(info.st_rdev, sys)
    below = sysfs.read_node(name, sys) if name else None
    return identify_node(below, sys=sys, depth=depth + 1).key + offset if below else None


def _moment_key(disk: Node) -> str:
    """A disk with nothing of its own is known only while it stays attached."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
    except OSError:
        boot = "unknown"
    return f"boot:{boot}:{disk.name}:{disk.diskseq or 0}"


def normal_wwn(wwn: str) -> str:
    """A WWN as sysfs, lsblk and labels write it, in one form: `naa.5000c5` = `0x5000C5`."""
    folded = " ".join(wwn.lower().split())
    for prefix in ("naa.", "eui.", "uuid.", "0x"):
        folded = folded.removeprefix(prefix)
    return folded


def _table(disk: Node) -> Table | None:
    """The table on the disk; None also where it cannot be read."""
    from imager.device.partition_table import read_table

    if not disk.size or disk.kind == "rom":
        return None
    try:
        fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return read_table(lambda offset, length: os.pread(fd, length, offset), disk.size, disk.logical_sector)
    except OSError:
        return None
    finally:
        os.close(fd)


def _filesystem_uuid(path: str) -> str | None:
    from imager.device.probe import probe

    return probe(path).uuid
