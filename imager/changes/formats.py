"""Extents in the formats that people and other tools read.

Invariant: what is written as bmap, ddrescue or JSON is read back by `given`
as the same extents, bmap widened to its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from imager.changes import bmap
from imager.errors import UsageError
from imager.extents import Extents

FORMATS = ("text", "json", "bmap", "ddrescue")


def text(extents: Extents) -> bytes:
    """A line for each extent: start and length in bytes."""
    return "".join(f"{start} {end - start}\n" for start, end in extents).encode()


def json(extents: Extents, size: int, facts: Mapping[str, Any] | None = None) -> bytes:
    """One object: `extents` as `[start, length]`, `size`, and `facts` such as `source` and `base`."""
    pairs = [(start, end - start) for start, end in extents]
    return msgspec.json.encode({**(facts or {}), "size": size, "extents": pairs}) + b"\n"


def ddrescue(extents: Extents, size: int) -> bytes:
    """A domain mapfile: `+` where an extent is, `?` elsewhere."""
    parts = [(s, e, "+") for s, e in extents.clip(size)] + [(s, e, "?") for s, e in extents.complement(size)]
    lines = ["# Mapfile. Areas marked + differ", "# current_pos  current_status  current_pass"]
    lines += ["0x00000000     ?               1", "#      pos        size  status"]
    lines += [f"0x{start:08X}  0x{end - start:08X}  {mark}" for start, end, mark in sorted(parts)]
    return ("\n".join(lines) + "\n").encode()


class Differences(Protocol):
    """What `write` needs of a comparison's result."""

    @property
    def extents(self) -> Extents: ...

    @property
    def size(self) -> int: ...


def write(found: Differences, format: str) -> str:
    """The extents of a comparison as text in one of `FORMATS` (bmap without checksums of ranges)."""
    return render(format, found.extents, found.size).decode()


def render(
    format: str,
    extents: Extents,
    size: int,
    *,
    facts: Mapping[str, Any] | None = None,
    read: bmap.Read | None = None,
) -> bytes:
    """`extents` of an image of `size` bytes in one of `FORMATS`. `read` gives a bmap its checksums."""
    if format == "text":
        return text(extents)
    if format == "json":
        return json(extents, size, facts)
    if format == "bmap":
        return bmap.render(extents, size, read)
    if format == "ddrescue":
        return ddrescue(extents, size)
    raise UsageError(f"unknown format {format!r}", hint=f"one of {', '.join(FORMATS)}")
