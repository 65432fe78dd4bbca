"""A disk's layout in lines for a person.

Invariant: all that is wrong with a layout stands in the lines, beside what it concerns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from imager.units import format_size

if TYPE_CHECKING:
    from imager.capture.layout import Layout, Volume
    from imager.capture.system import System
    from imager.device.partitioning import Partitioning


def lines(layout: Layout) -> Iterator[str]:
    """The layout, from the table down to what is in each volume."""
    from imager.capture.layout import partition_of

    yield from (f"PROBLEM: {problem}" for problem in layout.problems)
    if layout.table is not None:
        yield from _table(layout.table)
    if layout.boot:
        yield "can be started by " + " and ".join(word.upper() for word in layout.boot)
    if layout.firmware:
        yield f"the running system stood on it, started by {layout.firmware.upper()}"
    for entry in layout.entries:
        where = f", {entry.path} on {entry.partition}" if entry.path else ""
        order = "not in the order" if entry.order is None else f"number {entry.order + 1} in the order"
        yield f"boot entry {entry.number}: {entry.description!r}, {order}{where}"
    for volume in layout.volumes:
        part = partition_of(layout, volume.name)
        head = f"{volume.name or 'whole disk'}: {format_size(volume.size)} at byte {volume.start}"
        if part is not None:
            named = f" {part.name!r}" if part.name else ""
            flags = f", attributes {part.attributes:#x}" if part.attributes else ""
            logical = ", logical" if part.logical else ""
            head += f",{named} type {part.type}{flags}{logical}"
        yield head
        yield from (f"  {line}" for line in _content(volume))


def _table(table: Partitioning) -> Iterator[str]:
    kind = "GPT" if table.scheme == "gpt" else "MBR"
    mbr = f", {table.mbr} MBR" if table.scheme == "gpt" else ""
    yield f"{kind} {table.uuid or 'without an identity'}, sectors of {table.sector} bytes{mbr}"
    if table.backup is not None:
        place = "" if table.backup_at is None else f" (at byte {table.backup_at})"
        yield f"backup table: {table.backup}{place}"
    for entry in table.hybrid:
        size = format_size(entry.size)
        yield f"hybrid MBR entry {entry.number}: type {entry.type}, {size} at byte {entry.start}"
    for part in table.partitions:
        if part.container:
            yield f"extended partition {part.number}: {format_size(part.size)} at byte {part.start}"
    for gap in table.gaps:
        if gap.data:
            held = f"holding {format_size(gap.data)} or more"
            yield f"no partition: {format_size(gap.size)} at byte {gap.start}, {held}"
    yield from (f"PROBLEM: {problem}" for problem in table.problems)


def _content(volume: Volume) -> Iterator[str]:
    if volume.filesystem is not None:
        found = volume.filesystem
        label = f" {found.label!r}" if found.label else ""
        many = f", one of {found.devices} devices" if found.devices > 1 else ""
        size = f"{format_size(found.size)} in blocks of {format_size(found.block)}"
        yield f"{found.type}{label} {found.uuid or ''}: {size}{many}"
    elif volume.raid is not None:
        raid = volume.raid
        name = f" {raid.name!r}" if raid.name else ""
        yield (
            f"member {raid.role} of {raid.level}{name} {raid.uuid} of {raid.devices} devices, metadata"
            f" {raid.version}, {raid.events} events, {'clean' if raid.clean else 'not clean'}"
        )
    elif volume.luks is not None:
        header = volume.luks
        slots = ", ".join(f"{slot.number} ({slot.kdf})" for slot in header.slots) or "none"
        label = f" {header.label!r}" if header.label else ""
        how = f"{header.cipher}, {header.key_bits} bits, key slots {slots}"
        yield f"LUKS{header.version}{label} {header.uuid}: {how}"
        if header.tokens:
            yield f"tokens: {', '.join(header.tokens)}"
    elif volume.lvm is not None:
        physical = volume.lvm
        group = physical.group
        of = ""
        if group is not None:
            of = f" of group {group.name} ({len(group.members)} volumes, sequence {group.sequence})"
        yield f"LVM physical volume {physical.uuid}{of}"
    else:
        yield volume.kind or "nothing that is known"
    if volume.used is not None:
        yield f"{format_size(volume.used)} in use"
    elif volume.why:
        yield f"every block counts as used: {volume.why}"
    yield from (f"PROBLEM: {problem}" for problem in volume.problems)
    if volume.system is not None:
        yield from _system(volume.system)
    for inner in volume.volumes:
        yield f"{inner.name}: {format_size(inner.size)}"
        yield from (f"  {line}" for line in _content(inner))


def _system(system: System) -> Iterator[str]:
    if system.name or system.id:
        host = f", called {system.hostname}" if system.hostname else ""
        yield f"system: {system.name or system.id}{host}"
    for title, values in (
        ("kernels", system.kernels),
        ("initramfs by", system.initramfs),
        ("boot loaders", system.loaders),
        ("EFI", system.efi),
    ):
        if values:
            yield f"{title}: {', '.join(values)}"
    for mount in system.fstab:
        yield f"fstab: {mount.spec} on {mount.target} ({mount.type}, {mount.options})"
    for crypt in system.crypttab:
        yield f"crypttab: {crypt.name} is {crypt.device}"
