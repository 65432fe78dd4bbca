"""What an S3 bucket held at some moment: deleted and overwritten objects as they were.

Invariant: nothing can be written here. Of each name the newest version of that moment
is shown, by the store's own clock; one that was deleted then is not there. The bucket's
versions are listed once, so what is written later does not come in.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import datetime
from typing import NoReturn

from imager.errors import UsageError
from imager.storage.base import Entry, Staged
from imager.storage.errors import NotFound, StorageError
from imager.storage.object_versions import ObjectVersions, Version, microseconds
from imager.storage.spool import Spool

MARK = "?as-of="


class PastStorage:
    """The objects of a bucket below a prefix as they were. See `Storage`."""

    local = False
    append_only = True

    def __init__(self, versions: ObjectVersions, moment: datetime) -> None:
        """`moment`: with its offset from UTC."""
        self.url = f"{versions.url}{MARK}{moment.isoformat(timespec='seconds')}"
        self._versions = versions
        self._moment = microseconds(moment)
        self._found: dict[str, Version] | None = None
        self._lock = threading.Lock()

    @classmethod
    def connect(cls, place: str) -> PastStorage:
        """The storage at `s3://bucket/prefix?as-of=TIME`. Raises `UsageError`."""
        url, _, text = place.partition(MARK)
        if not url.startswith("s3://") or not url[5:].split("/", 1)[0]:
            raise UsageError(
                f"there is no past at {url}", hint=f"only S3 keeps it: s3://BUCKET/PREFIX{MARK}TIME"
            )
        try:
            moment = datetime.fromisoformat(text)
        except ValueError as error:
            raise UsageError(
                f"not a time: {text!r}", hint=f"write s3://BUCKET/PREFIX{MARK}2026-11-22T13:40Z"
            ) from error
        return cls(ObjectVersions.connect(url.rstrip("/")), moment.astimezone())

    def _all(self) -> dict[str, Version]:
        with self._lock:
            if self._found is None:
                found: dict[str, Version] = {}
                kept = False
                for one in self._versions.versions():
                    kept = kept or one.id != "null"
                    # Of one name the newest comes first.
                    if one.modified <= self._moment and one.name not in found:
                        found[one.name] = one
                if found and not kept:
                    raise UsageError(
                        f"{self._versions.url} keeps no versions of its objects, so it has no past",
                        hint="versions have to be on in the bucket before something is lost",
                    )
                self._found = {name: one for name, one in found.items() if not one.deleted}
            return self._found

    def _one(self, name: str) -> Version:
        found = self._all().get(name)
        if found is None:
            raise NotFound(f"reading {name} failed: it is not in {self.url}")
        return found

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of an object. Raises `NotFound`, `StorageError`."""
        return self._versions.read(self._one(name), offset, length)

    def open(self, name: str) -> int:
        """A descriptor of a temporary copy. Raises `NotFound`, `StorageError`."""
        return Spool.reading(self.read).copy(name, self.size(name))

    def size(self, name: str) -> int:
        """Length in bytes. Raises `NotFound`, `StorageError`."""
        return self._one(name).size

    def exists(self, name: str) -> bool:
        """Whether there was such an object. Raises `StorageError`."""
        return name in self._all()

    def list_names(self, prefix: str) -> list[str]:
        """Names of the objects below `prefix`. Raises `StorageError`."""
        return [name for name in self._all() if name.startswith(prefix)]

    def free_space(self) -> int | None:
        """There is none."""
        return 0

    def strangers(self) -> list[str]:
        """Nobody makes a repository here."""
        return []

    def sweep(self) -> list[str]:
        """Nothing is left by dead writers."""
        return []

    def close(self) -> None:
        """Nothing is held."""

    # --- what is refused ----------------------------------------------------------------

    def _refuse(self, doing: str) -> NoReturn:
        raise StorageError(
            f"{doing} failed: {self.url} is the past, and cannot be changed",
            hint=f"copy it elsewhere: imager sync '{self.url}' DST",
        )

    def create(self, name: str, data: bytes) -> None:
        """Raises `StorageError`."""
        self._refuse(f"writing {name}")

    def stage(self) -> Staged:
        """Raises `StorageError`."""
        self._refuse("writing")

    def move(self, name: str, target: str) -> None:
        """Raises `StorageError`."""
        self._refuse(f"moving {name}")

    def delete(self, name: str) -> None:
        """Raises `StorageError`."""
        self._refuse(f"deleting {name}")

    def initializing(self) -> AbstractContextManager[None]:
        """Raises `StorageError`."""
        self._refuse("making a repository")

    def list(self, prefix: str) -> Iterator[Entry]:
        """The same as `list_names` with their sizes. Raises `StorageError`."""
        return iter(
            [Entry(one.name, one.size) for one in self._all().values() if one.name.startswith(prefix)]
        )
