"""From damaged packs back to the sets, disks and bytes that they cost.

Invariant: bytes are named as hurt only if the blocks there were tried and
could not be had intact, in their place or elsewhere by their id, or their map
page is bad; what a damaged pack still gives back whole is not.
"""

from __future__ import annotations

from collections import defaultdict

from imager import _native
from imager._native import DATA, ZERO, Failure, Gather, Slots
from imager.errors import IntegrityError
from imager.extents import Extents
from imager.repository.findings import Hurt, Survey
from imager.repository.locator import fetch_elsewhere
from imager.repository.manifest import Image, Manifest
from imager.repository.pages import BadPage, pages
from imager.repository.repository import Reader, Repository
from imager.storage.errors import Gone, StorageError

_BATCH = 1 << 16
"Slots that are tried together."
_SLICE = 64 << 20

Blocks = dict[int, list[tuple[int, int]]]
"Pack -> ranges of blocks of one image that are lost with it."


def hurt_by_pack(found: Survey) -> dict[int, list[Hurt]]:
    """What each bad pack, or pack set aside, costs; walks the maps of all sets. Raises `StorageError`."""
    costs: dict[int, list[Hurt]] = defaultdict(list)
    doubtful = set(found.bad) | found.aside
    if not doubtful:
        return costs
    found.reporter.phase("tracing the damage", None)
    for manifest in found.listing.sets:
        if manifest.body is None:
            continue  # A key that cannot read it traces nothing; the survey said so.
        for image in manifest.images:
            for pack, ranges in _lost(found, image, doubtful).items():
                costs[pack].append(_hurt(manifest, image, ranges))
    found.reporter.end()
    return costs


def _hurt(manifest: Manifest, image: Image, ranges: list[tuple[int, int]]) -> Hurt:
    extents = Extents.of(ranges).scale(image.block_size).clip(image.size)
    return Hurt(manifest.id, manifest.name, image.disk, tuple((start, end - start) for start, end in extents))


def _lost(found: Survey, image: Image, doubtful: set[int]) -> Blocks:
    lost: Blocks = defaultdict(list)
    gather, waiting = Gather(), 0
    for page in pages(found.repository, image):
        if isinstance(page, BadPage):
            lost[page.pack].append((page.first, page.first + page.count))
        elif page.level == 0 and not doubtful.isdisjoint(page.slots.packs()):
            part = _part(page.slots, doubtful)
            gather.add(page.first, part)
            waiting += len(part)
            if waiting >= _BATCH:
                _try(found, image, gather, lost)
                gather, waiting = Gather(), 0
    if waiting:
        _try(found, image, gather, lost)
    return lost


def _part(slots: Slots, doubtful: set[int]) -> Slots:
    """The slots whose records lie in doubtful packs; the others are made zero."""
    part = slots.copy()
    for at in range(len(part)):
        kind, _, pack, _, _ = part.get(at)
        if kind == DATA and pack not in doubtful:
            part.fill(at, at + 1, ZERO)
    return part


def _try(found: Survey, image: Image, gather: Gather, lost: Blocks) -> None:
    """Fetch the gathered records; the blocks of those that fail go into `lost`."""
    gather.sort()
    failures = _failures(found.repository, image, gather)
    if not failures:
        return
    # A place is a hint, the id is the truth: it may have been stored again, or moved.
    _, left = fetch_elsewhere(
        found.repository.locator, failures, lambda again: _failures(found.repository, image, again)
    )
    for failure in left:
        lost[failure.pack] += [(block, block + 1) for block in failure.blocks]


def _failures(repository: Repository, image: Image, gather: Gather) -> list[Failure]:
    """The gathered records that cannot be had from where they are said to be."""
    found: list[Failure] = []
    start = 0
    while start < len(gather):
        end = gather.slice_end(start, max(1, _SLICE // image.block_size))
        readers: dict[int, Reader] = {}
        for number in gather.packs(start, end):
            try:
                readers[number] = repository.pack_reader(number)
            except Gone:
                raise
            except (IntegrityError, StorageError):
                continue  # Not to be opened: every record in it fails.
        _, failures = _native.fetch(
            repository.vault,
            readers,
            gather,
            start,
            end,
            image_size=image.size,
            block_size=image.block_size,
        )
        found += failures
        start = end
    return found
