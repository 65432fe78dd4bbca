"""The images of a set, and their block maps as windows.

Invariant: an image whose map fits one window is read once and kept; a
larger one is read anew for each pass, so that memory stays bounded. A
damaged map page is an error unless the caller asks to be told instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct, field

from imager._native import DATA, ZERO
from imager.engine.compare import Geometry
from imager.engine.windows import Ranges, Window, windows
from imager.errors import IntegrityError, UsageError
from imager.events import Reporter
from imager.extents import Extents
from imager.repository import imageset, tombstones
from imager.repository.blockmap import MapReader
from imager.repository.manifest import Manifest
from imager.repository.repository import Repository
from imager.repository.witness import Witness

OnDamage = Callable[[int, int, str], None]
"""`on_damage(first, count, reason)`: these blocks' map page cannot be read."""


class Image(Struct):
    """One disk of a set."""

    repository: Repository
    manifest: Manifest
    disk: str
    geometry: Geometry
    unreadable: tuple[tuple[int, int], ...]  # (start, length) in bytes, as the backup found it
    source: Any  # identity of the source, as the manifest keeps it
    reader: MapReader
    _kept: list[Window] | None = field(default=None)

    def windows(self, on_damage: OnDamage | None = None) -> Iterator[Window]:
        """The whole map. Raises `IntegrityError` at a damaged page where there is no `on_damage`."""
        if self._kept is not None:
            yield from self._kept
            return
        damaged = False

        def told(first: int, count: int, reason: str) -> None:
            nonlocal damaged
            damaged = True
            self._raise(first, count, reason) if on_damage is None else on_damage(first, count, reason)

        kept: list[Window] | None = []
        for window in windows(self.reader.walk(on_damage=told)):
            _normalise(window)
            if kept is not None:
                kept = [window] if not kept else None
            yield window
        if kept is not None and not damaged:
            self._kept = kept

    def part(self, ranges: Extents) -> Iterator[Window]:
        """The map of some ranges of blocks."""
        if self._kept is not None:
            for window in self._kept:
                yield from _cut(window, ranges)
            return
        for window in windows(self.reader.walk(list(ranges.ranges), on_damage=self._raise)):
            _normalise(window)
            yield from _cut(window, ranges)

    def totals(self, on_damage: OnDamage | None = None) -> tuple[int, int]:
        """Bytes in blocks that hold data, and in unused ones. Reads the map. Raises `IntegrityError`."""
        data = unused = 0
        for window in self.windows(on_damage):
            more = window.data()
            data += more[0] * self.geometry.block_size
            unused += self.geometry.total(window.unused)
            if more[0] and window.end == self.geometry.blocks and self._ends_in_data(window):
                data -= self.geometry.blocks * self.geometry.block_size - self.geometry.size
        return data, unused

    @staticmethod
    def _ends_in_data(window: Window) -> bool:
        """Whether the window's last block holds data."""
        last = window.ranges[-1][1] if window.ranges else 0
        return last == window.end and window.slots.get(len(window.slots) - 1)[0] == DATA

    def _raise(self, first: int, count: int, reason: str) -> None:
        start = first * self.geometry.block_size
        length = self.geometry.length(first, first + count)
        raise IntegrityError(
            f"the block map of {self.disk} is damaged: bytes {start} to {start + length} cannot be placed"
            f" ({reason})",
            hint="imager verify names all that is damaged; choose another set, or: imager check --repair",
        )


def tell_of_rollback(repository: Repository, reporter: Reporter) -> None:
    """Warn where sets that this machine has seen are gone or replaced: the newest may not be the newest."""
    heads, damaged = imageset.heads(repository)
    for problem in Witness(repository.place).observe(
        heads,
        damaged=[item.id for item in damaged],
        forgotten=tombstones.digests(repository),
        there=tombstones.exists(repository),
    ):
        reporter.warn(problem, hint="imager list shows what is there now; choose a set by what it holds")


def select(repository: Repository, text: str, disk: str | None = None) -> list[Image]:
    """The images that `SET` or `SET:DISK` names. Raises `UsageError`, and what `imageset.resolve` raises."""
    selector = imageset.split_selector(text)
    if selector.partition is not None:
        raise UsageError(
            f"{text}: a single partition cannot be taken out of an image yet",
            hint=f"name the disk: {selector.set}:{selector.disk}",
        )
    manifest = imageset.resolve(repository, selector.set)
    wanted = disk or selector.disk
    chosen = manifest.images if wanted is None else (imageset.select_image(manifest, wanted),)
    return [_image(repository, manifest, image) for image in chosen]


def select_one(repository: Repository, text: str, disk: str | None = None) -> Image:
    """The one image that `SET` or `SET:DISK` names. Raises `UsageError` where there are several."""
    images = select(repository, text, disk)
    if len(images) != 1:
        imageset.select_image(images[0].manifest, None) if images else None
        raise UsageError(f"{text} holds no disk")
    return images[0]


def _image(repository: Repository, manifest: Manifest, image: imageset.Image) -> Image:
    geometry = Geometry(image.size, image.block_size)
    reader = MapReader(repository, image)
    return Image(repository, manifest, image.disk, geometry, image.unreadable, image.source, reader)


def _normalise(window: Window) -> None:
    """What was unreadable comes back as zeroes, so that is what it is compared with."""
    if window.slots.counts()[2]:
        for kind, start, end in window.slots.runs():
            if kind not in (DATA, ZERO):
                window.slots.fill(start, end, ZERO)


def _cut(window: Window, ranges: Extents) -> Iterator[Window]:
    """The part of a window that lies in `ranges`."""
    runs: Ranges = list((Extents(tuple(window.runs)) & ranges).ranges)
    unused: Ranges = list((Extents(tuple(window.unused)) & ranges).ranges)
    for part, slots in window.select(ranges, max(1, len(window.slots))):
        yield Window(part[0][0], part[-1][1], slots, part, runs, unused)
        runs, unused = [], []
    if rest := [*runs, *unused]:
        yield Window(min(rest)[0], max(end for _, end in rest), runs=runs, unused=unused)
