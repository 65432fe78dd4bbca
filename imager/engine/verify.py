"""Verify: read, decrypt, decode and hash every block of a set.

Invariant: every record that the set's maps name is fetched and checked once
for each window that it is in; what fails, and what a damaged map page hides,
is named by its bytes on the disk. `ok` means that nothing failed.
"""

from __future__ import annotations

import os
import time

from msgspec import Struct

from imager.engine import images, verified
from imager.engine.compare import Comparer, Readable, open_readable
from imager.engine.fetching import Damage, Fetcher, gather_of, merged
from imager.engine.images import Image
from imager.engine.windows import pieces
from imager.errors import UsageError
from imager.events import Reporter
from imager.extents import Extents
from imager.repository.repository import Repository


class VerifySummary(Struct, frozen=True):
    """What a verification found; sizes in bytes.

    `blocks` hold data, `bytes` is what they hold, `stored` what was read for
    it. `unused`: what was not in use, has no content, and is not compared.
    `unreadable`: (disk, start, length) that the backup could not read.
    `differing`: (disk, start, length) where the device compared with differs.
    """

    set: str
    name: str
    disks: tuple[str, ...]
    blocks: int
    bytes: int
    stored: int
    unused: int
    ok: bool
    damage: tuple[Damage, ...]
    damaged_bytes: int
    unreadable: tuple[tuple[str, int, int], ...]
    against: str | None
    differing: tuple[tuple[str, int, int], ...]
    seconds: float


def verify(
    repository: Repository, text: str, reporter: Reporter, *, against: str | None = None, threads: int = 0
) -> VerifySummary:
    """Verify `SET` or `SET:DISK`; with `against`, also compare a device or file with it.

    Damage and differences are in the summary, not raised. The time and result
    are kept for `show` and `list` where the whole set was read. Raises
    `UsageError`, `SourceError` (the device), `StorageError`, and what
    resolving the set raises.
    """
    begun = time.monotonic()
    chosen = images.select(repository, text)
    images.tell_of_rollback(repository, reporter)
    if against is not None and len(chosen) != 1:
        names = ", ".join(image.disk for image in chosen)
        raise UsageError(
            f"{text} holds {len(chosen)} disks: {names}", hint="name the one to compare: SET:DISK"
        )
    work = _Work(repository, reporter, threads)
    device = open_readable(against) if against is not None else None
    try:
        for image in chosen:
            work.image(image)
        differing = work.compare(chosen[0], device) if device is not None else Extents()
    finally:
        if device is not None:
            os.close(device.fd)
    damage = merged(work.damage)
    damaged = sum(one.length for one in damage)
    manifest = chosen[0].manifest
    if len(chosen) == len(manifest.images):
        verified.record(
            repository.place, manifest.id, ok=not damage, size=work.bytes, damaged=damaged, against=against
        )
    return VerifySummary(
        set=manifest.id,
        name=manifest.name,
        disks=tuple(image.disk for image in chosen),
        blocks=work.blocks,
        bytes=work.bytes,
        stored=work.stored,
        unused=work.unused,
        ok=not damage and not differing,
        damage=damage,
        damaged_bytes=damaged,
        unreadable=tuple(
            (image.disk, start, length) for image in chosen for start, length in image.unreadable
        ),
        against=against,
        differing=tuple((chosen[0].disk, start, end - start) for start, end in differing),
        seconds=round(time.monotonic() - begun, 3),
    )


class _Work:
    """Sums and damage of one verification."""

    def __init__(self, repository: Repository, reporter: Reporter, threads: int) -> None:
        self.repository = repository
        self.reporter = reporter
        self.threads = threads
        self.blocks = 0
        self.bytes = 0
        self.stored = 0
        self.unused = 0
        self.damage: list[Damage] = []

    def image(self, image: Image) -> None:
        geometry = image.geometry
        pages: list[Damage] = []

        def lost(first: int, count: int, reason: str) -> None:
            start = first * geometry.block_size
            pages.append(Damage(image.disk, start, geometry.length(first, first + count), reason))

        data, unused = image.totals(lost)
        self.unused += unused
        pages.clear()
        self.reporter.phase(f"verifying {image.disk}", data)
        fetcher = Fetcher(self.repository, image.disk, geometry, self.reporter, threads=self.threads)
        for window in image.windows(lost):
            gather = gather_of(pieces(window))
            for damage in fetcher.slices(gather):
                self.damage += damage
            self.blocks += gather.blocks
            self.stored += gather.stored
        self.bytes += data
        self.damage += pages
        self.reporter.end()
        if fetcher.moved:
            where = f"not whole where the map of {image.disk} says, but elsewhere"
            self.reporter.warn(
                f"{fetcher.moved} blocks are {where}",
                hint="imager check --read-data names the damaged packs",
            )

    def compare(self, image: Image, device: Readable) -> Extents:
        """What of the image differs on the device, in bytes."""
        geometry = image.geometry
        whole = geometry.blocks if device.size >= geometry.size else device.size // geometry.block_size
        comparer = Comparer(self.repository.vault, geometry, device, self.reporter, self.threads)
        self.reporter.phase(f"comparing with {device.path}", geometry.length(0, whole))
        blocks: list[tuple[int, int]] = [(whole, geometry.blocks)]

        def lost(first: int, count: int, reason: str) -> None:
            blocks.append((first, first + count))

        for window in image.windows(lost):
            blocks += comparer.differing(window, Extents.of([(0, whole)]))
            self.reporter.advance(geometry.total(window.unused))
        self.reporter.end()
        if device.size > geometry.size:
            self.reporter.note(f"{device.path} is larger than the image: the rest was not compared")
        return geometry.extents(Extents.of(blocks))
