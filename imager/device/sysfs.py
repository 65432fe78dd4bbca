"""Block devices as the kernel lists them under `/sys`.

Invariant: reading sysfs never fails loudly and never opens a device: what is
absent or unreadable is None, zero or empty, and a `Node` is a frozen copy of
one moment. The root folder is a parameter, so a recorded tree reads the same.
"""

from __future__ import annotations

import os
import re

from msgspec import Struct

SYS = "/sys"
SECTOR = 512  # the unit of `size` and `start` in sysfs, whatever the device's own
_PARENTS = 16  # how far up a device's path a USB serial is looked for


class Node(Struct, frozen=True):
    """One block device. `kind` is disk, partition, loop, dm, md or rom."""

    name: str
    path: str
    kind: str
    dev: int
    size: int
    logical_sector: int
    physical_sector: int
    read_only: bool
    removable: bool
    rotational: bool
    diskseq: int | None
    parent: str | None  # the disk of a partition
    number: int | None  # the partition's number
    start: int  # where a partition begins on its disk, in bytes
    partitions: tuple[str, ...]
    holders: tuple[str, ...]
    slaves: tuple[str, ...]
    serial: str | None
    wwn: str | None
    model: str | None
    transport: str | None
    lun: int  # tells the slots of one card reader apart: they share a serial
    backing: str | None  # a loop device's file, as the kernel names it
    backing_offset: int
    stack_name: str | None  # device-mapper's name
    stack_uuid: str | None  # device-mapper's or md's identity

    @property
    def disk(self) -> str:
        """The kernel name of the whole disk."""
        return self.parent or self.name


def text(*parts: str) -> str | None:
    """The stripped text of a sysfs attribute; None where absent or empty."""
    try:
        with open(os.path.join(*parts), "rb") as file:
            raw = file.read(4096)
    except OSError:
        return None
    return raw.decode(errors="replace").strip("\0\n\t ") or None


def number(*parts: str) -> int | None:
    """An attribute as an integer; None where it is absent or no number."""
    try:
        return int(text(*parts) or "")
    except ValueError:
        return None


def names(*parts: str) -> tuple[str, ...]:
    """The sorted names in a sysfs folder."""
    try:
        return tuple(sorted(os.listdir(os.path.join(*parts)), key=natural))
    except OSError:
        return ()


def natural(name: str) -> tuple[tuple[str, int], ...]:
    """A sort key that puts sda2 before sda10."""
    return tuple((head, int(digits or -1)) for head, digits in re.findall(r"(\D*)(\d*)", name))


def device_number(value: str | None) -> int | None:
    """`major:minor` as one device number."""
    match = re.fullmatch(r"(\d+):(\d+)", value or "")
    return os.makedev(int(match[1]), int(match[2])) if match else None


def name_of(dev: int, sys: str = SYS) -> str | None:
    """The kernel name of the block device with this number."""
    link = f"{sys}/dev/block/{os.major(dev)}:{os.minor(dev)}"
    return os.path.basename(os.path.realpath(link)) if os.path.exists(link) else None


def all_names(sys: str = SYS) -> tuple[str, ...]:
    return names(sys, "class/block")


def has_loops(sys: str = SYS) -> bool:
    """Whether any loop device has a file."""
    loops = (name for name in all_names(sys) if name.startswith("loop"))
    return any(os.path.exists(f"{sys}/class/block/{name}/loop/backing_file") for name in loops)


def read_node(name: str, sys: str = SYS) -> Node | None:
    """The device with this kernel name; None where there is none (any more)."""
    base = os.path.realpath(f"{sys}/class/block/{name}")
    dev = device_number(text(base, "dev"))
    if dev is None:
        return None
    part = number(base, "partition")
    disk = os.path.dirname(base) if part is not None else base
    backing = text(disk, "loop/backing_file")
    stack_uuid = text(base, "dm/uuid") or text(base, "md/uuid")
    return Node(
        name=name,
        path="/dev/" + name.replace("!", "/"),
        kind=_kind(name, base, part),
        dev=dev,
        size=(number(base, "size") or 0) * SECTOR,
        logical_sector=number(disk, "queue/logical_block_size") or SECTOR,
        physical_sector=number(disk, "queue/physical_block_size") or SECTOR,
        read_only=text(base, "ro") == "1" or text(disk, "ro") == "1",
        removable=text(disk, "removable") == "1",
        rotational=text(disk, "queue/rotational") == "1",
        diskseq=number(disk, "diskseq"),
        parent=os.path.basename(disk) if part is not None else None,
        number=part,
        start=(number(base, "start") or 0) * SECTOR,
        partitions=tuple(n for n in names(base) if os.path.exists(os.path.join(base, n, "partition"))),
        holders=names(base, "holders"),
        slaves=names(base, "slaves"),
        serial=_serial(disk),
        wwn=text(disk, "wwid") or text(disk, "device/wwid"),
        model=_model(disk),
        transport=_transport(disk),
        lun=_lun(disk),
        backing=backing if part is None else None,
        backing_offset=number(disk, "loop/offset") or 0,
        stack_name=text(base, "dm/name"),
        stack_uuid=stack_uuid,
    )


def _kind(name: str, base: str, part: int | None) -> str:
    if part is not None:
        return "partition"
    for kind in ("loop", "dm", "md"):
        if os.path.isdir(os.path.join(base, kind)):
            return kind
    return "loop" if re.fullmatch(r"loop\d+", name) else "rom" if re.fullmatch(r"sr\d+", name) else "disk"


def _serial(disk: str) -> str | None:
    """virtio, NVMe and MMC say it plainly; SCSI and ATA in page 0x80; USB in the bridge's descriptor."""
    plain = text(disk, "serial") or text(disk, "device/serial")
    return plain or page80(disk) or _usb(disk, "serial")


def page80(disk: str) -> str | None:
    """The unit serial number page: four bytes of header, then the serial in ASCII."""
    try:
        with open(os.path.join(disk, "device/vpd_pg80"), "rb") as file:
            page = file.read(260)
    except OSError:
        return None
    if len(page) < 4 or page[1] != 0x80:
        return None
    length = int.from_bytes(page[2:4], "big")
    return page[4 : 4 + length].decode("ascii", errors="replace").strip("\0 ") or None


def _usb(disk: str, attribute: str) -> str | None:
    at = os.path.realpath(os.path.join(disk, "device"))
    for _ in range(_PARENTS):
        if os.path.exists(os.path.join(at, "idVendor")):
            return text(at, attribute)
        at = os.path.dirname(at)
        if at in ("/", ""):
            break
    return None


def _model(disk: str) -> str | None:
    model = text(disk, "device/model") or text(disk, "device/name")
    vendor = text(disk, "device/vendor")
    if model and vendor and not vendor.startswith("0x") and vendor not in ("ATA", model):
        return f"{vendor} {model}"
    return model


def _lun(disk: str) -> int:
    address = os.path.basename(os.path.realpath(os.path.join(disk, "device"))).split(":")
    return int(address[3]) if len(address) == 4 and address[3].isdigit() else 0


def _transport(disk: str) -> str | None:
    """How the disk is attached, read off its place in the device tree."""
    at = os.path.realpath(disk)
    for pattern, name in (
        (r"/usb\d+/", "usb"),
        (r"/nvme/", "nvme"),
        (r"/virtio\d+/", "virtio"),
        (r"/mmc_host/", "mmc"),
        (r"/session\d+/", "iscsi"),
        (r"/rport-", "fc"),
        (r"/end_device-", "sas"),
        (r"/ata\d+/", "sata"),
    ):
        if re.search(pattern, at):
            return name
    return None
