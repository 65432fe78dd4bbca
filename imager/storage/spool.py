"""Files without a name that stand in for objects of a far storage, on their way there and back.

Invariant: what is kept here is bounded and dies with the process: a spooled
file has no name from its first byte on. Bytes that could not be fetched are an
error, never a hole that reads as zeroes.

For the author of a far storage (an object store, ssh): give a `Spool` two
functions, and `stage` and `open` of `Storage` are done:

    class SshStorage:
        local = False

        def __init__(self, ...):
            self._spool = Spool(self._upload, self.read)

        def _upload(self, name: str, fd: int, size: int) -> None:
            # Make the object `name` of the `size` bytes of `fd` (read them with os.pread, a piece
            # at a time, or `mapped(fd, size)`), durable and create-only. Raises `AlreadyExists`,
            # `Unavailable` where the same call may succeed later, `StorageError`.

        def stage(self) -> Staged:
            return self._spool.stage()

        def open(self, name: str) -> int:
            return self._spool.copy(name, self.size(name))  # many `read`s at once

`read(name, offset, length)` must be safe to call from 16 threads at once.
`run_all` is there for other calls that are worth making at once; do not call it,
or `copy`, from a function that it runs. The folder is `IMAGER_SPOOL_DIR`,
`TMPDIR`, or /var/tmp.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from imager.storage.errors import StorageError, Unavailable

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor
    from mmap import mmap

T = TypeVar("T")

IN_FLIGHT = 16
"Small calls under way at once."
PIECE = 4 << 20
"Bytes that one read asks for."
UPLOADS = 160 << 20
"Bytes of uploads under way at once, in all storages of the process."

_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)


# --- files ---------------------------------------------------------------------------


def folder() -> str:
    """Where spooled files lie."""
    for name in ("IMAGER_SPOOL_DIR", "TMPDIR"):
        given = os.environ.get(name)
        if given:
            return given
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else "/tmp"


def temporary() -> int:
    """A new file without a name, to read and write; the caller's to close. Raises `StorageError`."""
    place = folder()
    try:
        try:
            return os.open(place, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        path = f"{place}/imager-{os.getpid()}-{os.urandom(8).hex()}"
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        os.unlink(path)
        return fd
    except OSError as error:
        raise refused(error) from error


def refused(error: OSError) -> StorageError:
    """What to raise where a spooled file cannot be made or written."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    return StorageError(
        f"a temporary file in {folder()} failed: {reason}",
        hint="set IMAGER_SPOOL_DIR to a folder with some hundreds of MiB of free space",
    )


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` into a spooled file. Raises `StorageError`."""
    view = memoryview(data)
    try:
        while view:
            count = os.pwrite(fd, view, offset)
            view, offset = view[count:], offset + count
    except OSError as error:
        raise refused(error) from error


@contextmanager
def mapped(fd: int, size: int) -> Iterator[mmap | bytes]:
    """The bytes of a spooled file as one buffer, without a copy in memory."""
    if fd < 0:
        raise ValueError("the staged bytes are discarded")  # mmap would make zeroes of it.
    if not size:
        yield b""
        return
    import mmap

    buffer = mmap.mmap(fd, size, prot=mmap.PROT_READ)
    try:
        yield buffer
    finally:
        try:
            buffer.close()
        except BufferError:
            pass  # A call that was broken off still looks at it; it goes when that lets go.


# --- many calls at once ------------------------------------------------------------------

_lock = threading.Lock()
_threads: ThreadPoolExecutor | None = None


def threads() -> ThreadPoolExecutor:
    """The threads of all far storages of this process: `IN_FLIGHT` calls are under way at once."""
    global _threads
    from concurrent.futures import ThreadPoolExecutor

    with _lock:
        if _threads is None:
            _threads = ThreadPoolExecutor(IN_FLIGHT, "far")
        return _threads


def run_all(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Run the jobs at once: their results in order. Raises what the first failing one raised.

    None runs any longer when this ends.
    """
    futures: list[Future[T]] = [threads().submit(job) for job in jobs]
    try:
        return [future.result() for future in futures]
    except BaseException:
        settle(futures)
        raise


def settle(futures: Sequence[Future[T]]) -> None:
    """Call off what has not begun, and wait for what has."""
    from concurrent.futures import wait

    for future in futures:
        future.cancel()
    wait(futures)


class Budget:
    """So many bytes may be under way at once; one that is larger than all goes alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def spend(self, size: int) -> Iterator[None]:
        """Wait until `size` bytes are free, and hold them."""
        with self._changed:
            while self._used and self._used + size > self._size:
                self._changed.wait()
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


_uploads = Budget(UPLOADS)


# --- what a far storage needs --------------------------------------------------------------


class SpooledStage:
    """An object that is written to a spooled file first. See `Staged`."""

    __slots__ = ("_upload", "fd")

    def __init__(self, upload: Callable[[str, int, int], None]) -> None:
        self._upload = upload
        self.fd = temporary()

    def publish(self, name: str) -> None:
        """Upload the bytes as `name`. See `Staged.publish`."""
        try:
            size = os.fstat(self.fd).st_size
            with _uploads.spend(size):
                self._upload(name, self.fd, size)
        except Unavailable:
            raise
        except BaseException:
            self.discard()
            raise
        self.discard()

    def discard(self) -> None:
        """Forget the bytes. See `Staged.discard`."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Spool:
    """`stage` and whole copies for a far storage; see this module's page."""

    def __init__(
        self, upload: Callable[[str, int, int], None], read: Callable[[str, int, int], bytes]
    ) -> None:
        self._upload = upload
        self._read = read

    @classmethod
    def reading(cls, read: Callable[[str, int, int], bytes]) -> Spool:
        """One for `copy` alone."""

        def upload(name: str, fd: int, size: int) -> None:
            raise ValueError("this spool only reads")

        return cls(upload, read)

    def stage(self) -> SpooledStage:
        """Begin an object. Raises `StorageError`."""
        return SpooledStage(self._upload)

    def copy(self, name: str, size: int) -> int:
        """A descriptor of a copy of the object, the caller's to close. Raises `NotFound`, `StorageError`."""
        fd = temporary()
        try:
            cuts = [(start, min(PIECE, size - start)) for start in range(0, size, PIECE)]
            run_all([lambda cut=cut: self._piece(name, fd, *cut) for cut in cuts])  # type: ignore[misc]
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _piece(self, name: str, fd: int, offset: int, length: int) -> None:
        data = self._read(name, offset, length)
        if len(data) != length:
            raise StorageError(f"reading {name} failed: it ends earlier than the storage said")
        write_at(fd, data, offset)
