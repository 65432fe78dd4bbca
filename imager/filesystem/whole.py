"""The used blocks of a whole source: a disk with its partitions, or one filesystem.

Invariant: whatever no map speaks of counts as used: the table and its copy,
the gaps, partitions that overlap or reach beyond the end, those without a
map, those that are mounted for writing and may be written at any moment. Each
part says which map was taken, or why none.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from msgspec import Struct

from imager.device.partition_table import Entry, is_extended, read_table
from imager.extents import Extents
from imager.filesystem import maps
from imager.filesystem.used import Unknown, Used

if TYPE_CHECKING:
    from imager.device.machine import Machine
    from imager.device.sysfs import Node

_MOUNTED = "it is mounted for writing, and changes while it is read"
_TELLING = frozenset({"ext2", "ext3", "ext4", "xfs", "LVM2_member"})
"""Kinds that have a map only while nothing is under way in them, mounted or not: filesystems whose log or
state tells, and LVM, whose map changes by its commands alone."""
AT_REST = "mounted for writing, frozen or at rest all the while"
"What the note of such a map says: true only where the caller has looked again."


class Part(Struct, frozen=True):
    """A partition (`number`; None: the whole source is one filesystem), in bytes, and what its map said."""

    number: int | None
    start: int
    size: int
    answer: Used | Unknown

    @property
    def used(self) -> int:
        """Bytes that are imaged."""
        return self.answer.extents.total if isinstance(self.answer, Used) else self.size


class Whole(Struct, frozen=True):
    """What is in use of a source, and how it is known, part by part."""

    used: Extents
    parts: tuple[Part, ...]


def used_blocks(
    fd: int, size: int, *, sector: int = 512, written: Collection[int | None] = (), again: bool = False
) -> Whole:
    """What is in use of a source of `size` bytes. `fd` as in `used.Reader`.

    `written`: numbers of the partitions that are mounted for writing; None
    among them stands for the source itself. They have no map, unless the
    caller promises (`again`) to ask once more when all is read, and to take
    every block where the answer is another then: so a filesystem that is
    frozen, or at rest, has one. Reads metadata only; whatever cannot be read is in use.
    """
    table = read_table(lambda at, length: read(fd, at, length), size, sector)
    if table is None or not table.entries:
        parts: list[_Place] = [(None, 0, size, None)]
    else:
        parts = list(_parts(table.entries, size))
    unused = Extents()
    told: list[Part] = []
    for number, start, length, problem in parts:
        mounted = number in written or None in written
        if mounted and not again:
            problem = _MOUNTED
        answer: Used | Unknown
        answer = Unknown(problem) if problem else maps.used_blocks(fd, start, length, sector=sector)
        if mounted and not problem:
            answer = _at_rest(answer)
        if isinstance(answer, Used):
            free = answer.extents.complement(length)
            unused |= Extents(tuple((start + low, start + high) for low, high in free))
        told.append(Part(number, start, length, answer))
    return Whole(unused.complement(size), tuple(told))


def _at_rest(answer: Used | Unknown) -> Used | Unknown:
    """The map of a filesystem that is mounted for writing: believed only where a log would tell of work."""
    if isinstance(answer, Unknown) or answer.kind not in _TELLING:
        return Unknown(_MOUNTED, answer.kind)
    if answer.note and answer.kind.startswith("ext"):
        return Unknown(_MOUNTED, answer.kind)  # a frozen one is as clean as one that was unmounted
    return Used(answer.extents, "; ".join(filter(None, (answer.note, AT_REST))), answer.kind)


_Place = tuple[int | None, int, int, str | None]
"Number, start, length, why it has no map."


def _parts(entries: tuple[Entry, ...], size: int) -> Iterator[_Place]:
    for entry in entries:
        end = entry.start + entry.size
        problem = None
        others = (other for other in entries if other is not entry)
        if is_extended(entry):
            problem = "the logical partitions in it are not looked into"
        elif end > size:
            problem = "it reaches beyond the end of the disk"
        elif any(other.start < end and entry.start < other.start + other.size for other in others):
            problem = "it overlaps another partition"
        yield entry.number, entry.start, max(0, min(end, size) - entry.start), problem


def read(fd: int, at: int, length: int) -> bytes:
    """Bytes through aligned memory, for descriptors past the page cache; none where they cannot be read."""
    import mmap

    first = at // 4096 * 4096
    room = -(-(at + length - first) // 4096) * 4096
    with mmap.mmap(-1, room) as buffer:
        try:
            got = os.preadv(fd, [buffer], first)
        except OSError:
            return b""
        return bytes(buffer[at - first : min(got, at - first + length)])


def mounted_for_writing(fd: int) -> frozenset[int | None]:
    """Numbers of the source's partitions that are mounted for writing; None: the source itself.

    What stands on a partition (LVM, md, LUKS) counts, and so does what is
    mounted from a loop device over a source that is a file.
    """
    from imager.device import sysfs

    info = os.fstat(fd)
    if not stat.S_ISBLK(info.st_mode) and not sysfs.has_loops():
        return frozenset()  # A file is mounted through one: the machine need not be looked at.
    from imager.device.machine import Machine

    machine = Machine.read()
    if stat.S_ISBLK(info.st_mode):
        disks = [node] if (node := machine.nodes.get(info.st_rdev)) else []
        disks += machine.shared_file(disks[0]) if disks else []
    else:
        loops = machine.loops_over_file((info.st_dev, info.st_ino))
        disks = [machine.nodes[loop.dev] for loop in loops]
    found: set[int | None] = set()
    for disk in disks:
        parts = [part for part in map(machine.node, disk.partitions) if part]
        numbers = {part.dev: part.number for part in parts}
        for top in (disk, *parts):
            nodes = [top] if top is disk else [top, *machine.above(top)]
            held = machine.stacked(top) if top is disk else []
            if any(_written(machine, node) for node in [*nodes, *held]):
                found.add(numbers.get(top.dev))
    return frozenset(found)


def _written(machine: Machine, node: Node) -> bool:
    """Whether a filesystem on this device is writable: the last ro or rw is the filesystem's own."""
    for mount in machine.mounted(node):
        modes = [option for option in mount.options.split(",") if option in ("ro", "rw")]
        if modes[-1:] != ["ro"]:
            return True
    return False
