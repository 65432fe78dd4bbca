"""The walks of the native core, as answers.

Invariant: what the core refuses is `Unknown` with its reason; it raises only
for a descriptor that is none.
"""

from __future__ import annotations

from imager import _native
from imager.extents import Extents
from imager.filesystem.used import Unknown, Used


def probe(kind: str, fd: int, size: int, start: int) -> str | None:
    """The common name of the filesystem, where its magic stands."""
    return _native.fs_probe(kind, fd, start, size)


def used_blocks(kind: str, fd: int, size: int, start: int) -> Used | Unknown:
    """The map of a filesystem of that kind."""
    ranges, text = _native.fs_used(kind, fd, start, size)
    if ranges is None:
        return Unknown(text)
    return Used(Extents(tuple(ranges)), text)
