"""Records of far packs, fetched a few slices ahead of whoever decodes them.

Invariant: the native core reads only what was fetched. Each pack of a slice is
a file in memory that holds the spans which the slice needs, at their own places; a
slice is handed out after all of its spans have come, and one that did not come
is an error or, where the pack itself is missing, a pack that is not there. What
is held at once is bounded by bytes, and freed slice by slice.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from msgspec import Struct, field

from imager._native import Gather
from imager.errors import IntegrityError
from imager.repository.packs import Located, PackAccess, Reader
from imager.storage import spool
from imager.storage.errors import Gone, NotFound, StorageError, Unavailable

SLICE = 24 << 20
"Image bytes of one slice."
AHEAD = 72 << 20
"Bytes of packs that are held or under way before another slice is begun."
_MOST = 4 * SLICE
"Bytes of packs that one slice may come to, with what is fetched along."
_PACKS = 64
"Packs of one slice: each is an open file."
_SLICES = 6
_GAP = 1 << 20
"Unwanted bytes that are rather fetched than left out by another call."


class _Pack(Struct):
    """One pack of a slice."""

    number: int
    fd: int
    located: Future[Located]
    pieces: list[Future[None]] = field(default_factory=list)


class Slice(Struct):
    """Records [start, end) of a gather, and the packs to read them from.

    `readers`: as `_native.fetch` wants them; `reasons`: why others are not among them.
    """

    start: int
    end: int
    size: int
    packs: list[_Pack]
    readers: dict[int, Reader] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)


def cuts(gather: Gather, block_size: int) -> Iterator[tuple[int, int]]:
    """A gather in slices that are bounded in every way: image bytes, packs, bytes of them."""
    most = max(1, SLICE // block_size)
    start, total = 0, len(gather)
    while start < total:
        end = gather.slice_end(start, most)
        while end > start + 1 and not _fits(gather, start, end):
            end = start + (end - start) // 2
        yield start, end
        start = end


def _fits(gather: Gather, start: int, end: int) -> bool:
    if len(gather.packs(start, end)) > _PACKS:
        return False
    return sum(high - low for _, low, high in gather.spans(start, end, _GAP)) <= _MOST


@contextmanager
def slices(access: PackAccess, gather: Gather, cuts: Iterable[tuple[int, int]]) -> Iterator[Iterator[Slice]]:
    """The slices of `cuts`, in order, each good until the next one is asked for.

    Raises `Unavailable` and `Gone` where the storage does not answer, `WrongKey`.
    """
    ahead = _Ahead(access, gather, iter(cuts))
    try:
        yield ahead.all()
    finally:
        ahead.close()


class _Ahead:
    def __init__(self, access: PackAccess, gather: Gather, cuts: Iterator[tuple[int, int]]) -> None:
        self._access = access
        self._gather = gather
        self._cuts = cuts
        self._coming: deque[Slice] = deque()
        self._held = 0

    def all(self) -> Iterator[Slice]:
        while True:
            while len(self._coming) < _SLICES and (not self._coming or self._held < AHEAD):
                cut = next(self._cuts, None)
                if cut is None:
                    break
                self._begin(*cut)
            if not self._coming:
                return
            present = self._coming[0]
            self._wait(present)
            yield present
            self._coming.popleft()
            self._release(present)

    def _begin(self, start: int, end: int) -> None:
        """Ask for all that the slice needs."""
        made = Slice(start, end, 0, [])
        self._coming.append(made)
        pool = spool.threads()
        for number, low, high in self._gather.spans(start, end, _GAP):
            if not made.packs or made.packs[-1].number != number:
                fd = os.memfd_create("imager-pack")
                located = pool.submit(self._access.locate, number)
                made.packs.append(_Pack(number, fd, located))
            pack = made.packs[-1]
            for at in range(low, high, spool.PIECE):
                length = min(spool.PIECE, high - at)
                pack.pieces.append(pool.submit(self._piece, pack.located, pack.fd, at, length))
            made.size += high - low
        self._held += made.size

    def _piece(self, located: Future[Located], fd: int, offset: int, length: int) -> None:
        # It was asked for first, by the same threads: it is done, or under way.
        name = located.result().name
        # Where the pack ends before, so does the file: its records then fail as cut short.
        spool.write_at(fd, self._access.storage.read(name, offset, length), offset)

    def _wait(self, present: Slice) -> None:
        for pack in present.packs:
            try:
                located = pack.located.result()
                for piece in pack.pieces:
                    piece.result()
            except (Gone, Unavailable):
                raise
            except NotFound:
                present.reasons[pack.number] = f"{self._access.pack_label(pack.number)} is missing"
            except (IntegrityError, StorageError) as error:
                present.reasons[pack.number] = error.message
            else:
                self._access.require_key(pack.number, located.keys)
                present.readers[pack.number] = (pack.fd, located.keys)

    def _release(self, done: Slice) -> None:
        for pack in done.packs:
            spool.settle([pack.located])
            spool.settle(pack.pieces)
            os.close(pack.fd)
        self._held -= done.size

    def close(self) -> None:
        """Call off what is under way."""
        coming = [*self._coming]
        self._coming.clear()
        for one in coming:
            for pack in one.packs:
                for piece in pack.pieces:
                    piece.cancel()
        for one in coming:
            self._release(one)
