"""An LVM physical volume: extents that no logical volume has are not in use.

Invariant: a map comes only from metadata that is whole, committed and alike in
all its places on this volume; label, metadata areas, and what lies before and
behind the extents count as used; every extent of any logical volume does, hidden ones
(thin metadata, mirror logs, RAID images) among them.
"""

from __future__ import annotations

from collections.abc import Iterator

from imager.device import lvm
from imager.device.window import Window
from imager.extents import Extents
from imager.filesystem.used import Unknown, Used

_KNOWN = frozenset(
    "striped mirror snapshot thin thin-pool cache cache-pool writecache vdo vdo-pool integrity error zero"
    " raid0 raid0_meta raid1 raid4 raid5 raid5_n raid5_ls raid5_la raid5_rs raid5_ra raid6 raid6_zr raid6_nr"
    " raid6_nc raid6_n_6 raid6_ls_6 raid6_la_6 raid6_rs_6 raid6_ra_6 raid10 raid10_near".split()
)


def probe(fd: int, size: int, *, start: int = 0, sector: int = 512) -> str | None:
    """`LVM2_member`, or None."""
    try:
        return "LVM2_member" if lvm.read_physical(Window(fd, start, size).read, size) else None
    except OSError:
        return None


def used_blocks(fd: int, size: int, *, start: int = 0, sector: int = 512) -> Used | Unknown:
    """Its map; see `used.Reader`."""
    try:
        volume = lvm.read_physical(Window(fd, start, size).read, size)
    except OSError as error:
        return Unknown(f"its metadata cannot be read: {error.strerror}")
    if volume is None:
        return Unknown("it has no whole label of LVM")
    return from_metadata(volume, size)


def from_metadata(volume: lvm.PhysicalVolume, size: int) -> Used | Unknown:
    """The map of a physical volume of `size` bytes, by what it says of its group."""
    if volume.problems:
        return Unknown(f"{volume.problems[0]} (LVM)")
    member, group = volume.member(), volume.group
    if member is None or group is None:
        return Unknown("it belongs to no volume group (LVM)")
    end = member.data_at + member.extents * group.extent
    if not 0 < member.data_at <= end <= size:
        return Unknown("its extents lie outside of it (LVM)")
    strange = {s.type for v in group.volumes for s in v.segments} - _KNOWN
    if strange:
        return Unknown(f"it has segments of a kind that is not known: {min(strange)[:40]} (LVM)")
    ranges = [(0, member.data_at), (end, size)]
    ranges += [(area.start, area.start + area.size) for area in (*volume.metadata, *volume.bootloader)]
    for first, count in _taken(group, member.name):
        if first + count > member.extents:
            return Unknown("a logical volume reaches beyond its end (LVM)")
        start = member.data_at + first * group.extent
        ranges.append((start, start + count * group.extent))
    taken = sum(1 for logical in group.volumes if logical.visible)
    return Used(Extents.of(ranges).clip(size), f"extents of {taken} logical volumes of group {group.name}")


def _taken(group: lvm.VolumeGroup, own: str) -> Iterator[tuple[int, int]]:
    """Extents of the physical volume `own` that are allocated, as (first, count)."""
    for volume in group.volumes:
        for segment in volume.segments:
            for piece in segment.pieces:
                if piece.on == own:
                    yield piece.extent, segment.each
