"""What stands on what: disks, partitions, stacks, loops, filesystems.

Invariant: a `Machine` is one snapshot, taken without writing to or claiming
any device. `above` and `below` follow every edge that is known (partition,
holder, loop over a device, file behind a loop, all devices of a btrfs, the
layers of an overlay); where an edge may be there or not, it counts as there.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from imager.device import loop_ioctl, sysfs
from imager.device.identity import normal_wwn
from imager.device.mounts import Mount, Swap, is_within, mounts, swaps
from imager.device.sysfs import Node

SYSTEM_PATHS = (
    *("/", "/boot", "/boot/efi", "/efi", "/usr", "/etc", "/var", "/nix/store", "/sysroot", "/host"),
    *("/run/live/medium", "/lib/live/mount/medium", "/run/initramfs/live", "/run/archiso/bootmnt", "/cdrom"),
)
_LAYERS = ("lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir")


@dataclass(frozen=True, slots=True)
class Loop:
    """An attached loop device's backing: a file (`file`) or a device (`device`)."""

    dev: int
    name: str
    path: str  # of the backing, as the kernel names it
    file: tuple[int, int] | None
    device: int | None
    offset: int
    size: int


@dataclass(slots=True)
class Machine:
    """The snapshot. Build it with `Machine.read`."""

    nodes: dict[int, Node]
    mounts: list[Mount]
    swaps: list[Swap]
    loops: dict[int, Loop]
    pools: list[frozenset[int]]  # devices that make up one btrfs
    _by_name: dict[str, Node] = field(init=False)
    _mounted: dict[int, list[Mount]] = field(init=False)

    def __post_init__(self) -> None:
        self._by_name = {node.name: node for node in self.nodes.values()}
        self._mounted = {}
        for mount in self.mounts:
            for dev in self.devices_of_mount(mount):
                self._mounted.setdefault(dev, []).append(mount)

    @classmethod
    def read(cls, sys: str = sysfs.SYS) -> Machine:
        """Look at the machine as it is now."""
        found = (sysfs.read_node(name, sys) for name in sysfs.all_names(sys))
        nodes = {node.dev: node for node in found if node}
        loops = {n.dev: _loop(n) for n in nodes.values() if n.kind == "loop" and n.backing}
        return cls(nodes, mounts(), swaps(), loops, _btrfs(nodes, sys))

    def node(self, name: str) -> Node | None:
        return self._by_name.get(name)

    def disk_of(self, node: Node) -> Node:
        """The whole disk that a partition is on; any other device is its own."""
        return self._by_name.get(node.disk, node)

    def mounted(self, node: Node) -> list[Mount]:
        """Every mount of a filesystem that is on this device."""
        return self._mounted.get(node.dev, [])

    def swap_on(self, node: Node) -> list[Swap]:
        return [swap for swap in self.swaps if _rdev(swap.path) == node.dev]

    def loops_over_file(self, file: tuple[int, int]) -> list[Loop]:
        return [loop for loop in self.loops.values() if loop.file == file]

    def stacked(self, node: Node) -> list[Node]:
        """What stands directly on this device, its partitions left out: holders and loops."""
        held = [self._by_name[name] for name in node.holders if name in self._by_name]
        over = [self.nodes[loop.dev] for loop in self.loops.values() if loop.device == node.dev]
        return held + over

    def above(self, node: Node) -> Iterator[Node]:
        """All that stands on this device, partitions included, nearest first."""
        seen, todo = {node.dev}, [node]
        while todo:
            at = todo.pop(0)
            parts = [self._by_name[name] for name in at.partitions if name in self._by_name]
            for up in parts + self.stacked(at):
                if up.dev not in seen:
                    seen.add(up.dev)
                    todo.append(up)
                    yield up

    def twins(self, node: Node) -> list[Node]:
        """Other kernel devices that are the same disk (multipath): same WWN, or serial, model and size."""
        return [o for o in self.nodes.values() if o.dev != node.dev and _same_disk(node, o)]

    def shared_file(self, node: Node) -> list[Node]:
        """Other loop devices over bytes of the same file."""
        mine = self.loops.get(node.dev)
        if mine is None or mine.file is None:
            return []
        end = mine.offset + mine.size
        others = (o for o in self.loops_over_file(mine.file) if o.dev != mine.dev)
        return [self.nodes[o.dev] for o in others if o.offset < end and mine.offset < o.offset + o.size]

    def loops_below(self, dev: int) -> list[Loop]:
        """The loop devices over files that this device stands on, itself included."""
        return [loop for at in self.below([dev]) if (loop := self.loops.get(at)) and loop.file]

    def below(self, devs: Iterable[int]) -> set[int]:
        """These devices and all that they stand on, through files too."""
        seen: set[int] = set()
        todo = list(devs)
        while todo:
            dev = todo.pop()
            node = self.nodes.get(dev)
            if dev in seen or node is None:
                continue
            seen.add(dev)
            todo += [self._by_name[name].dev for name in node.slaves if name in self._by_name]
            todo += [n.dev for n in (self.disk_of(node), *self.twins(node))]
            loop = self.loops.get(dev)
            if loop and loop.device is not None:
                todo.append(loop.device)
            elif loop and loop.file is not None:
                todo += self._of_filesystem(loop.file[0], loop.path, set())
        return seen

    def devices_of_path(self, path: str) -> set[int]:
        """Every device that a folder or file depends on; empty for tmpfs and network filesystems."""
        return self.below(self._of_path(path, set()))

    def system_devices(self) -> dict[int, str]:
        """Devices that the running system lives on, with the path that shows it."""
        found: dict[int, str] = {}
        for path in SYSTEM_PATHS:
            if os.path.exists(path):
                for dev in self.devices_of_path(path):
                    found.setdefault(dev, path)
        return found

    def devices_of_mount(self, mount: Mount) -> set[int]:
        """The devices a mount's filesystem is on, without what they stand on."""
        if mount.dev in self.nodes:
            devs = {mount.dev}
        else:  # an anonymous number: btrfs, FUSE, bcachefs; the source tells
            named = (_rdev(part) for part in mount.source.split(":") if part.startswith("/"))
            devs = {dev for dev in named if dev in self.nodes}
        return devs.union(*(pool for pool in self.pools if pool & devs))

    def _of_path(self, path: str, visited: set[int]) -> set[int]:
        try:
            dev = os.stat(path).st_dev
        except OSError:
            return set()
        return self._of_filesystem(dev, path, visited)

    def _of_filesystem(self, dev: int, path: str, visited: set[int]) -> set[int]:
        """The devices of the filesystem with this number; the path helps where a number is a subvolume's."""
        if dev in self.nodes:
            return {dev}.union(*(pool for pool in self.pools if dev in pool))
        found: set[int] = set()
        for mount in [m for m in self.mounts if m.dev == dev] or self._nearest(path):
            found |= self.devices_of_mount(mount)
            if mount.fstype == "overlay" and mount.dev not in visited:
                visited.add(mount.dev)
                for layer in _layers(mount):
                    found |= self._of_path(layer, visited)
        return found

    def _nearest(self, path: str) -> list[Mount]:
        """The mounts at the longest mount point that leads to `path`."""
        real = os.path.realpath(path)
        holding = [m for m in self.mounts if is_within(real, m.target)]
        longest = max((len(m.target) for m in holding), default=0)
        return [m for m in holding if len(m.target) == longest]


def _layers(mount: Mount) -> list[str]:
    parts = [part for value in mount.option(*_LAYERS) for part in re.split(r"(?<!\\):", value)]
    return [re.sub(r"\\(.)", r"\1", part) for part in parts if part]


def _rdev(path: str) -> int | None:
    try:
        info = os.stat(path)
    except OSError:
        return None
    return info.st_rdev if stat.S_ISBLK(info.st_mode) else None


def _same_disk(a: Node, b: Node) -> bool:
    if "disk" != a.kind or a.kind != b.kind or a.lun != b.lun or a.size != b.size:
        return False
    if a.wwn and b.wwn:
        return normal_wwn(a.wwn) == normal_wwn(b.wwn)
    return bool(a.serial) and (a.serial, a.model) == (b.serial, b.model)


def _loop(node: Node) -> Loop:
    """By the driver's own answer where it can be asked, else by the path in sysfs."""
    path = node.backing or ""
    info = loop_ioctl.read_status(node.path)
    if info is not None:
        device = info.device or None
        file = None if device else info.file
        return Loop(node.dev, node.name, path, file, device, info.offset, node.size)
    try:
        found = os.stat(path)
    except OSError:
        return Loop(node.dev, node.name, path, None, None, node.backing_offset, node.size)
    device = found.st_rdev if stat.S_ISBLK(found.st_mode) else None
    file = None if device else (found.st_dev, found.st_ino)
    return Loop(node.dev, node.name, path, file, device, node.backing_offset, node.size)


def _btrfs(nodes: dict[int, Node], sys: str) -> list[frozenset[int]]:
    by_name = {node.name: node.dev for node in nodes.values()}
    pools = []
    for uuid in sysfs.names(sys, "fs/btrfs"):
        members = sysfs.names(sys, "fs/btrfs", uuid, "devices")
        pools.append(frozenset(by_name[name] for name in members if name in by_name))
    return [pool for pool in pools if pool]
