"""The layout of a source into an image set, and out of it again.

Invariant: a backup never fails for its source's layout: what cannot be read of it is
said in the layout itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from imager._native import DATA, UNUSED, ZERO
from imager.errors import TargetError
from imager.extents import Extents
from imager.units import format_time

if TYPE_CHECKING:
    from imager.capture.layout import Layout, Place
    from imager.engine.source import Opened, SourcePlan
    from imager.repository.manifest import Image, Manifest
    from imager.repository.repository import Repository


def capture(source: SourcePlan, opened: Opened) -> dict[str, Any]:
    """The layout of an opened source, as a manifest keeps it."""
    from imager.capture import layout

    place = _place(source)
    sector = opened.sector if source.identity.is_device else None
    return layout.to_plain(layout.read_layout(opened.fd, opened.size, sector, place, look=True))


def _place(source: SourcePlan) -> Place:
    """What is known of a device: where its partitions are mounted, whether the system stands on it."""
    from imager.capture.layout import Place

    if not source.identity.is_device:
        return Place()
    from imager.device.machine import Machine

    machine = Machine.read()
    node = machine.nodes.get(source.identity.dev)
    if node is None:
        return Place(source.identity.path)
    parts = [part for name in node.partitions if (part := machine.node(name)) is not None]
    mounts = {}
    for part, start in ((node, 0), *((part, part.start) for part in parts)):
        at = machine.mounted(part)
        if at:
            mounts[start] = at[0].target
    system = machine.system_devices()
    running = any(part.dev in system for part in (node, *parts))
    return Place(source.identity.path, mounts, running)


def read(image: Image) -> Layout | None:
    """The layout that a set keeps of a disk; None where it keeps none, or one of a form that is not known."""
    from imager.capture import layout

    return layout.from_plain(image.layout)


class Occupied(Struct, frozen=True):
    """What an image has of a disk, in bytes. `changed` is None where the set's base is none, or gone."""

    data: Extents
    zero: Extents
    unused: Extents
    unreadable: Extents
    changed: Extents | None


def occupied(repository: Repository, image: Image, base: Image | None) -> Occupied:
    """What the block maps of an image and of the one before it say. Raises `DamagedPage`."""
    from imager.repository import blockmap

    reader = blockmap.MapReader(repository, image)
    kinds: dict[int, list[tuple[int, int]]] = {DATA: [], ZERO: [], UNUSED: []}
    for kind, start, end in _runs(reader):
        kinds.setdefault(kind, []).append((start, end))
    found = {
        kind: Extents.of(ranges).scale(image.block_size).clip(image.size) for kind, ranges in kinds.items()
    }
    changed = None
    if base is not None and base.block_size == image.block_size:
        earlier = blockmap.MapReader(repository, base)
        changed = Extents.of(blockmap.diff(earlier, reader)).scale(image.block_size).clip(image.size)
    lost = Extents.of((start, start + length) for start, length in image.unreadable)
    return Occupied(found[DATA], found[ZERO], found[UNUSED], lost, changed)


def _runs(reader: Any) -> Iterator[tuple[int, int, int]]:
    for first, count, part in reader.walk():
        if isinstance(part, int):
            yield part, first, first + count
        else:
            for kind, start, end in part.runs():
                yield kind, first + start, first + end


def picture(repository: Repository, manifest: Manifest, images: Sequence[Image]) -> str:
    """Some disks of a set as SVG. Raises `DamagedPage` where a block map cannot be read."""
    from imager.engine.picture import Disk, draw

    body = manifest.content
    base = base_images(repository, body.base)
    disks = []
    for image in images:
        earlier = next((one for one in base if one.disk == image.disk), None)
        words = f"set {body.base[:8]}" if earlier is not None and body.base else None
        disks.append(Disk(image.disk, image.size, read(image), occupied(repository, image, earlier), words))
    taken = format_time(body.started / 1e6)
    return draw(f"{body.name} on {body.host}", f"image set {manifest.id}, {body.strategy}, {taken}", disks)


def base_images(repository: Repository, base: str | None) -> Sequence[Image]:
    """The disks of the base set; none where it is gone: sets are whole without their base."""
    from imager.errors import IntegrityError
    from imager.repository import imageset
    from imager.storage.errors import NotFound

    try:
        return imageset.read_set(repository, base).images if base else ()
    except (NotFound, IntegrityError, imageset.NoSuchSet):
        return ()


def save(path: str, text: str) -> None:
    """Write a picture to a file, which is replaced. Raises `TargetError`."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise TargetError(f"cannot write {path}: {error.strerror}") from error
