"""A repository in a folder of a local or mounted filesystem.

Invariant: a name appears in the folder only once its bytes are on the disk
(file flushed, then linked, then folder flushed), and a link never replaces
one. Bytes without a name live in a file without a name (O_TMPFILE), or,
where the filesystem has none, in a file of `tmp/` whose lock its writer
holds, so that whether the writer lives needs no clock to tell.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from imager.errors import Locked
from imager.storage.base import TOP, Entry, check_name
from imager.storage.errors import Gone, NotFound, refusal

FOLDERS = ("slots", "epochs", "sessions", "sets", "packs", "maps", "index", "condemned", "tmp")
_EXPECTED = {*FOLDERS, *TOP, "lost+found"}

# What a filesystem answers that has no files without names, or no links.
_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL, errno.ENOSYS)
_NO_LINK = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
_HEX = frozenset("0123456789abcdef")


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class FolderStaged:
    """A file being written. `path` is None where it has no name at all."""

    __slots__ = ("_path", "_storage", "fd")

    def __init__(self, storage: FolderStorage, fd: int, path: str | None) -> None:
        self._storage = storage
        self._path = path
        self.fd = fd

    def publish(self, name: str) -> None:
        """Flush, link as `name`, flush the folder. See `Staged.publish`."""
        try:
            check_name(name)
            os.fsync(self.fd)
            self._storage._link(self.fd, self._path, name)
        except OSError as error:
            raise refusal(error, f"writing {name}", self._storage.root) from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget the bytes. See `Staged.discard`."""
        if self.fd < 0:
            return
        if self._path is not None:
            try:
                os.unlink(self._path)
            except OSError:
                pass  # Gone with its folder, or left for `sweep`: no name was made of it, so no harm.
        os.close(self.fd)
        self.fd = -1


class FolderStorage:
    """The objects are files below `root`. See `Storage`."""

    local = True

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)
        self.url = self.root
        self._nameless = True  # until the filesystem says otherwise

    def _path(self, name: str) -> str:
        if name.startswith("/") or ".." in name:
            raise ValueError(f"not an object name: {name!r}")
        return f"{self.root}/{name}"

    # --- reading ---------------------------------------------------------------

    def open(self, name: str) -> int:
        """A read-only descriptor of an object. Raises `NotFound`, `StorageError`."""
        try:
            return os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise refusal(error, f"opening {name}", self.root) from error

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of an object. Raises `NotFound`, `StorageError`."""
        fd = self.open(name)
        try:
            wanted = os.fstat(fd).st_size - offset if length is None else length
            data = os.pread(fd, max(wanted, 0), offset)
            if len(data) < wanted:  # One read rarely stops short of the end; a second one tells.
                parts = [data]
                while part := os.pread(fd, wanted - sum(map(len, parts)), offset + sum(map(len, parts))):
                    parts.append(part)
                data = b"".join(parts)
            return data
        except OSError as error:
            raise refusal(error, f"reading {name}", self.root) from error
        finally:
            os.close(fd)

    def size(self, name: str) -> int:
        """Length of an object in bytes. Raises `NotFound`, `StorageError`."""
        try:
            return os.stat(self._path(name)).st_size
        except OSError as error:
            raise refusal(error, f"looking at {name}", self.root) from error

    def modified(self, name: str) -> float:
        """When the object was made, by the filesystem's clock: seconds since 1970. Raises `StorageError`."""
        try:
            return os.stat(self._path(name)).st_mtime
        except OSError as error:
            raise refusal(error, f"looking at {name}", self.root) from error

    def exists(self, name: str) -> bool:
        """Whether there is such an object. Raises `StorageError`."""
        try:
            self.size(name)
        except NotFound:
            return False
        except Gone:
            if name == "config":
                return False
            raise
        return True

    def list_names(self, prefix: str) -> list[str]:
        """Names of the objects in a folder and the folders below it. Raises `StorageError`."""
        folder = prefix.rstrip("/")
        if not folder:
            present = {name for name in TOP if os.path.isdir(f"{self.root}/{name}")}
            named = [name for part in sorted(present) for name in self.list_names(part)]
            return named + (["config"] if self.exists("config") else [])
        try:
            return self._names(folder)
        except FileNotFoundError as error:
            if os.path.exists(f"{self.root}/config") or self._unborn():
                return []  # A copy of the repository may leave empty folders out.
            raise refusal(error, f"listing {folder}", self.root) from error
        except OSError as error:
            raise refusal(error, f"listing {folder}", self.root) from error

    def _unborn(self) -> bool:
        """Whether a repository is being made here: it has its folders, but no config yet."""
        return os.path.isdir(f"{self.root}/tmp")

    def _names(self, folder: str) -> list[str]:
        path = self._path(folder)
        shard = folder[-2:]
        if folder[-3:-2] == "/" and _HEX.issuperset(shard):
            # The 256 folders of packs and maps hold files alone: no need to ask what each one is.
            return [f"{folder}/{name}" for name in os.listdir(path)]
        names: list[str] = []
        with os.scandir(path) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}"
                if entry.is_dir(follow_symlinks=False):
                    names += self._names(name)
                else:
                    names.append(name)
        return names

    # --- writing ---------------------------------------------------------------

    def stage(self) -> FolderStaged:
        """Begin an object whose name is known later. Raises `StorageError`."""
        if self._nameless:
            try:
                flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
                return FolderStaged(self, os.open(f"{self.root}/tmp", flags, 0o600), None)
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise refusal(error, "beginning a new object", self.root) from error
                if self._remake(f"{self.root}/tmp"):
                    return self.stage()
                self._nameless = False
        return self._stage_named()

    def _remake(self, folder: str) -> bool:
        """Make a folder that a copy of the repository left out for being empty; False if it is there.

        Raises `StorageError` where the repository itself is gone: what is left may be an empty mount point.
        """
        if os.path.isdir(folder):
            return False
        try:
            if not self._unborn():
                os.stat(f"{self.root}/config")
            for path in (os.path.dirname(folder), folder):
                try:
                    os.mkdir(path, 0o700)
                except FileExistsError:
                    continue
                _sync_folder(os.path.dirname(path))
        except OSError as error:
            raise refusal(error, f"making the folder {folder}", self.root) from error
        return True

    def _stage_named(self) -> FolderStaged:
        while True:
            path = f"{self.root}/tmp/{os.getpid()}-{os.urandom(8).hex()}"
            try:
                fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError as error:
                if error.errno == errno.ENOENT and self._remake(f"{self.root}/tmp"):
                    continue
                raise refusal(error, "beginning a new object", self.root) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_nlink:
                    return FolderStaged(self, fd, path)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK):
                    os.close(fd)
                    raise refusal(error, "beginning a new object", self.root) from error
                return FolderStaged(self, fd, path)  # No locks here: `sweep` finds none to take either.
            os.close(fd)  # A sweep took it between its making and its lock: once more.

    def create(self, name: str, data: bytes) -> None:
        """Make a durable object of `data`. Raises `AlreadyExists`, `StorageError`."""
        check_name(name)
        staged = self.stage()
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(staged.fd, view) :]
        except OSError as error:
            raise refusal(error, f"writing {name}", self.root) from error
        else:
            staged.publish(name)
        finally:
            staged.discard()

    def _link(self, fd: int, staged: str | None, name: str) -> None:
        """Give the flushed file its name, durably. Raises OSError."""
        target = self._path(name)
        folder = os.path.dirname(target)
        try:
            self._link_once(fd, staged, target)
        except FileNotFoundError:
            self._remake(folder)  # Or another thread has made it a moment ago.
            self._link_once(fd, staged, target)
        _sync_folder(folder)

    def _link_once(self, fd: int, staged: str | None, target: str) -> None:
        if staged is None:
            # A directory descriptor makes Python call linkat, which can follow the link in /proc.
            at = os.open("/", os.O_PATH | os.O_CLOEXEC)
            try:
                os.link(f"/proc/self/fd/{fd}", target, src_dir_fd=at, follow_symlinks=True)
            except FileNotFoundError:
                if os.path.isdir("/proc/self/fd"):
                    raise
                self._nameless = False
                self._copy(fd, target)  # A system without /proc: rare, so a copy will do.
            finally:
                os.close(at)
            return
        try:
            os.link(staged, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
            self._copy(fd, target)

    def _copy(self, fd: int, target: str) -> None:
        """Where there are no links (FAT, some network filesystems): exclusive creation, then the bytes.

        A crash midway leaves a torn object under its name. Its digest or
        signature tells, and only this one object is lost.
        """
        out = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            done = 0
            while done < size:
                view = memoryview(os.pread(fd, min(1 << 20, size - done), done))
                if not view:
                    raise OSError(errno.EIO, "the staged file shrank")
                done += len(view)
                while view:
                    view = view[os.write(out, view) :]
            os.fsync(out)
        except BaseException:
            os.unlink(target)
            raise
        finally:
            os.close(out)

    def move(self, name: str, target: str) -> None:
        """Give an object another name; it never replaces one. Raises `NotFound`, `StorageError`."""
        source, path = self._path(name), self._path(check_name(target))
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            try:
                os.link(source, path)
                os.unlink(source)
            except OSError as error:
                if error.errno not in _NO_LINK:
                    raise
                if os.path.lexists(path):
                    raise FileExistsError(errno.EEXIST, "exists", path) from error
                os.rename(source, path)
            _sync_folder(os.path.dirname(path))
            _sync_folder(os.path.dirname(source))
        except OSError as error:
            raise refusal(error, f"moving {name} to {target}", self.root) from error

    def delete(self, name: str) -> None:
        """Remove an object durably. Raises `NotFound`, `StorageError`."""
        path = self._path(name)
        try:
            os.unlink(path)
            _sync_folder(os.path.dirname(path))
        except OSError as error:
            raise refusal(error, f"deleting {name}", self.root) from error

    # --- the folder itself -------------------------------------------------------

    def free_space(self) -> int | None:
        """Bytes that an ordinary user can still store. Raises `StorageError`."""
        try:
            stat = os.statvfs(self.root)
        except OSError as error:
            raise refusal(error, "looking at the free space", self.root) from error
        return stat.f_bavail * stat.f_frsize

    @contextmanager
    def initializing(self) -> Iterator[None]:
        """Make the folders of a repository; a second process doing so meanwhile gets `Locked`."""
        try:
            os.makedirs(self.root, 0o700, exist_ok=True)
            lock = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise refusal(error, "creating the repository folder", self.root) from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Locked(
                    f"another process is creating a repository in {self.root}", hint="wait for it to end"
                ) from error
            if not self.strangers():
                for folder in FOLDERS:
                    os.makedirs(f"{self.root}/{folder}", 0o700, exist_ok=True)
                os.fsync(lock)
            yield
        except OSError as error:
            raise refusal(error, "creating the repository folder", self.root) from error
        finally:
            os.close(lock)

    def strangers(self) -> list[str]:
        """Names in the folder that no repository has. Raises `StorageError`."""
        try:
            return sorted(name for name in os.listdir(self.root) if name not in _EXPECTED)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise refusal(error, "listing the repository folder", self.root) from error

    def sweep(self) -> list[str]:
        """Remove staging files whose writer is dead: nobody holds their lock."""
        swept: list[str] = []
        for name in self.list_names("tmp"):
            path = self._path(name)
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise refusal(error, f"opening {name}", self.root) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
                swept.append(name)
            except BlockingIOError:
                continue  # Its writer lives.
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK):
                    raise refusal(error, f"deleting {name}", self.root) from error
                # No locks on this filesystem: who lives cannot be told, so it stays.
            finally:
                os.close(fd)
        return swept

    def close(self) -> None:
        """Nothing stays open between two calls."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """Objects with their sizes. Raises `StorageError`."""
        for name in self.list_names(prefix):
            try:
                yield Entry(name, self.size(name))
            except NotFound:
                continue  # deleted since it was listed
