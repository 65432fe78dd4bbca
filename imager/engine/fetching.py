"""Getting blocks out of packs, in pack order, a slice at a time.

Invariant: a block that cannot be had intact is named by its place in the
image and is never written; the rest of its slice is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

from imager._native import Failure, Gather, Slots, fetch
from imager.engine.compare import Geometry
from imager.errors import IntegrityError, StorageError
from imager.events import Reporter
from imager.extents import Extents
from imager.repository.format import DAMAGED, KIND_DATA, pack_object
from imager.repository.locator import fetch_elsewhere
from imager.repository.repository import Repository
from imager.storage.errors import Gone
from imager.units import MIB

SLICE_BYTES = 96 * MIB
"Image bytes between two reports of progress."
Readers = dict[int, tuple[int, Sequence[int | None]]]
_PACKS = 256
"Packs of one slice: each is an open descriptor."


class Damage(Struct, frozen=True):
    """A part of a disk that the repository cannot give back. `start` and `length` in bytes."""

    disk: str
    start: int
    length: int
    reason: str
    pack: str | None = None


def gather_of(pieces: Iterable[tuple[int, Slots]], within: Extents | None = None) -> Gather:
    """The data blocks of `pieces` (first block, slots), in pack order; only those of `within` where given."""
    gather = Gather()
    for first, slots in pieces:
        if within is None:
            gather.add(first, slots)
        else:
            gather.add_ranges(first, slots, (within & Extents(((first, first + len(slots)),))).ranges)
    gather.sort()
    return gather


class Fetcher:
    """Fetches gathered blocks of one image, to a target or for their check alone."""

    def __init__(
        self,
        repository: Repository,
        disk: str,
        geometry: Geometry,
        reporter: Reporter,
        *,
        target: int | None = None,
        threads: int = 0,
    ) -> None:
        self._repository = repository
        self._disk = disk
        self._geometry = geometry
        self._reporter = reporter
        self._target = target
        self._threads = threads
        self._quiet = False
        self.moved = 0
        "Blocks that were not whole where the map says though their pack is there, and were found elsewhere."

    def slices(self, gather: Gather, *, quiet: bool = False) -> Iterator[list[Damage]]:
        """Fetch a slice each time; yields what was damaged in it. Raises `WriteError`, `StorageError`.

        `quiet`: the reporter has been told of these bytes already.
        """
        self._quiet = quiet
        for failures, reasons in self._passes(gather):
            if failures:
                failures = self._elsewhere(failures)
            yield [damage for failure in failures for damage in self._damage(failure, reasons)]

    def _passes(self, gather: Gather) -> Iterator[tuple[list[Failure], dict[int, str]]]:
        """Slice by slice: what failed, and why packs that failed altogether did."""
        if self._repository.storage.local:
            for start, end in self._cuts(gather):
                yield self._attempt(gather, start, end)
            return
        from imager.repository import ahead

        cuts = ahead.cuts(gather, self._geometry.block_size)
        with ahead.slices(self._repository, gather, cuts) as coming:
            for one in coming:
                yield self._fetch(gather, one.start, one.end, one.readers), one.reasons

    def _cuts(self, gather: Gather) -> Iterator[tuple[int, int]]:
        """Slices of bounded size, out of not too many packs."""
        most = max(1, SLICE_BYTES // self._geometry.block_size)
        start, total = 0, len(gather)
        while start < total:
            end = gather.slice_end(start, most)
            while len(gather.packs(start, end)) > _PACKS and end > start + 1:
                end = start + (end - start) // 2
            yield start, end
            start = end

    def _attempt(self, gather: Gather, start: int, end: int) -> tuple[list[Failure], dict[int, str]]:
        """What failed, and why packs that failed altogether did."""
        packs = gather.packs(start, end)
        reasons: dict[int, str] = {}
        try:
            with self._repository.packs(packs) as readers:
                return self._fetch(gather, start, end, {**readers}), reasons
        except Gone:
            raise
        except (IntegrityError, StorageError):
            whole = [pack for pack in packs if not self._broken(pack, reasons)]
            with self._repository.packs(whole) as readers:
                return self._fetch(gather, start, end, {**readers}), reasons

    def _elsewhere(self, failures: list[Failure]) -> list[Failure]:
        """A place is a hint, the id is the truth: ask for other records of the same ids."""
        found, left = fetch_elsewhere(
            self._repository.locator,
            failures,
            lambda gather: [failure for again, _ in self._passes(gather) for failure in again],
        )
        # Where a pack is gone, prune has moved what lived; where it is not, something is wrong.
        there = {pack for pack in {one.pack for one in found} if not self._is_gone(pack)}
        self.moved += sum(len(one.blocks) for one in found if one.pack in there)
        return left

    def _is_gone(self, pack: int) -> bool:
        name = self._repository.names.name(pack)
        return name is not None and not any(
            self._repository.storage.exists(prefix + pack_object(KIND_DATA, name)) for prefix in ("", DAMAGED)
        )

    def _fetch(self, gather: Gather, start: int, end: int, readers: Readers) -> list[Failure]:
        done, failures = fetch(
            self._repository.vault,
            readers,
            gather,
            start,
            end,
            image_size=self._geometry.size,
            block_size=self._geometry.block_size,
            target=self._target,
            threads=self._threads,
        )
        if not self._quiet:
            self._reporter.advance(done)
        return failures

    def _broken(self, pack: int, reasons: dict[int, str]) -> bool:
        """Whether a pack cannot be opened at all; why, goes into `reasons`."""
        try:
            self._repository.pack_reader(pack)
            return False
        except Gone:
            raise
        except (IntegrityError, StorageError) as error:
            reasons[pack] = error.message
            return True

    def _damage(self, failure: Failure, reasons: dict[int, str]) -> Iterator[Damage]:
        name = self._repository.names.name(failure.pack)
        blocks = Extents.of((block, block + 1) for block in failure.blocks)
        for start, end in self._geometry.extents(blocks):
            reason = reasons.get(failure.pack, failure.reason)
            yield Damage(self._disk, start, end - start, reason, name.hex() if name else None)


def merged(damage: Iterable[Damage]) -> tuple[Damage, ...]:
    """By disk and place, neighbours of one reason and pack joined."""
    out: list[Damage] = []
    for one in sorted(damage, key=lambda one: (one.disk, one.start)):
        last = out[-1] if out else None
        alike = last and (last.disk, last.reason, last.pack) == (one.disk, one.reason, one.pack)
        if last and alike and last.start + last.length >= one.start:
            length = max(last.length, one.start + one.length - last.start)
            out[-1] = Damage(one.disk, last.start, length, one.reason, one.pack)
        else:
            out.append(one)
    return tuple(out)
