"""What every reader of a filesystem's allocation maps answers.

Invariant: a reader answers with `Used`, whose extents cover every byte that
the filesystem could ever read again, or with `Unknown` and a reason that a
person can read. There is no third answer and no exception for what the bytes
say: damage, an unreplayed log, an unknown feature are all `Unknown`.
"""

from __future__ import annotations

from typing import Protocol

from msgspec import Struct

from imager.extents import Extents


class Used(Struct, frozen=True):
    """Bytes in use, counted from the filesystem's first byte, within its device or partition.

    All else may be left out of an image: the filesystem passes its checker and
    gives every file back whatever stands there. `note`: what was taken into
    account beyond a clean filesystem's maps, or empty. `kind`: the reader's
    name, set by `maps.used_blocks`.
    """

    extents: Extents
    note: str = ""
    kind: str = ""


class Unknown(Struct, frozen=True):
    """No map: `reason` completes the sentence "every block is imaged: ...". `kind` as in `Used`."""

    reason: str
    kind: str = ""


class Reader(Protocol):
    """A module that knows one kind of filesystem (or volume) and is named in `maps.KINDS`.

    `fd` is open for reading: a device past the page cache (O_DIRECT), because
    XFS and btrfs do not write through it, or a file. The filesystem occupies
    `size` bytes from `start`, both multiples of 512. Neither function raises
    for what stands there, nor for what cannot be read.
    """

    def probe(self, fd: int, size: int, *, start: int = 0, sector: int = 512) -> str | None:
        """The filesystem's common name (`ext4`, `xfs`, ...) by its magic alone; None where it is none."""

    def used_blocks(self, fd: int, size: int, *, start: int = 0, sector: int = 512) -> Used | Unknown:
        """Its map. `sector`: the device's logical sector in bytes, the grain of direct reads."""
