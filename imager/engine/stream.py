"""An image as a stream: its bytes in order, out of the packs.

Invariant: bytes are handed on only after their block's id was checked; a
damaged block ends the stream before its first byte.
"""

from __future__ import annotations

import errno
import os
import sys
import time

from msgspec import Struct

from imager.engine import images
from imager.engine.fetching import Fetcher, gather_of, merged
from imager.engine.images import Image
from imager.engine.windows import pieces
from imager.errors import IntegrityError, TargetError
from imager.events import Reporter, Silent
from imager.extents import Extents
from imager.repository.repository import Repository
from imager.units import MIB

_NO_SENDFILE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # a target opened to append, for one
STEP = 64 * MIB
"Bytes of image that are fetched before they are handed on."


class Streamer:
    """A file in memory that holds one span of an image at its own offsets."""

    def __init__(self, image: Image, *, threads: int = 0, reporter: Reporter | None = None) -> None:
        self._image = image
        self.fd = os.memfd_create("imager")
        self._fetcher = Fetcher(
            image.repository,
            image.disk,
            image.geometry,
            reporter or Silent(),
            target=self.fd,
            threads=threads,
        )

    def fill(self, start: int, end: int) -> None:
        """Hold exactly the blocks that `[start, end)` touches. Raises `IntegrityError`."""
        os.ftruncate(self.fd, 0)
        os.ftruncate(self.fd, end)
        wanted = Extents.of([(start, end)]).blocks(self._image.geometry.block_size)
        for window in self._image.part(wanted):
            for damage in self._fetcher.slices(gather_of(pieces(window), wanted)):
                if damage:
                    first = merged(damage)[0]
                    raise IntegrityError(
                        f"stored blocks of {first.disk} are damaged: {first.length} bytes at {first.start}:"
                        f" {first.reason} (pack {first.pack}); the stream ends at byte {start}",
                        hint="imager verify names all that is damaged; choose another set",
                    )
        # The last block may have made the file longer, or a run of zeroes left it shorter.
        os.ftruncate(self.fd, end)

    def close(self) -> None:
        os.close(self.fd)


class StreamSummary(Struct, frozen=True):
    """What was handed on, in bytes. A stream cannot be read back: `verified` is False."""

    set: str
    name: str
    disk: str
    target: str
    size: int
    bytes_written: int
    verified: bool
    seconds: float
    unreadable: tuple[tuple[int, int], ...]


def stream(
    repository: Repository,
    text: str,
    reporter: Reporter,
    *,
    disk: str | None = None,
    out: int | None = None,
    threads: int = 0,
) -> StreamSummary:
    """Write `SET` or `SET:DISK` to the descriptor `out` (standard output), in order.

    Every block is checked before it is written; the reader at the other end is
    not read back. Raises `IntegrityError`, `TargetError` (a closed pipe is
    `BrokenPipeError`, as for any filter), and what resolving raises.
    """
    begun = time.monotonic()
    image = images.select_one(repository, text, disk)
    images.tell_of_rollback(repository, reporter)
    size = image.geometry.size
    target = sys.stdout.fileno() if out is None else out
    reporter.phase("writing", size)
    streamer = Streamer(image, threads=threads)
    try:
        for start in range(0, size, STEP):
            end = min(start + STEP, size)
            streamer.fill(start, end)
            _send(target, streamer.fd, start, end)
            reporter.advance(end - start)
    finally:
        streamer.close()
    reporter.end()
    return StreamSummary(
        set=image.manifest.id,
        name=image.manifest.name,
        disk=image.disk,
        target="-",
        size=size,
        bytes_written=size,
        verified=False,
        seconds=round(time.monotonic() - begun, 3),
        unreadable=image.unreadable,
    )


def _send(target: int, source: int, start: int, end: int) -> None:
    try:
        while start < end:
            try:
                count = os.sendfile(target, source, start, end - start)
            except OSError as error:
                if isinstance(error, BrokenPipeError) or error.errno not in _NO_SENDFILE:
                    raise
                count = os.write(target, os.pread(source, min(MIB, end - start), start))
            if count == 0:
                raise TargetError(f"the stream takes no more at byte {start}")
            start += count
    except BrokenPipeError:
        raise
    except OSError as error:
        raise TargetError(f"the stream cannot be written at byte {start}: {error.strerror}") from error
