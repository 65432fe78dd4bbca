"""bmap files, versions 1.0 to 2.0: a list of an image's blocks in XML.

Invariant: a document type declaration is refused before any entity could be
expanded; checksums that the file carries of itself are checked; block counts
that contradict each other make the file invalid.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from xml.parsers import expat

from imager.changes.collect import Collector
from imager.errors import UsageError
from imager.extents import Extents

_MAX_OFFSET = 1 << 60
_FIELDS = ("ImageSize", "BlockSize", "BlocksCount", "MappedBlocksCount", "ChecksumType")
_SELF = {"BmapFileChecksum": None, "BmapFileSHA1": "sha1"}
_SUMS = ("sha256", "sha1", "sha512", "sha384", "sha224", "md5")
_RANGE = re.compile(r"(\d{1,19})(?:\s*-\s*(\d{1,19}))?")


class _Parser:
    """Collects the texts of the few elements that matter."""

    def __init__(self) -> None:
        self.version = ""
        self.fields: dict[str, str] = {}
        self.collected = Collector()
        self.mapped = 0
        self.end = 0
        self._path: list[str] = []
        self._text: list[str] = []

    def feed(self, data: bytes) -> None:
        parser = expat.ParserCreate()
        parser.buffer_text = True
        parser.StartDoctypeDeclHandler = self._doctype
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text.append
        parser.Parse(data, True)

    def _doctype(self, *_: object) -> None:
        raise ValueError("it has a document type declaration")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if not self._path:
            if name != "bmap":
                raise ValueError(f"its root element is {name[:40]!r}, not 'bmap'")
            self.version = attributes.get("version", "")
        self._path.append(name)
        if len(self._path) > 16:
            raise ValueError("its elements are nested too deeply")
        self._text.clear()

    def _end(self, name: str) -> None:
        self._path.pop()
        text = "".join(self._text).strip()
        self._text.clear()
        if name == "Range" and self._path == ["bmap", "BlockMap"]:
            self._range(text)
        elif self._path == ["bmap"] and (name in _FIELDS or name in _SELF):
            self.fields[name] = text

    def _range(self, text: str) -> None:
        match = _RANGE.fullmatch(text)
        if not match:
            raise ValueError(f"not a range of blocks: {text[:40]!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ValueError(f"the range {text} ends before it begins")
        self.collected.add(first, last + 1)
        self.mapped += last + 1 - first
        self.end = max(self.end, last + 1)


def parse_bmap(data: bytes, name: str) -> tuple[Extents, int, bool]:
    """The mapped extents in bytes, the image's size, and whether they were widened. Raises `UsageError`."""
    try:
        parser = _Parser()
        parser.feed(data)
        extents, size = _extents(parser, data)
        return extents, size, parser.collected.coarsened
    except (expat.ExpatError, ValueError) as error:
        raise UsageError(f"{name} is not a bmap file: {error}") from error


def _extents(parser: _Parser, data: bytes) -> tuple[Extents, int]:
    major = parser.version.split(".", 1)[0]
    if major not in ("1", "2"):
        raise ValueError(f"version {parser.version[:20]!r} is not 1.x or 2.x")
    size, block = _number(parser, "ImageSize"), _number(parser, "BlockSize")
    if not 1 <= block <= 1 << 30 or size > _MAX_OFFSET:
        raise ValueError(f"a block size of {block} or an image size of {size} bytes makes no sense")
    blocks = -(-size // block)
    if _number(parser, "BlocksCount", blocks) != blocks:
        raise ValueError("its numbers of bytes and blocks contradict each other")
    _check_sum(parser, data)
    if parser.end > blocks:
        raise ValueError(f"it lists block {parser.end - 1}, but the image has {blocks} blocks")
    mapped = parser.mapped
    if _number(parser, "MappedBlocksCount", mapped) != mapped:
        said = parser.fields["MappedBlocksCount"]
        raise ValueError(f"it says that {said} blocks are mapped, but lists {mapped}")
    return parser.collected.result(blocks).scale(block).clip(size), size


def _number(parser: _Parser, field: str, default: int | None = None) -> int:
    text = parser.fields.get(field)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or len(text) > 19:
        raise ValueError(f"{field} is {'missing' if text is None else 'not a number'}")
    return int(text)


def _check_sum(parser: _Parser, data: bytes) -> None:
    """The file's checksum of itself is made with zeroes in its own place."""
    for field, kind in _SELF.items():
        given = parser.fields.get(field)
        if given is None:
            continue
        kind = kind or parser.fields.get("ChecksumType", "")
        if kind not in _SUMS:
            raise ValueError(f"its checksum type {kind[:20]!r} is not known")
        digest = hashlib.new(kind, usedforsecurity=False)
        if len(given) != 2 * digest.digest_size:
            raise ValueError("its checksum has the wrong length")
        at = data.index(given.encode())
        with memoryview(data) as view:
            digest.update(view[:at])
            digest.update(b"0" * len(given))
            digest.update(view[at + len(given) :])
        if digest.hexdigest() != given.lower():
            raise ValueError("its checksum is wrong: the file is damaged or was edited")


Read = Callable[[int, int], Iterable[bytes]]
"""`read(start, end)`: the image's bytes of that range, piece by piece."""


def render(extents: Extents, size: int, read: Read | None = None, *, block_size: int = 4096) -> bytes:
    """A bmap 2.0 file of `extents` (bytes, widened to blocks). With `read`, each range has its SHA-256."""
    blocks = extents.clip(size).blocks(block_size)
    zeroes = "0" * 64
    lines = [
        '<?xml version="1.0" ?>',
        '<bmap version="2.0">',
        f"    <ImageSize> {size} </ImageSize>",
        f"    <BlockSize> {block_size} </BlockSize>",
        f"    <BlocksCount> {-(-size // block_size)} </BlocksCount>",
        f"    <MappedBlocksCount> {blocks.total} </MappedBlocksCount>",
        "    <ChecksumType> sha256 </ChecksumType>",
        f"    <BmapFileChecksum> {zeroes} </BmapFileChecksum>",
        "    <BlockMap>",
    ]
    for start, end in blocks:
        sum_ = ""
        if read is not None:
            digest = hashlib.sha256()
            for piece in read(start * block_size, min(end * block_size, size)):
                digest.update(piece)
            sum_ = f' chksum="{digest.hexdigest()}"'
        numbers = f"{start}" if end == start + 1 else f"{start}-{end - 1}"
        lines.append(f"        <Range{sum_}> {numbers} </Range>")
    lines += ["    </BlockMap>", "</bmap>", ""]
    text = "\n".join(lines).encode()
    return text.replace(zeroes.encode(), hashlib.sha256(text).hexdigest().encode(), 1)
