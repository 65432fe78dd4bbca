"""A changed-block map that someone gives: bmap, ddrescue mapfile, or JSON.

Invariant: nothing in the file is trusted: its size and every number are
bounded, memory stays bounded however many extents it has (see `collect`),
what it does not speak of counts as changed, and it is used only where its
size, source and base fit (where it names them).

What the formats mean here:

- bmap (1.x and 2.0): the blocks listed may have changed, all others have not.
- ddrescue: as its own domain mapfiles do, a map selects areas. `?` (non-tried)
  is outside the selection, hence unchanged; `+` and also `*`, `/` and `-`
  (tried without success) may have changed.
- JSON: `{"extents": [[start, length], ...], "size", "source", "base"}`, in
  bytes; all but `extents` may be absent. `source` is an identity (`key`, or
  any of `wwn serial ptuuid partuuid stack_uuid path`), `base` a set's id or
  the digest of its manifest.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from imager.changes.collect import Collector
from imager.changes.provider import Changes, Request, Unknown
from imager.errors import UsageError
from imager.extents import Extents
from imager.units import format_size

MAX_FILE = 64 << 20
MAX_JSON = 8 << 20
"JSON is held in memory as a whole; the other formats are not."
MAX_OFFSET = 1 << 60
_IDENTITY = ("key", "wwn", "serial", "ptuuid", "partuuid", "stack_uuid", "path")
_COARSER = "make a map of a coarser grain"
_HINT = "a map is a bmap file (XML), a GNU ddrescue mapfile, or JSON with a list `extents`"


class GivenMap(Struct, frozen=True):
    """A map as read from `path`, in bytes. `size` is the image's, None where the map does not say."""

    path: str
    format: str  # bmap, ddrescue or json
    extents: Extents
    size: int | None
    source: Mapping[str, Any] | None = None
    base: str | None = None
    coarsened: bool = False  # more extents than are kept: neighbours were joined

    @property
    def name(self) -> str:
        return f"given:{self.format}"

    def changes(self, request: Request) -> Changes | Unknown:
        """The map's extents, where the map fits what is to be read."""
        if request.base is None:
            return Unknown("there is no earlier set that it could be counted from")
        if request.identity.kind == "stream":
            return Unknown("a stream is read to its end in any case")
        what = f"{request.identity.path} has {request.size} bytes"
        if self.size is not None and self.size != request.size:
            return Unknown(f"it is of an image of {self.size} bytes, {what}")
        if request.base.size != request.size:
            return Unknown(f"the base set's image has {request.base.size} bytes, {what}")
        if self.extents and self.extents.ranges[-1][1] > request.size:
            return Unknown(f"it names bytes past the end of {request.identity.path}")
        mismatch = self._other_source(request) or self._other_base(request)
        return Unknown(mismatch) if mismatch else Changes(self.extents, self.name, exact=False)

    def _other_source(self, request: Request) -> str | None:
        now = asdict(request.identity)
        kept = request.base.source if request.base else {}
        if kept.get("key") and kept["key"] != now["key"]:
            return f"the base set is of another source: {kept['key']}, not {now['key']}"
        for field in _IDENTITY:
            claimed = self.source.get(field) if self.source else None
            if claimed is not None and str(claimed) != str(now[field]):
                return f"it is of another source: {field} {claimed}, not {now[field]}"
            if claimed is not None and field == "key":
                break
        return None

    def _other_base(self, request: Request) -> str | None:
        if self.base is None or request.base is None:
            return None
        claimed, base = self.base.lower(), request.base
        fits = claimed == base.digest or (len(claimed) >= 8 and base.set_id.startswith(claimed))
        return None if fits else f"it starts at set {self.base}, the base is {base.set_id}"


def read(path: str | os.PathLike[str]) -> GivenMap:
    """Read a map file; the format is told by its first character. Raises `UsageError`."""
    name = os.fspath(path)
    try:
        with open(name, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UsageError(f"cannot read the map {name}: {error.strerror}") from error
    if len(data) > MAX_FILE:
        raise UsageError(f"{name} is larger than {format_size(MAX_FILE)}", hint=_COARSER)
    return parse(data, name)


def parse(data: bytes, name: str = "map") -> GivenMap:
    """A map from its bytes; `name` is for messages. Raises `UsageError`."""
    first = data[:4096].removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if first == b"<":
        from imager.changes.bmap import parse_bmap

        extents, size, coarsened = parse_bmap(data, name)
        return GivenMap(name, "bmap", extents, size, coarsened=coarsened)
    if first == b"{":
        return _json(data, name)
    if first == b"#" or first.isdigit():
        extents, size, coarsened = _ddrescue(data, name)
        return GivenMap(name, "ddrescue", extents, size, coarsened=coarsened)
    raise UsageError(f"{name} is not a changed-block map", hint=_HINT)


class _Document(msgspec.Struct):
    extents: list[tuple[int, int]]
    size: int | None = None
    source: dict[str, Any] | None = None
    base: str | None = None


def _json(data: bytes, name: str) -> GivenMap:
    if len(data) > MAX_JSON:
        raise UsageError(
            f"{name} is larger than {format_size(MAX_JSON)}",
            hint="give large maps as bmap or ddrescue mapfile",
        )
    try:
        document = msgspec.json.decode(data, type=_Document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{name} is not a JSON map: {error}", hint=_HINT) from error
    size = document.size
    if size is not None and not 0 <= size <= MAX_OFFSET:
        raise UsageError(f"{name}: {size} cannot be an image's size")
    limit = MAX_OFFSET if size is None else size
    for start, length in document.extents:
        if start < 0 or length < 0 or start + length > limit:
            raise UsageError(f"{name}: the extent [{start}, {length}] does not lie within the image")
    found = Collector()
    for start, length in document.extents:
        found.add(start, start + length)
    extents = found.result(limit)
    return GivenMap(name, "json", extents, size, document.source, document.base, found.coarsened)


_NUMBER = re.compile(r"0[xX][0-9a-fA-F]+|[0-9]+")


def _ddrescue(data: bytes, name: str) -> tuple[Extents, int, bool]:
    """Named extents, and where the map ends. Blocks must follow each other without a gap."""
    found = Collector()
    position: int | None = None
    status = False
    try:
        for raw in io.BytesIO(data):
            fields = raw.split(b"#", 1)[0].decode("ascii", errors="replace").split()
            if not fields:
                continue
            if not status:
                if len(fields) not in (2, 3) or fields[1] not in ("?", "*", "/", "-", "F", "G", "+"):
                    raise ValueError("it has no status line")
                _integer(fields[0])
                status = True
                continue
            if len(fields) != 3 or fields[2] not in ("?", "*", "/", "-", "+"):
                raise ValueError(f"cannot read the line {' '.join(fields)[:80]!r}")
            start, length = _integer(fields[0]), _integer(fields[1])
            if position is None:
                found.add(0, start)  # the map says nothing of what lies before it
            elif start != position:
                raise ValueError(f"the block at {start} should begin at {position}")
            position = start + length
            if fields[2] != "?":
                found.add(start, position)
        if position is None:
            raise ValueError("it lists no blocks" if status else "it has no status line")
        return found.result(position), position, found.coarsened
    except ValueError as error:
        raise UsageError(f"{name} is not a ddrescue mapfile: {error}", hint=_HINT) from error


def _integer(text: str) -> int:
    """Decimal, 0x hexadecimal or 0 octal, as in C."""
    if len(text) > 20 or not _NUMBER.fullmatch(text):
        raise ValueError(f"not a number: {text[:40]!r}")
    octal = len(text) > 1 and text[0] == "0" and text[1] not in "xX"
    value = int(text, 8 if octal else 0)
    if value > MAX_OFFSET:
        raise ValueError(f"{text} is out of range")
    return value
