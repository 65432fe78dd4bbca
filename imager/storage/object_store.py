"""A repository in an object store: S3 and what speaks like it, Google's, Azure's.

Invariant: an object is created by a conditional put ("only if there is none of
this name"), which the store decides at one place for all; what it acknowledges
is durable. There is no other way in which an object comes to be here, and no
staging area: a store shows an object whole or not at all. Whether a store
keeps these promises, `imager doctor` probes.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from imager.errors import Locked, UsageError
from imager.storage.base import TOP, Entry, Staged, check_name
from imager.storage.errors import AlreadyExists, NotFound, StorageError
from imager.storage.spool import Spool, mapped
from imager.storage.wire import MAX_OBJECT

if TYPE_CHECKING:
    from mmap import mmap

    from obstore.store import ObjectStore

T = TypeVar("T")

SCHEMES = ("s3", "gs", "az")
_LOCK = "init.lock"
_SMALL = 1 << 20
_SMALL_TIMEOUT = "60s"
_BULK_TIMEOUT = "30min"
"For one upload of a pack: 64 MiB at 40 KiB/s."


class ObjectStorage:
    """The objects of a bucket below a prefix. See `Storage`."""

    local = False

    def __init__(
        self,
        url: str,
        store: ObjectStore,
        bulk: ObjectStore | None = None,
        checking: Callable[[], list[ObjectStore]] | None = None,
    ) -> None:
        """`bulk`: the same place, with the patience that large uploads need.

        `checking` makes both anew, so that they send a checksum with each object.
        """
        self.url = url
        self._store: ObjectStore | None = store
        self._bulk = bulk or store
        self._checking = checking
        self._checks = False
        self._lock = threading.Lock()
        self._spool = Spool(self._upload, self.read)

    @classmethod
    def connect(cls, url: str) -> ObjectStorage:
        """The storage at `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.

        Makes no call yet: credentials and endpoint are what the environment says,
        as for the store's own tools. Raises `UsageError`.
        """
        try:
            import obstore.store
        except ImportError as error:
            raise UsageError("object stores need the package obstore", hint="pip install obstore") from error
        from imager.storage.object_settings import settings

        scheme, _, rest = url.partition("://")
        bucket = rest.split("/", 1)[0]
        if not bucket or "@" in bucket or "?" in rest or "#" in rest:
            raise UsageError(
                f"not a place in an object store: {scheme}://...",
                hint=f"write {scheme}://BUCKET/PREFIX; credentials come from the environment",
            )
        options = settings(scheme)
        make: Callable[..., ObjectStore] = obstore.store.from_url

        def connected(**more: str) -> list[ObjectStore]:
            stores = []
            for timeout in (_SMALL_TIMEOUT, _BULK_TIMEOUT):
                client = {**options.client, "timeout": timeout, "connect_timeout": "10s"}
                config = {**options.config, **more} or None
                # What repeats calls is `imager.storage.retry`: it knows which may be repeated.
                retry = {"max_retries": 0}
                stores.append(make(url.rstrip("/"), config=config, client_options=client, retry_config=retry))
            return stores

        try:
            stores = connected()
        except (ValueError, obstore.exceptions.BaseError) as error:
            said = str(error).split("\n\n", 1)[0]
            hint = "see docs/reference/storage.md"
            raise UsageError(f"{url} cannot be used: {said}", hint=hint) from error
        checking = partial(connected, checksum_algorithm="SHA256") if scheme == "s3" else None
        return cls(url.rstrip("/"), stores[0], stores[1], checking)

    # --- calls ---------------------------------------------------------------------

    def _call(self, doing: str, function: Callable[[ObjectStore], T], *, bulk: bool = False) -> T:
        store = self._bulk if bulk else self._store
        if self._store is None:
            raise StorageError(f"{doing} failed: the connection to {self.url} is closed")
        try:
            return function(store)  # type: ignore[arg-type]
        except Exception as error:
            from imager.storage.object_errors import failure

            raise failure(error, doing, self.url) from error

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of an object. Raises `NotFound`, `StorageError`."""
        import obstore

        check_name(name)
        if length is not None and length <= 0:
            return b""
        try:
            if length is not None:
                start, count = offset, length
                return self._call(
                    f"reading {name}",
                    lambda store: bytes(obstore.get_range(store, name, start=start, length=count)),
                )
            options: Any = {"range": {"offset": offset}} if offset else None
            return self._call(
                f"reading {name}", lambda store: bytes(obstore.get(store, name, options=options).bytes())
            )
        except StorageError as error:
            if getattr(error, "status", 0) == 416:
                return b""  # It ends before `offset`.
            raise

    def open(self, name: str) -> int:
        """A descriptor of a temporary copy. Raises `NotFound`, `StorageError`."""
        size = self.size(name)
        if size > MAX_OBJECT:
            raise StorageError(f"{name} has {size} bytes, which is more than an object here can have")
        return self._spool.copy(name, size)

    def size(self, name: str) -> int:
        """Length in bytes. Raises `NotFound`, `StorageError`."""
        import obstore

        check_name(name)
        return int(self._call(f"looking at {name}", lambda store: obstore.head(store, name))["size"])

    def modified(self, name: str) -> float:
        """When the object was made, by the store's clock: seconds since 1970. Raises `StorageError`."""
        import obstore

        found = self._call(f"looking at {name}", lambda store: obstore.head(store, name))
        return float(found["last_modified"].timestamp())

    def exists(self, name: str) -> bool:
        """Whether there is such an object. Raises `StorageError`."""
        try:
            self.size(name)
        except NotFound:
            return False
        return True

    def create(self, name: str, data: bytes) -> None:
        """Make an object. Raises `AlreadyExists`, `Unavailable`, `StorageError`."""
        check_name(name)
        self._put(name, data, bulk=len(data) > _SMALL)

    def _upload(self, name: str, fd: int, size: int) -> None:
        check_name(name)
        with mapped(fd, size) as data:
            self._put(name, data, bulk=True)

    def _put(self, name: str, data: bytes | mmap, *, bulk: bool) -> None:
        import obstore

        def put(store: ObjectStore) -> None:
            obstore.put(store, name, data, mode="create", use_multipart=False)

        try:
            self._call(f"writing {name}", put, bulk=bulk)
        except StorageError as error:
            from imager.storage.object_errors import ChecksumWanted

            if not isinstance(error, ChecksumWanted) or not self._send_checksums():
                raise
            self._call(f"writing {name}", put, bulk=bulk)

    def _send_checksums(self) -> bool:
        """A bucket that locks its objects wants them, other stores may not know them: whether it's done."""
        with self._lock:
            if self._checking is not None and self._store is not None:
                self._store, self._bulk = self._checking()
                self._checking, self._checks = None, True
            return self._checks

    def stage(self) -> Staged:
        """Begin an object in a temporary file. Raises `StorageError`."""
        return self._spool.stage()

    def move(self, name: str, target: str) -> None:
        """Give an object another name. Raises `NotFound`, `AlreadyExists`, `StorageError`.

        By way of this machine: few stores copy only where there is no target yet, all that
        are fit for a repository create so.
        """
        check_name(target)
        fd = self.open(name)
        try:
            self._upload(target, fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        self.delete(name)

    def delete(self, name: str) -> None:
        """Remove an object. Raises `NotFound`, `StorageError`."""
        import obstore

        self.size(name)  # A store is as content to delete what is not there.
        self._call(f"deleting {name}", lambda store: obstore.delete(store, name))

    # --- the place itself --------------------------------------------------------------

    def free_space(self) -> int | None:
        """A store does not tell."""
        return None

    @contextmanager
    def initializing(self) -> Iterator[None]:
        """Keep other preparations out by an object of their name; nothing else needs preparing."""
        from imager.storage.retry import Retrying

        calls = Retrying(self)
        mine = f"{socket.gethostname()} {os.getpid()} {os.urandom(8).hex()}\n".encode()
        try:
            calls.create(_LOCK, mine)
        except AlreadyExists as error:
            raise Locked(
                f"another process is creating a repository in {self.url}",
                hint=f"wait for it to end; if it died, delete the object {_LOCK} there",
            ) from error
        try:
            yield
        finally:
            calls.delete(_LOCK)

    def strangers(self) -> list[str]:
        """Names below the prefix that no repository has. Raises `StorageError`."""
        import obstore

        def holds(folder: str) -> bool:
            # Where versions are kept, some stores go on to show a folder of which all is deleted.
            return self._call(
                f"listing {folder}",
                lambda store: any(len(chunk) for chunk in obstore.list(store, folder, chunk_size=1)),
            )

        found = self._call("listing everything", lambda store: obstore.list_with_delimiter(store))
        names = [name for name in found["common_prefixes"] if name not in TOP and holds(name)]
        names += [one["path"] for one in found["objects"] if one["path"] not in (*TOP, _LOCK)]
        return sorted(names)

    def sweep(self) -> list[str]:
        """There is no staging area: nothing is left by dead writers."""
        return []

    def close(self) -> None:
        """Let go of connections; every later call is refused."""
        self._store = None

    def list_names(self, prefix: str) -> list[str]:
        """Names of the objects below `prefix`. Raises `StorageError`."""
        return [entry.name for entry in self.list(prefix)]

    def list(self, prefix: str) -> Iterator[Entry]:
        """The same with their sizes; one call of the store for each thousand. Raises `StorageError`."""
        import obstore

        folder = prefix.rstrip("/") or None

        def collect(store: ObjectStore) -> list[Entry]:
            found: list[Entry] = []
            for chunk in obstore.list(store, folder, chunk_size=1000):
                found += [Entry(one["path"], one["size"]) for one in chunk]
            if folder and any(not entry.name.startswith(folder + "/") for entry in found):
                raise StorageError(f"listing {folder} failed: {self.url} names objects that are not below it")
            return found

        return iter(self._call(f"listing {folder or 'everything'}", collect))
