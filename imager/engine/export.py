"""Serving the disks of an image set at random access, as block devices over NBD.

Invariant: nothing is written. A byte that is given out belongs to a block whose id was checked, or
reads as zeroes by the block map; what cannot be had intact is an I/O error for its own range, and is
told of. Memory is bounded, whatever the image's size.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from msgspec import Struct

from imager import _native
from imager._native import Slots
from imager.engine import images, layouts
from imager.engine.background import Background
from imager.errors import ImagerError, IntegrityError, UsageError
from imager.events import Locked, Reporter
from imager.repository import blockmap, imageset
from imager.repository.blockmap import MapReader
from imager.repository.format import KIND_DATA
from imager.repository.locator import places_elsewhere
from imager.repository.manifest import Image, Manifest
from imager.repository.repository import Repository
from imager.storage.errors import Gone, StorageError
from imager.units import MIB, format_size

ROOM = 64 * MIB
"""Bytes of contents that are kept, of each disk."""
_PACKS, _COPIES = 128, 8
"""Packs that are open at a time; of a far storage each is a copy on this machine."""


class Export(Struct, frozen=True):
    """A disk, or a partition of it: `name` is `DISK` or `DISK:N`. `start`, `size`: in bytes."""

    name: str
    description: str
    disk: str
    start: int
    size: int


class ExportPlan(Struct, frozen=True):
    """What is served of a set: the first of `exports` also to a client that names none."""

    set: str
    name: str
    exports: tuple[Export, ...]


def plan(repository: Repository, text: str, reporter: Reporter) -> ExportPlan:
    """What `SET`, `SET:DISK` or `SET:DISK:N` means. Raises `UsageError`, and as `imageset.resolve` does."""
    images.tell_of_rollback(repository, reporter)
    selector = imageset.split_selector(text)
    manifest = imageset.resolve(repository, selector.set)
    chosen = manifest.images
    if selector.disk is not None:
        chosen = (imageset.select_image(manifest, selector.disk),)
    exports = [export for image in chosen for export in _exports(manifest, image)]
    if selector.partition is not None:
        wanted = f"{selector.disk}:{selector.partition}"
        exports = [export for export in exports if export.name == wanted]
        if not exports:
            raise UsageError(
                f"{text}: its layout tells of no such partition",
                hint=f"imager show {selector.set} --layout names those there are",
            )
    if not exports:
        raise UsageError(f"{text} holds no disk")
    return ExportPlan(manifest.id, manifest.content.name, tuple(exports))


def _exports(manifest: Manifest, image: Image) -> Iterator[Export]:
    body = manifest.content
    said = f"{body.name} on {body.host}, image set {manifest.id[:8]}"
    yield Export(image.disk, f"{said}: {format_size(image.size)}", image.disk, 0, image.size)
    layout = layouts.read(image)
    for part in layout.table.partitions if layout is not None and layout.table is not None else ():
        if not part.container and 0 < part.size and part.start + part.size <= image.size:
            words = f"{said}: partition {part.number}, {format_size(part.size)}"
            yield Export(f"{image.disk}:{part.number}", words, image.disk, part.start, part.size)


class _Supply:
    """What the core asks for while it serves an image; see `_native.Supply`."""

    def __init__(self, repository: Repository, image: Image, base: Image | None, reporter: Reporter) -> None:
        self._repository = repository
        self._image = image
        self._base = base
        self._reporter = reporter
        self._lock = threading.Lock()
        self._told: set[int] = set()
        self._reader = MapReader(repository, image)

    def leaf(self, index: int) -> Slots:
        with self._lock:
            try:
                return self._reader.leaf(index)
            except ImagerError as error:
                self._tell(-1 - index, error.message)
                raise

    def pack(self, number: int) -> tuple[int, Sequence[int | None]]:
        with self._lock, self._repository.packs([number]) as readers:
            fd, keys = readers[number]
            return os.dup(fd), keys

    def elsewhere(self, block: int, identity: bytes, place: tuple[int, int], reason: str) -> bytes:
        with self._lock:
            found = self._found_elsewhere(block, identity, {place})
            if found is not None:
                return found
            start = block * self._image.block_size
            length = min(self._image.block_size, self._image.size - start)
            self._tell(block, f"{length} bytes at {start} cannot be read: {reason}")
        raise IntegrityError(reason)

    def changed(self) -> Sequence[tuple[int, int]]:
        with self._lock:
            if self._base is None:
                return ()
            unit, size = self._image.block_size, self._image.size
            earlier = MapReader(self._repository, self._base)
            return [(a * unit, min(b * unit, size)) for a, b in blockmap.diff(earlier, self._reader)]

    def _found_elsewhere(self, block: int, identity: bytes, tried: set[tuple[int, int]]) -> bytes | None:
        repository, image = self._repository, self._image
        for place in places_elsewhere(repository.locator, identity, KIND_DATA, tried):
            slot, gather = Slots(1), _native.Gather()
            slot.set_data(0, identity, *place)
            gather.add(block, slot)
            gather.sort()
            try:
                with repository.packs([place[0]]) as readers:
                    found = _native.read_blocks(
                        repository.vault, readers, gather, image_size=image.size, block_size=image.block_size
                    )
            except Gone:
                raise
            except (IntegrityError, StorageError, _native.DamagedError, _native.ReadError):
                continue
            return found[0][1]
        return None

    def _tell(self, what: int, text: str) -> None:
        """Once for each block or page: a client may ask for it again and again."""
        if what not in self._told:
            self._told.add(what)
            self._reporter.warn(f"{self._image.disk}: {text}", hint="imager verify names all that is damaged")


@contextmanager
def serving(
    repository: Repository, exported: ExportPlan, listener: socket.socket, reporter: Reporter
) -> Iterator[threading.Event]:
    """Serve in the background while the context lasts; the event is set where that ended before.

    Raises at the end what ended it: `StorageError`.
    """
    manifest = imageset.read_set(repository, exported.set)
    bases = {image.disk: image for image in layouts.base_images(repository, manifest.content.base)}
    served, locked = {}, Locked(reporter)
    for disk in {export.disk for export in exported.exports}:
        image = imageset.select_image(manifest, disk)
        base = bases.get(disk)
        if base is not None and base.block_size != image.block_size:
            base = None
        served[disk] = _native.ServedImage(
            repository.vault,
            _Supply(repository, image, base, locked),
            image_size=image.size,
            block_size=image.block_size,
            room=ROOM,
            packs=_PACKS if repository.storage.local else _COPIES,
            based=base is not None,
        )
    exports = [(one.name, one.description, served[one.disk], one.start, one.size) for one in exported.exports]
    told, teller = os.pipe()
    serve = Background("nbd", lambda: _native.serve_images(exports, listener.fileno(), told))
    try:
        yield serve.done
    finally:
        os.close(teller)
        serve.close()
        os.close(told)
    if serve.error is not None:
        raise StorageError(f"serving ended: {serve.error}") from serve.error
