"""Copies of small objects of a far storage, kept on this machine.

Invariant: a copy is used only where it is whole (its digest says so) and where
the storage has shown the object in a listing since this process began, or
shown it to be there otherwise. Losing the cache, or any part of it, costs time.
What looks for damage in a repository does not use it.

Kept are manifests and map packs: what a backup reads of the sets before it. Most of them
this machine wrote itself. And condemnations, which may stay for long where a prune waits for somebody: one
that is gone by the time its copy is used only makes a writer store again what it could have had.
Index segments are kept by `imager.repository.segments`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator

from imager import _native, config
from imager.storage.base import Entry, Staged, Storage
from imager.storage.wrapper import Wrapper

ROOM = 1 << 30
"Bytes that the copies of one storage take at most; IMAGER_CACHE_SIZE says otherwise."
_SMALL = ("sets/", "condemned/")
_KINDS = (*_SMALL, "maps/")
_DIGEST = 32
_PIECE = 1 << 20


class Cached(Wrapper):
    """A storage of which copies are kept."""

    def __init__(self, inner: Storage, *, room: int | None = None) -> None:
        super().__init__(inner)
        place = _native.blake3(inner.url.encode(errors="surrogateescape")).hex()[:32]
        self._folder = os.path.join(config.cache_dir(), "objects", place)
        self._room = _room() if room is None else room
        self._listed: set[str] = set()
        self._open: dict[str, tuple[int, int]] = {}
        "Copies that were found whole: descriptor and size."
        self._lock = threading.Lock()

    # --- what is asked for ----------------------------------------------------------------

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Storage.read`."""
        if not name.startswith(_KINDS):
            return super().read(name, offset, length)
        found = self._copy(name)
        if found is not None:
            fd, size = found
            count = max(0, size - offset) if length is None else max(0, min(length, size - offset))
            data = os.pread(fd, count, offset)
            if len(data) == count:
                return data
        data = super().read(name, offset, length)
        if offset == 0 and (length is None or len(data) < length) and name.startswith(_SMALL):
            self._keep(name, [data])
        return data

    def open(self, name: str) -> int:
        """See `Storage.open`."""
        if not name.startswith(_KINDS):
            return super().open(name)
        found = self._copy(name)
        if found is None:
            fd = super().open(name)
            if _is_its_name(fd, name):  # A damaged one may be healed there, under this very name.
                self._keep(name, _pieces(fd))
            return fd
        fd, size = found
        # Without the digest at its end: whoever reads a file to its end gets the object.
        from imager.storage import spool

        copy = spool.temporary()
        at = 0
        while at < size:
            data = os.pread(fd, min(_PIECE, size - at), at)
            spool.write_at(copy, data, at)
            at += len(data)
        return copy

    def list_names(self, prefix: str) -> list[str]:
        """See `Storage.list_names`."""
        names = super().list_names(prefix)
        self._see(names)
        return names

    def list(self, prefix: str) -> Iterator[Entry]:
        """See `Storage.list`."""
        entries = [*super().list(prefix)]
        self._see([entry.name for entry in entries])
        return iter(entries)

    def _see(self, names: Iterable[str]) -> None:
        with self._lock:
            self._listed.update(name for name in names if name.startswith(_KINDS))

    # --- what is written --------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> None:
        """See `Storage.create`."""
        super().create(name, data)
        if name.startswith(_KINDS):
            self._keep(name, [data])
            self._see([name])

    def publish(self, staged: Staged, name: str) -> None:
        """See `Staged.publish`."""
        if not name.startswith(_KINDS):
            super().publish(staged, name)
            return
        fd = os.dup(staged.fd)
        try:
            super().publish(staged, name)
            self._keep(name, _pieces(fd))
            self._see([name])
        finally:
            os.close(fd)

    def _forget(self, name: str) -> None:
        with self._lock:
            self._listed.discard(name)
            fd, _ = self._open.pop(name, (-1, 0))
        if fd >= 0:
            os.close(fd)

    def delete(self, name: str) -> None:
        """See `Storage.delete`."""
        self._forget(name)
        super().delete(name)

    def move(self, name: str, target: str) -> None:
        """See `Storage.move`."""
        self._forget(name)
        super().move(name, target)

    def close(self) -> None:
        """See `Storage.close`."""
        with self._lock:
            for fd, _ in self._open.values():
                os.close(fd)
            self._open.clear()
        super().close()

    # --- the copies -----------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        return os.path.join(self._folder, name.replace("/", "_"))

    def _copy(self, name: str) -> tuple[int, int] | None:
        """(descriptor, size) of a whole copy, or None."""
        with self._lock:
            if name not in self._listed:
                return None
            if name in self._open:
                return self._open[name]
            try:
                fd = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return None
            size = os.fstat(fd).st_size - _DIGEST
            if size >= 0 and _digest(_pieces(fd, size)) == os.pread(fd, _DIGEST, size):
                self._open[name] = fd, size
                return fd, size
            os.close(fd)
        return None

    def _keep(self, name: str, pieces: Iterable[bytes]) -> None:
        """Keep a copy; where that cannot be, there is none."""
        path = self._path(name)
        staged = f"{path}.{os.getpid()}.{threading.get_ident()}"
        try:
            if os.path.exists(path):
                return
            os.makedirs(self._folder, 0o700, exist_ok=True)
            import blake3

            digest = blake3.blake3()
            with open(staged, "wb") as file:
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
                file.write(digest.digest())
            os.rename(staged, path)
            self._make_room()
        except OSError:
            try:
                os.unlink(staged)
            except OSError:
                pass

    def _make_room(self) -> None:
        with os.scandir(self._folder) as entries:
            found = sorted((e.stat().st_mtime, e.stat().st_size, e.path) for e in entries)
        excess = sum(size for _, size, _ in found) - self._room
        for _, size, path in found:
            if excess <= 0:
                break
            os.unlink(path)
            excess -= size


def _is_its_name(fd: int, name: str) -> bool:
    """Whether a map pack is what its name says, of whatever repository."""
    try:
        repository = os.pread(fd, 16, 16)
        return _native.check_pack(fd, bytes.fromhex(name[-64:]), repository, 1).ok
    except (ValueError, OSError):
        return False


def _pieces(fd: int, size: int | None = None) -> Iterator[bytes]:
    end = os.fstat(fd).st_size if size is None else size
    for at in range(0, end, _PIECE):
        yield os.pread(fd, min(_PIECE, end - at), at)


def _digest(pieces: Iterator[bytes]) -> bytes:
    import blake3

    digest = blake3.blake3()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def _room() -> int:
    from imager.units import parse_size

    given = os.environ.get("IMAGER_CACHE_SIZE")
    return parse_size(given) if given else ROOM
