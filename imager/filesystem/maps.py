"""The used-block map of whatever a partition holds.

Invariant: a map is believed only where exactly one reader recognises the
content; two signatures at once, or none, are `Unknown`. Extents are cut to
the partition.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, cast

from imager.filesystem.used import Unknown, Used

if TYPE_CHECKING:
    from imager.filesystem.used import Reader

KINDS = ("ext", "xfs", "btrfs", "fat", "exfat", "ntfs", "swap", "lvm", "luks", "raid")
"Modules of this package that are readers (`used.Reader`)."

_FARTHEST = 1 << 62


def reader(name: str) -> Reader:
    """The reader of that name, loaded when it is first needed."""
    return cast("Reader", import_module(f"imager.filesystem.{name}"))


def probe(fd: int, start: int, size: int, *, sector: int = 512) -> dict[str, str]:
    """Reader and common name of every filesystem whose magic stands in `[start, start + size)`."""
    found = {kind: reader(kind).probe(fd, size, start=start, sector=sector) for kind in KINDS}
    return {kind: name for kind, name in found.items() if name is not None}


def used_blocks(fd: int, start: int, size: int, *, sector: int = 512) -> Used | Unknown:
    """What is in use of the partition that occupies `size` bytes from `start` of a disk or image.

    Extents count from `start`. `fd` as in `used.Reader`; the descriptor's
    position does not move.
    """
    if start < 0 or size <= 0 or start % 512 or size % 512 or start + size > _FARTHEST:
        return Unknown(f"a partition of {size} bytes at {start} is not made of sectors")
    found = probe(fd, start, size, sector=sector)
    if not found:
        return Unknown("no filesystem that is known here")
    if len(found) > 1:
        return Unknown(f"it bears the signatures of {' and '.join(sorted(found.values()))} at once")
    [(kind, name)] = found.items()
    answer = reader(kind).used_blocks(fd, size, start=start, sector=sector)
    if isinstance(answer, Unknown):
        return Unknown(answer.reason, name)
    return Used(answer.extents.clip(size), answer.note, name)
