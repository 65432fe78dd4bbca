"""Index segments as objects: their names, and descriptors of them to search in.

Invariant: of a far storage's segments what is kept on this machine was, when it was put there, what
its name says. It is a cache: losing it costs time, and it is never the reason for an error.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from imager import _native, config
from imager.errors import IntegrityError
from imager.repository.format import INDEX, is_pack_name
from imager.repository.packs import PackAccess
from imager.storage.base import Storage
from imager.storage.errors import NotFound, StorageError

CACHE_LIMIT = 16 << 30
"Bytes of one repository's segments that are kept on this machine: those of half a billion blocks."
_CHUNK = 1 << 20
_HEADER, _PAGE = struct.Struct("<8sHHIQQ16sQQQ"), 4096
_CONTEXT = b"imager index v1"


def segment_name(data: bytes) -> str:
    """Object name of an index segment."""
    return INDEX + _native.blake3(_CONTEXT + data).hex()


def segment_names(repository: PackAccess) -> list[str]:
    """Object names of all index segments. Raises `StorageError`."""
    return [name for name in repository.storage.list_names(INDEX) if is_pack_name(name.removeprefix(INDEX))]


def cache_of(repository: PackAccess) -> SegmentCache | None:
    """Where this machine keeps the segments of a storage that is far; None for one that is not."""
    return None if getattr(repository.storage, "local", True) else SegmentCache(repository.id)


def is_whole(fd: int, name: str) -> bool:
    """Whether a segment is the one its name says. Reads all of it; raises OSError."""
    import blake3

    digest, at = blake3.blake3(_CONTEXT), 0
    while chunk := os.pread(fd, _CHUNK, at):
        at += len(chunk)
        digest.update(chunk)
    return bool(digest.hexdigest() == name.removeprefix(INDEX))


def _names_in(repository: PackAccess, segment: str) -> list[bytes]:
    """The packs that a segment names. Raises `IntegrityError`, `NotFound`, `StorageError`."""
    header = repository.storage.read(segment, 0, _HEADER.size)
    what = f"index segment {segment.removeprefix(INDEX)}"
    if len(header) < _HEADER.size or _native.xxh3(header[:-8]) != int.from_bytes(header[-8:], "little"):
        raise IntegrityError(f"{what} is damaged: its header is")
    magic, _, _, count, *_ = _HEADER.unpack(header)
    listed = repository.storage.read(segment, _PAGE, 32 * count + 8)
    names, check = listed[:-8], listed[-8:]
    if (
        magic != b"IMGRINDX"
        or len(names) != 32 * count
        or _native.xxh3(names) != int.from_bytes(check, "little")
    ):
        raise IntegrityError(f"{what} is damaged: its list of packs is")
    return [names[at : at + 32] for at in range(0, len(names), 32)]


def packs_named(repository: PackAccess) -> frozenset[bytes]:
    """The packs that index segments name. Damaged segments are left out. Raises `StorageError`."""
    found: set[bytes] = set()
    for segment in segment_names(repository):
        try:
            found.update(_names_in(repository, segment))
        except (IntegrityError, NotFound):
            continue
    return frozenset(found)


class SegmentCache:
    """Segments of one repository, in the cache folder of this machine, under their own names."""

    def __init__(self, repository: bytes, limit: int = CACHE_LIMIT) -> None:
        self._folder = os.path.join(config.cache_dir(), repository.hex(), "index")
        self._limit = limit

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name.removeprefix(INDEX))

    def get(self, name: str) -> int | None:
        """A descriptor of a segment that is kept here, the caller's to close; None if it is not."""
        try:
            return os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None

    def fetch(self, storage: Storage, name: str) -> int:
        """Get a segment from the storage, keep it if there is room; a descriptor, the caller's to close.

        Raises `IntegrityError` where it is not what its name says, `NotFound`, `StorageError`.
        """
        fd = storage.open(name)
        try:
            self.keep(fd, name)
            return fd
        except OSError as error:
            os.close(fd)
            raise StorageError(f"reading {name} failed: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise

    def keep(self, fd: int, name: str) -> None:
        """Copy a segment here if there is room for it. Raises `IntegrityError` where it is not what its
        name says, OSError where it cannot be read."""
        import blake3

        digest = blake3.blake3(_CONTEXT)
        staged = f"{self._path(name)}.{os.getpid()}"
        out = self._create(staged, os.fstat(fd).st_size)
        try:
            at = 0
            while chunk := os.pread(fd, _CHUNK, at):
                at += len(chunk)
                digest.update(chunk)
                if out is not None and not _written(out, chunk):
                    os.close(out)
                    out = None
            if digest.hexdigest() != name.removeprefix(INDEX):
                raise IntegrityError(f"{name} is not the one its name says: damaged or swapped")
            if out is not None:
                _publish(out, staged, self._path(name))
        finally:
            if out is not None:
                os.close(out)
            _unlink(staged)

    def put(self, data: bytes, name: str) -> None:
        """Keep a segment that this process has made, if there is room for it."""
        staged = f"{self._path(name)}.{os.getpid()}"
        out = self._create(staged, len(data))
        if out is None:
            return
        try:
            if _written(out, data):
                _publish(out, staged, self._path(name))
        finally:
            os.close(out)
            _unlink(staged)

    def _create(self, path: str, size: int) -> int | None:
        """A file to copy to; None where there is no room or the folder cannot be written."""
        try:
            os.makedirs(self._folder, 0o700, exist_ok=True)
            used = sum(entry.stat().st_size for entry in os.scandir(self._folder))
            if used + size > self._limit:
                return None
            return os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            return None  # A cache that cannot be kept costs time, nothing else.

    def drop(self, name: str) -> None:
        """Forget a segment."""
        _unlink(self._path(name))

    def keep_only(self, names: Iterable[str]) -> None:
        """Forget all but these: the storage has the others no longer."""
        try:
            there = os.listdir(self._folder)
        except OSError:
            return
        for other in {name[:64] for name in there} - {name.removeprefix(INDEX) for name in names}:
            if is_pack_name(other):
                self.drop(other)


def _written(fd: int, data: bytes) -> bool:
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError:
        return False
    return True


def _publish(fd: int, staged: str, path: str) -> None:
    try:
        os.fsync(fd)  # or a crash could leave a name for bytes that never came to the disk
        os.replace(staged, path)
    except OSError:
        pass


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
