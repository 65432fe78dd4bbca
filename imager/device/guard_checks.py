"""The write guard's reasons to refuse, one function a question.

Invariant: nothing here opens a target for writing, and a question that
cannot be answered for certain is answered with a reason.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

from imager.device.identity import Identity
from imager.device.machine import SYSTEM_PATHS, Machine
from imager.device.mounts import Mount
from imager.device.sysfs import Node
from imager.units import format_size

_STRONG = ("wwn:", "serial:", "dm:", "md:", "file:")


class Reason(Struct, frozen=True):
    """Why a target is refused. `code` is a stable word for `--json`."""

    code: str
    text: str
    hint: str | None = None


# -- devices -----------------------------------------------------------------


def in_use(machine: Machine, target: Node) -> Iterator[Reason]:
    """Mounts, swap and stacks on the device, its partitions, what stands on them, and its disk."""
    seen: set[int] = set()
    for alias in aliases(machine, target):
        if alias.dev != target.dev:
            yield from _alias(machine, target, alias)
        for node in (alias, *machine.above(alias)):
            if node.dev not in seen:
                seen.add(node.dev)
                yield from _uses(machine, node)
        disk = machine.disk_of(alias)
        if disk.dev not in seen:  # the disk itself, not the partitions beside this one
            seen.add(disk.dev)
            yield from _uses(machine, disk)


def _alias(machine: Machine, target: Node, alias: Node) -> Iterator[Reason]:
    loop = machine.loops.get(machine.disk_of(alias).dev)
    if loop is not None:
        yield Reason(
            "shared",
            f"{alias.path} is attached to the same bytes of {loop.path}",
            f"detach it first: losetup --detach {machine.disk_of(alias).path}",
        )


def _uses(machine: Machine, node: Node) -> Iterator[Reason]:
    for mount in _one_per_target(machine.mounted(node)):
        hint = f"unmount it: umount {mount.target}" if mount.target not in SYSTEM_PATHS else None
        yield Reason("mounted", f"{node.path} is mounted on {mount.target}", hint)
    for swap in machine.swap_on(node):
        yield Reason("swap", f"{node.path} is in use as swap", f"stop it: swapoff {swap.path}")
    for holder in machine.stacked(node):
        name = holder.stack_name or holder.name
        how = {
            "loop": f"detach it: losetup --detach {holder.path}",
            "dm": f"stop what uses it (LVM, LUKS, multipath): dmsetup remove {name}",
            "md": f"stop the array: mdadm --stop {holder.path}",
        }
        text = f"{node.path} is held by {holder.path} ({holder.kind} {name})"
        yield Reason("held", text, how.get(holder.kind))
    for name in node.holders:
        if machine.node(name) is None:
            yield Reason("held", f"{node.path} is held by {name}")


def _one_per_target(mounts: Iterable[Mount]) -> list[Mount]:
    return list({mount.target: mount for mount in mounts}.values())


def aliases(machine: Machine, target: Node) -> list[Node]:
    """The target, and every other device that names the same bytes (multipath, loops over one file)."""
    disk = machine.disk_of(target)
    others = [*machine.twins(disk), *machine.shared_file(disk)]
    if disk.dev == target.dev:
        return [target, *others]
    found = [target]
    for other in others:
        parts = [p for p in (machine.node(name) for name in other.partitions) if p]
        end = target.start + target.size
        found += [p for p in parts if p.start < end and target.start < p.start + p.size] or [other]
    return found


def is_source(
    machine: Machine, target: Node, identity: Identity, sources: Sequence[Identity]
) -> Iterator[Reason]:
    """The source itself, a part of it, what contains it, or the file behind it."""
    touched: set[int] = set()
    for alias in aliases(machine, target):
        touched |= {alias.dev, machine.disk_of(alias).dev, *(node.dev for node in machine.above(alias))}
    files = {loop.file for loop in machine.loops_below(target.dev)}
    for source in sources:
        if source.kind == "stream":
            continue
        text = f"{identity.path} is the source {source.path}"
        if source.kind == "file":
            if (source.dev, source.inode) in files:
                yield Reason("source", f"{identity.path} stands on the source {source.path}")
            continue
        node = machine.nodes.get(source.dev)
        over = {n.dev for n in machine.above(node)} if node else set()
        if source.dev == target.dev:
            yield Reason("source", text)
        elif source.dev in touched or target.dev in over:
            yield Reason("source", f"{identity.path} shares bytes with the source {source.path}")
        elif source.key == identity.key and source.key.startswith(_STRONG):
            yield Reason("source", f"{text} under another name ({source.key})")


def lives_on(
    machine: Machine, target: Node, devices: dict[int, str], code: str, who: str
) -> Iterator[Reason]:
    """Whether the device is, or is part of, a disk among `devices` (number to a path that shows it)."""
    for alias in aliases(machine, target):
        disk = machine.disk_of(alias)
        for node in (alias, disk):
            if node.dev in devices:
                where = "is" if node.dev == target.dev else f"is on {node.path},"
                yield Reason(code, f"{target.path} {where} a device that {who} ({devices[node.dev]})")
                return


def fits(identity: Identity, required: int | None) -> Iterator[Reason]:
    if identity.size == 0:
        yield Reason("no-medium", f"{identity.path} holds no medium: its size is 0")
    elif required is not None and identity.size < required:
        yield Reason(
            "too-small",
            f"{identity.path} has {identity.size} bytes ({format_size(identity.size)}), "
            f"{required} ({format_size(required)}) are needed: {required - identity.size} too few",
            "choose a target at least as large as the source",
        )


def right_shape(identity: Identity, whole_disk: bool | None) -> Iterator[Reason]:
    """An image of a disk does not belong in a partition, nor the other way round."""
    if whole_disk is True and identity.kind == "partition":
        yield Reason(
            "shape",
            f"the image is of a whole disk, {identity.path} is partition {identity.number}",
            "name the disk, or restore one partition of the image: SET:DISK:N",
        )
    if whole_disk is False and identity.kind != "partition" and identity.ptuuid:
        yield Reason(
            "shape",
            f"the image is of one partition, {identity.path} is a disk with a partition table",
            "name the partition; or clear the table first: wipefs --all",
        )


def claimable(path: str) -> Iterator[Reason]:
    """Try an exclusive open, for reading only, and give it back at once."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        yield refusal(path, error)


def refusal(path: str, error: OSError) -> Reason:
    """What the kernel's answer to an open means."""
    if error.errno == errno.EBUSY:
        return Reason("busy", f"{path} is in use: the kernel refuses an exclusive open", f"see: lsblk {path}")
    if error.errno in (errno.EACCES, errno.EPERM):
        return Reason("permission", f"{path} may not be opened by this user", "run imager as root")
    if error.errno == errno.EROFS:
        return Reason("read-only", f"{path} is read-only")
    return Reason("unusable", f"{path} cannot be opened: {error.strerror}")


# -- files -------------------------------------------------------------------


def existing_file(
    machine: Machine, path: str, sources: Sequence[Identity], overwrite: bool
) -> Iterator[Reason]:
    """What speaks against writing over a file that is there."""
    info = os.stat(path)
    me = (info.st_dev, info.st_ino)
    for source in sources:
        if source.kind == "file" and (source.dev, source.inode) == me:
            same = "" if source.path == path else f" (the same file as {path})"
            yield Reason("source", f"{source.path} is the source itself{same}")
        elif source.is_device and any(loop.file == me for loop in machine.loops_below(source.dev)):
            yield Reason("source", f"{path} is the file behind the source {source.path}")
    for loop in machine.loops_over_file(me):
        hint = f"detach it: losetup --detach /dev/{loop.name}; or name the device as the target"
        yield Reason("held", f"{path} is attached as /dev/{loop.name}", hint)
    if any(_file(swap.path) == me for swap in machine.swaps):
        yield Reason("swap", f"{path} is in use as swap", f"stop it: swapoff {path}")
    if not os.access(path, os.W_OK):
        yield Reason("read-only", f"{path} is not writable")
    if info.st_size and not overwrite:
        yield Reason(
            "not-empty",
            f"{path} exists and holds {format_size(info.st_size)}",
            "choose another name, or say --overwrite",
        )


def misplaced_file(path: str) -> Iterator[Reason]:
    """A plain file among the devices: a mistyped device name, kept in memory until the next boot."""
    folder = os.path.dirname(path)
    dev = os.stat("/dev").st_dev
    if dev != os.stat("/").st_dev and os.path.isdir(folder) and os.stat(folder).st_dev == dev:
        yield Reason("no-device", f"there is no device {path}", "see what is there: imager devices")


def new_file(path: str) -> Iterator[Reason]:
    """What speaks against making a file at this place."""
    folder = os.path.dirname(path)
    try:
        info = os.stat(folder)
    except OSError as error:
        yield Reason("unusable", f"{folder}: {error.strerror}", "make the folder first")
        return
    if not stat.S_ISDIR(info.st_mode):
        yield Reason("unusable", f"{folder} is not a folder")
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Reason("read-only", f"{folder} is not writable")


def in_repository(machine: Machine, path: str, device: Node | None, repository: str) -> Iterator[Reason]:
    """The file, or the file behind a loop device, lies in the repository's folder."""
    try:
        info = os.stat(repository)
    except OSError:
        return
    folder = (info.st_dev, info.st_ino)
    places = [path] if device is None else [loop.path for loop in machine.loops_below(device.dev)]
    for place in places:
        at = os.path.realpath(place)
        while True:
            if _file(at) == folder:
                yield Reason("repository", f"{place} lies in the repository {repository}")
                break
            if at == os.path.dirname(at):
                break
            at = os.path.dirname(at)


def _file(path: str) -> tuple[int, int] | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_dev, info.st_ino
