"""What is on this machine, as a tree: disks, partitions, and what stands on them.

Invariant: looking changes nothing and claims nothing; a device that cannot
be read is listed with what is known. Every value is plain data, ready for
`msgspec.to_builtins` and JSON.
"""

from __future__ import annotations

from msgspec import Struct, field

from imager.device.guard import Request, examine_device
from imager.device.identity import Identity, identify_node
from imager.device.machine import Machine
from imager.device.probe import Content, Prober
from imager.device.sysfs import Node, natural
from imager.units import format_size

_DEPTH = 16


class Device(Struct, frozen=True):
    """One device. `children` are its partitions and what stands on it (dm, md, loop)."""

    name: str
    path: str
    kind: str
    key: str
    size: int
    logical_sector: int
    physical_sector: int
    model: str | None
    serial: str | None
    wwn: str | None
    transport: str | None
    removable: bool
    rotational: bool
    read_only: bool
    ptuuid: str | None
    partuuid: str | None
    number: int | None
    start: int
    table: str | None
    filesystem: str | None
    label: str | None
    uuid: str | None
    mounts: tuple[str, ...]
    swap: bool
    holders: tuple[str, ...]
    backing: str | None
    writable: bool
    reasons: tuple[str, ...]  # why it may not be written
    children: tuple[Device, ...] = field(default=())
    used: int | None = None  # bytes in use, None: not asked, or all count as used
    used_why: str = ""  # why all do


def devices(*, repository_path: str | None = None, machine: Machine | None = None) -> list[Device]:
    """The tree of all devices that hold a medium, disks first by name."""
    now = machine or Machine.read()
    return _Builder(now, repository_path).roots()


def holdings(identity: Identity, machine: Machine | None = None) -> tuple[str, ...]:
    """What is on a device now, a line each, for the plan that a person confirms."""
    now = machine or Machine.read()
    node = now.nodes.get(identity.dev) if identity.is_device else None
    if node is None:
        return ()
    builder = _Builder(now, None)
    return tuple(_line(part, builder.content(part)) for part in (node, *builder.partitions(node)))


def _line(node: Node, content: Content) -> str:
    kind = content.type or (f"{content.table} partition table" if content.table else "no known content")
    label = f" {content.label!r}" if content.label else ""
    return f"{node.path}  {format_size(node.size)}  {kind}{label}"


class _Builder:
    def __init__(self, machine: Machine, repository: str | None) -> None:
        self.machine = machine
        self.request = Request("", repository=repository)
        self.prober = Prober()

    def roots(self) -> list[Device]:
        """Disks, and stacks on nothing that is known (a loop device over a file)."""
        known = self.machine.nodes.values()
        shown = (n for n in known if n.size and n.parent is None and not n.name.startswith(("ram", "zram")))
        above = {up.dev for node in known for up in self.machine.stacked(node)}
        nodes = sorted((n for n in shown if n.dev not in above), key=lambda n: natural(n.name))
        return [self.build(node, 0) for node in nodes]

    def partitions(self, node: Node) -> list[Node]:
        return [part for name in node.partitions if (part := self.machine.node(name))]

    def content(self, node: Node) -> Content:
        return self.prober.content(node.path, node.dev)

    def build(self, node: Node, depth: int) -> Device:
        machine = self.machine
        identity = identify_node(node)
        content = self.content(node)
        mounts = machine.mounted(node)
        verdict = examine_device(self.request, machine, node.dev, claim=False)
        up = [*self.partitions(node), *machine.stacked(node)] if depth < _DEPTH else []
        return Device(
            name=identity.name,
            path=node.path,
            kind=node.kind,
            key=identity.key,
            size=node.size,
            logical_sector=node.logical_sector,
            physical_sector=node.physical_sector,
            model=identity.model,
            serial=identity.serial,
            wwn=identity.wwn,
            transport=node.transport,
            removable=node.removable,
            rotational=node.rotational,
            read_only=node.read_only,
            ptuuid=identity.ptuuid,
            partuuid=identity.partuuid,
            number=node.number,
            start=node.start,
            table=content.table,
            filesystem=content.type or (mounts[0].fstype if mounts else None),
            label=content.label,
            uuid=content.uuid,
            mounts=tuple(dict.fromkeys(mount.target for mount in mounts)),
            swap=bool(machine.swap_on(node)),
            holders=tuple(holder.path for holder in machine.stacked(node)),
            backing=node.backing,
            writable=verdict.allowed,
            reasons=tuple(dict.fromkeys(reason.text for reason in verdict.reasons)),
            children=tuple(self.build(child, depth + 1) for child in up),
        )
