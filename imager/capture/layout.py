"""The layout of a source: its partitions, what each of them holds, and the system on it.

Invariant: reading a layout changes nothing and fails for nothing that stands on
the source; what cannot be read or makes no sense is said in `problems`. A layout's
size is bounded (`MAX_LAYOUT`), whatever the source says of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from imager.capture.system import System
from imager.device import efi, luks, lvm, md
from imager.device.efi import BootEntry
from imager.device.partitioning import Partition, Partitioning, read_partitioning
from imager.device.window import Readable, Spread, Window
from imager.filesystem.ext_files import ExtFiles
from imager.filesystem.fat_files import FatFiles
from imager.filesystem.files import Files
from imager.filesystem.identify import Filesystem, identify

VERSION = 1
MAX_LAYOUT = 4 << 20
"""The most that a layout takes in a manifest, in bytes of JSON."""
_MAX_TEXT = 256 << 10
_READERS: dict[str, Callable[[Readable], Files]] = {
    "ext2": ExtFiles,
    "ext3": ExtFiles,
    "ext4": ExtFiles,
    "vfat": FatFiles,
}
_ESP, _BIOS_BOOT = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", "21686148-6449-6e6f-744e-656564454649"


class Volume(Struct, frozen=True):
    """A partition, a logical volume, or a whole disk without partitions, and what it holds.

    `name`: the partition's number, `group/volume`, or "". `start`: its first byte on the disk, None
    for a logical volume in several pieces; `size`: in bytes. `kind`: as blkid names it (ext4, vfat,
    swap, LVM2_member, crypto_LUKS, linux_raid_member ...), "" where nothing known is there. `used`:
    bytes in use, None where every byte counts as used, and `why` says why. `volumes`: the logical
    volumes on it.
    """

    name: str
    start: int | None
    size: int
    kind: str = ""
    filesystem: Filesystem | None = None
    lvm: lvm.PhysicalVolume | None = None
    raid: md.Member | None = None
    luks: luks.Luks | None = None
    used: int | None = None
    why: str = ""
    system: System | None = None
    volumes: tuple[Volume, ...] = ()
    problems: tuple[str, ...] = ()


class Layout(Struct, frozen=True):
    """What a disk held when it was imaged. Sizes in bytes.

    `sector`: its logical sector. `boot`: how it can be started, as far as its own structures tell
    (uefi, bios). `firmware`: how the machine that it was in was started, and `entries` that firmware's
    boot entries, where the disk is one of the running system; else None and none.
    """

    version: int
    size: int
    sector: int
    table: Partitioning | None
    volumes: tuple[Volume, ...]
    boot: tuple[str, ...] = ()
    firmware: str | None = None
    entries: tuple[BootEntry, ...] = ()
    problems: tuple[str, ...] = field(default=())


class Place(Struct, frozen=True):
    """What is known of a source beside its bytes. `device`: its path where it is a device.

    `mounts`: where partitions are mounted, by their first byte. `running`: the running system stands on it.
    """

    device: str | None = None
    mounts: Mapping[int, str] = field(default_factory=dict)
    running: bool = False


def read_layout(
    fd: int,
    size: int,
    sector: int | None,
    place: Place | None = None,
    *,
    maps: bool = False,
    look: bool = False,
) -> Layout:
    """The layout of the disk or image that `fd` is open on.

    `sector`: its logical sector, None where that is not known (a file). `maps`: have the used-block
    maps made, for `used`. `look`: find out what system is installed. Never
    raises for what stands there.
    """
    where = place or Place()
    disk = Window(fd, 0, size)
    problems: list[str] = []
    table = None
    try:
        table = read_partitioning(disk.read, size, sector)
    except OSError as error:
        problems.append(f"the partition table cannot be read: {error.strerror}")
    reader = _Reader(disk, table.sector if table else sector or 512, where, maps, look)
    volumes: tuple[Volume, ...]
    if table is None:
        volumes = (reader.volume("", Window(fd, 0, size)),)
    else:
        volumes = tuple(
            reader.volume(str(part.number), disk.part(part.start, part.size))
            for part in table.partitions
            if not part.container
        )
    running = where.running
    layout = Layout(
        version=VERSION,
        size=size,
        sector=table.sector if table else sector or 512,
        table=table,
        volumes=volumes,
        boot=tuple(_boot(disk, table)),
        firmware=("uefi" if efi.is_uefi() else "bios") if running else None,
        entries=efi.boot_entries() if running else (),
        problems=tuple(problems),
    )
    return _bounded(layout)


class _Reader:
    def __init__(self, disk: Window, sector: int, place: Place, maps: bool, look: bool) -> None:
        self.disk = disk
        self.sector = sector
        self.place = place
        self.maps = maps
        self.look = look

    def volume(self, name: str, window: Window) -> Volume:
        """A partition, or a whole disk, and what is on it."""
        found = self._content(name, window, window.start)
        if found.lvm is not None and found.lvm.group is not None:
            found = replace(found, volumes=tuple(self._logical(found.lvm, window)))
        if self.maps:
            found = self._with_map(found, window)
        return found

    def _content(self, name: str, window: Readable, start: int | None) -> Volume:
        bare = Volume(name, start, window.size)
        try:
            return self._identified(bare, window, start)
        except OSError as error:
            return replace(bare, problems=(f"it cannot be read: {error.strerror}",))

    def _identified(self, bare: Volume, window: Readable, start: int | None) -> Volume:
        """RAID members look like the filesystem in them, and LVM leaves old signatures: they come first."""
        member = md.read_member(window.read, window.size)
        if member is not None:
            wrong = () if member.whole else ("the checksum of its RAID superblock is wrong",)
            return replace(bare, kind="linux_raid_member", raid=member, problems=wrong)
        if luks.has_magic(window.read(0, 8)):
            header = luks.read_luks(window.read, window.size)
            found = header.problems if header else ("its LUKS header is damaged, and so is its copy",)
            return replace(bare, kind="crypto_LUKS", luks=header, problems=found)
        physical = lvm.read_physical(window.read, window.size)
        if physical is not None:
            return replace(bare, kind="LVM2_member", lvm=_short(physical), problems=physical.problems)
        filesystem = identify(window)
        if filesystem is None:
            return bare
        beyond = filesystem.size - window.size
        problems = (f"its filesystem is {beyond} bytes larger than its place",) if beyond > 0 else ()
        volume = replace(bare, kind=filesystem.type, filesystem=filesystem, problems=problems)
        return self._looked_into(volume, window, start) if self.look else volume

    def _looked_into(self, found: Volume, window: Readable, start: int | None) -> Volume:
        from imager.capture.system import read_system

        filesystem, at = found.filesystem, self.place.mounts.get(-1 if start is None else start)
        if at is not None:
            from imager.capture.mounted import Folder

            return replace(found, system=read_system(Folder(at)))
        if found.kind in _READERS:
            try:
                return replace(found, system=read_system(_READERS[found.kind](window)))
            except OSError as error:
                said = f"the system on it cannot be read: {error.strerror}"
                return replace(found, problems=(*found.problems, said))
        device = self.place.device
        if found.kind not in ("xfs", "btrfs") or device is None or start is None or filesystem is None:
            return found
        from imager.capture import mounted
        from imager.errors import ImagerError

        why = mounted.may_look_into(found.kind, filesystem.uuid, filesystem.devices)
        if why is None:
            try:
                with mounted.looked_into(device, found.kind, start, found.size) as folder:
                    return replace(found, system=read_system(folder))
            except ImagerError as error:
                why = error.message
        return replace(found, problems=(*found.problems, f"the system on it is not known: {why}"))

    def _logical(self, physical: lvm.PhysicalVolume, window: Window) -> Iterator[Volume]:
        """The visible logical volumes; what they hold, where they lie on this disk alone and in the open."""
        group, member = physical.group, physical.member()
        assert group is not None
        for volume in group.volumes:
            if not volume.visible:
                continue
            name = f"{group.name}/{volume.name}"
            parts = _pieces(volume, group, member, window)
            if parts is None:
                yield Volume(name, None, volume.size, why=f"it is {volume.kind}, or reaches to other disks")
            elif len(parts) == 1:
                yield self._content(name, parts[0], parts[0].start)
            else:
                yield self._content(name, Spread(parts), None)

    def _with_map(self, found: Volume, window: Window) -> Volume:
        from imager.filesystem import maps
        from imager.filesystem.used import Unknown

        answer = maps.used_blocks(window.fd, window.start, window.size, sector=self.sector)
        if isinstance(answer, Unknown):
            return replace(found, why=answer.reason)
        return replace(found, used=answer.extents.total, why=answer.note)


def _pieces(
    volume: lvm.LogicalVolume, group: lvm.VolumeGroup, member: lvm.Member | None, window: Window
) -> tuple[Window, ...] | None:
    """Where a linear volume lies on this physical one; None where that is not all there is to it."""
    out: list[Window] = []
    for segment in sorted(volume.segments, key=lambda one: one.start):
        if segment.type != "striped" or len(segment.pieces) != 1 or member is None:
            return None
        piece = segment.pieces[0]
        if piece.on != member.name or len(out) >= 4096:
            return None
        start = member.data_at + piece.extent * group.extent
        part = window.part(start, segment.extents * group.extent)
        if out and out[-1].start + out[-1].size == part.start:
            out[-1] = Window(part.fd, out[-1].start, out[-1].size + part.size)
        else:
            out.append(part)
    return tuple(out) or None


def _short(physical: lvm.PhysicalVolume) -> lvm.PhysicalVolume:
    if len(physical.text) <= _MAX_TEXT:
        return physical
    said = f"its metadata text of {len(physical.text)} characters is too long to be kept here"
    return replace(physical, text="", problems=(*physical.problems, said))


def _boot(disk: Window, table: Partitioning | None) -> Iterator[str]:
    if table is None:
        return
    if any(part.type in (_ESP, "ef") for part in table.partitions):
        yield "uefi"
    try:
        code = any(disk.read(0, 440))
    except OSError:
        return
    active = any(part.attributes & 0x80 and table.scheme == "dos" for part in table.partitions)
    if code and (active or any(part.type == _BIOS_BOOT for part in table.partitions)):
        yield "bios"


# --- as JSON --------------------------------------------------------------------------


def _bounded(layout: Layout) -> Layout:
    """What a hostile disk could make large goes first: the details of volume groups."""
    import msgspec

    if len(msgspec.json.encode(layout)) <= MAX_LAYOUT:
        return layout
    said = "it describes more than can be kept here: details of volume groups are left out"
    volumes = tuple(
        replace(v, volumes=(), problems=(*v.problems, said), lvm=replace(v.lvm, group=None, text=""))
        if v.lvm
        else v
        for v in layout.volumes
    )
    return replace(layout, volumes=volumes)


def to_plain(layout: Layout) -> dict[str, Any]:
    """As dictionaries, lists, numbers and text, for the manifest."""
    import msgspec

    plain: dict[str, Any] = msgspec.to_builtins(layout)
    return plain


def from_plain(value: Any) -> Layout | None:
    """A layout that `to_plain` made; None where there is none, or of a form that is not known."""
    import msgspec

    if not isinstance(value, dict) or value.get("version") != VERSION:
        return None
    try:
        return msgspec.convert(value, Layout)
    except msgspec.ValidationError:
        return None


def partition_of(layout: Layout, name: str) -> Partition | None:
    """The entry of the table that a volume's name is the number of."""
    if layout.table is None or not name.isdecimal():
        return None
    return next((part for part in layout.table.partitions if part.number == int(name)), None)
