"""Diff: where two sets, two devices, or a set and a device differ.

Invariant: every byte of either side outside the extents is equal to the
other side's; extents may be wider than the difference by up to a block
(sets) or a page (devices). Where the sizes differ, what only one side has
counts as different.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from msgspec import Struct

from imager._native import ReadError, compare_files
from imager.engine import images
from imager.engine.compare import Comparer, Readable, open_readable, unreadable
from imager.engine.images import Image
from imager.engine.stream import Streamer
from imager.engine.windows import SEGMENT_BYTES
from imager.errors import UsageError
from imager.events import Reporter
from imager.extents import Extents
from imager.repository import blockmap
from imager.repository.repository import Repository

GRAIN = 4096
"Grain of a comparison of contents, in bytes."


class Side(Struct, frozen=True):
    """One of the two. `kind`: set or file; `set` and `digest` name a set, `source` is its identity."""

    name: str
    kind: str
    size: int
    set: str | None = None
    digest: str | None = None
    disk: str | None = None


class DiffSummary(Struct, frozen=True):
    """What differs. `extents` in bytes (encoded as [start, length]); `size` of the larger side.

    `base` and `source` let the JSON form be given to `backup --changed`.
    """

    a: Side
    b: Side
    differs: bool
    size: int
    differing_bytes: int
    grain: int
    extents: Extents
    base: str | None
    source: dict[str, str] | None


def is_file(text: str) -> bool:
    """Whether `text` names a device or file: it has a slash in it."""
    return "/" in text


def diff(
    repository: Repository | None, a: str, b: str, reporter: Reporter, *, threads: int = 0
) -> DiffSummary:
    """Compare two of: `SET`, `SET:DISK`, a device or a file (with a slash in its name).

    `repository` is needed where a set is named. Raises `UsageError`,
    `SourceError`, `IntegrityError` for damaged blocks or maps, and what resolving raises.
    """
    left, right = _open(repository, a), _open(repository, b)
    try:
        if isinstance(left, Image) and isinstance(right, Image):
            extents, grain = _sets(left, right, reporter, threads)
        elif isinstance(left, Image) and isinstance(right, Readable):
            extents, grain = _set_and_file(left, right, reporter, threads), left.geometry.block_size
        elif isinstance(left, Readable) and isinstance(right, Image):
            extents, grain = _set_and_file(right, left, reporter, threads), right.geometry.block_size
        else:
            assert isinstance(left, Readable) and isinstance(right, Readable)
            extents, grain = _files(left, right, reporter, threads), GRAIN
    finally:
        for side in (left, right):
            if isinstance(side, Readable):
                os.close(side.fd)
    low, high = sorted((_size(left), _size(right)))
    extents |= Extents.of([(low, high)])
    # What changed is counted from a set, and is of a device where there is one.
    from_left = isinstance(left, Image) or not isinstance(right, Image)
    start, (other, name) = (left, (right, b)) if from_left else (right, (left, a))
    key = _source_key(other, name)
    return DiffSummary(
        a=_side(left, a),
        b=_side(right, b),
        differs=bool(extents),
        size=high,
        differing_bytes=extents.total,
        grain=grain,
        extents=extents,
        base=start.manifest.id if isinstance(start, Image) else None,
        source={"key": key} if key else None,
    )


def _open(repository: Repository | None, text: str) -> Image | Readable:
    if is_file(text):
        return open_readable(text)
    if repository is None:
        raise UsageError(f"{text} is an image set, but no repository was named", hint="name it with -r REPO")
    return images.select_one(repository, text)


def _size(side: Image | Readable) -> int:
    return side.geometry.size if isinstance(side, Image) else side.size


def _side(side: Image | Readable, text: str) -> Side:
    if isinstance(side, Image):
        manifest = side.manifest
        return Side(text, "set", side.geometry.size, manifest.id, manifest.digest.hex(), side.disk)
    return Side(text, "file", side.size)


def _source_key(side: Image | Readable, text: str) -> str | None:
    """Which source a side is, or was taken from."""
    if isinstance(side, Readable):
        from imager.device.identity import identify

        return identify(text).key
    source = side.source
    key = source.get("key") if isinstance(source, dict) else None
    return key if isinstance(key, str) else None


def _sets(a: Image, b: Image, reporter: Reporter, threads: int) -> tuple[Extents, int]:
    """By their maps where the blocks are of one size, else by their contents."""
    if a.geometry.block_size == b.geometry.block_size:
        reporter.phase("comparing", None)
        found = Extents.of(blockmap.diff(a.reader, b.reader))
        reporter.end()
        size = a.geometry.block_size
        return found.scale(size).clip(max(a.geometry.size, b.geometry.size)), size
    end = min(a.geometry.size, b.geometry.size)
    reporter.phase("comparing contents", end)
    left, right = Streamer(a, threads=threads), Streamer(b, threads=threads)
    found_bytes: list[tuple[int, int]] = []
    try:
        for start, stop in _steps(end):
            left.fill(start, stop)
            right.fill(start, stop)
            found_bytes += compare_files(left.fd, right.fd, start, stop, grain=GRAIN, threads=threads)
            reporter.advance(stop - start)
    finally:
        left.close()
        right.close()
    reporter.end()
    return Extents.of(found_bytes).clip(end), GRAIN


def _set_and_file(image: Image, device: Readable, reporter: Reporter, threads: int) -> Extents:
    geometry = image.geometry
    # A block that reaches past the device's end is told apart by the sizes alone.
    whole = geometry.blocks if device.size >= geometry.size else device.size // geometry.block_size
    comparer = Comparer(image.repository.vault, geometry, device, reporter, threads)
    reporter.phase("comparing", geometry.length(0, whole))
    blocks: list[tuple[int, int]] = [(whole, geometry.blocks)]
    for window in image.windows():
        blocks += comparer.differing(window, Extents.of([(0, whole)]))
        reporter.advance(geometry.total(window.unused))
    reporter.end()
    return geometry.extents(Extents.of(blocks))


def _files(a: Readable, b: Readable, reporter: Reporter, threads: int) -> Extents:
    end = min(a.size, b.size)
    reporter.phase("comparing", end)
    found: list[tuple[int, int]] = []
    direct = a.direct and b.direct
    for start, stop in _steps(end):
        try:
            found += compare_files(a.fd, b.fd, start, stop, grain=GRAIN, threads=threads, direct=direct)
        except ReadError as error:
            raise unreadable(_failing(a, b, error), error) from error
        reporter.advance(stop - start)
    reporter.end()
    return Extents.of(found).clip(end)


def _failing(a: Readable, b: Readable, error: ReadError) -> Readable:
    """Which of the two cannot be read at the error's offset."""
    at = error.filename if isinstance(error.filename, int) else 0
    try:
        os.lseek(a.fd, at // GRAIN * GRAIN, os.SEEK_SET)
        os.read(a.fd, 1 if not a.direct else GRAIN)
    except OSError:
        return a
    return b


def _steps(end: int) -> Iterator[tuple[int, int]]:
    return ((at, min(at + SEGMENT_BYTES, end)) for at in range(0, end, SEGMENT_BYTES))
