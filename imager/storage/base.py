"""The one small interface through which a repository reaches its bytes.

Invariant: an object is created once, whole, and never changed. `create` and
`publish` either make a durable object under a free name, or make none; of
two that race for one name with different bytes exactly one wins, and that is
the only lock. (With equal bytes both may be told that they won: a writer
whose call was repeated after a broken connection finds what it wrote itself.)

A storage is *local* where `open` reads in place. One that is not is *far*: a
call takes long, but many can be under way at once, from as many threads
(`imager.storage.spool` has the threads, and the files that stand in for what is far).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

from msgspec import Struct

TOP = (
    "config", "slots", "epochs", "sessions", "sets", "packs", "maps", "index", "condemned", "damaged",
    "revoked", "forgotten", "pins", "absent", "checked",
)  # fmt: skip
"What a repository has at its top, but for a folder's staging area."
_NAME = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z._-]*(?:/[0-9A-Za-z_-][0-9A-Za-z._-]*)*")


def check_name(name: str) -> str:
    """`name` if a new object can have it in every storage. Raises ValueError."""
    if len(name) > 512 or _NAME.fullmatch(name) is None:
        raise ValueError(f"not an object name: {name!r}")
    return name


class Entry(Struct, frozen=True):
    """An object in a listing; `size` in bytes."""

    name: str
    size: int


class Staged(Protocol):
    """An object that is being written and has no name yet.

    A process that dies leaves at most a file in the staging area.
    """

    @property
    def fd(self) -> int:
        """The descriptor to write to (and read from), from offset 0. `publish` and `discard` close it."""

    def publish(self, name: str) -> None:
        """Make the bytes durable, then the object `name` out of them.

        Raises `AlreadyExists` or another `StorageError`; the bytes are then discarded.
        Raises `Unavailable` where the same call may succeed later: the bytes are then kept for it.
        """

    def discard(self) -> None:
        """Forget the bytes. Does nothing after `publish` or a second time."""


class Storage(Protocol):
    """Objects under names such as `packs/3f/3f09...`. Every method is safe to call from any thread."""

    @property
    def url(self) -> str:
        """Where it is, for messages; never with a secret in it."""

    @property
    def local(self) -> bool:
        """Whether `open` reads in place. Where not, ranges are better read with `read`, many at once."""

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of an object, fewer where it ends before. Raises `NotFound`, `StorageError`."""

    def open(self, name: str) -> int:
        """A read-only descriptor, the caller's to close. Raises `NotFound`, `StorageError`.

        Of a far storage it is that of a temporary copy of the whole object.
        """

    def size(self, name: str) -> int:
        """Length in bytes. Raises `NotFound`, `StorageError`."""

    def exists(self, name: str) -> bool:
        """Whether there is such an object. Raises `StorageError` where that cannot be told."""

    def create(self, name: str, data: bytes) -> None:
        """Make a durable object. Raises `AlreadyExists` and leaves the older one; `StorageError`."""

    def stage(self) -> Staged:
        """Begin an object whose name is known later. Raises `StorageError`."""

    def list_names(self, prefix: str) -> list[str]:
        """Names of the objects in the folder `prefix` (`sets/`) and below, unordered; "": of all.

        Quick for hundreds of thousands of objects. Raises `StorageError`.
        """

    def move(self, name: str, target: str) -> None:
        """Give an object another name. Raises `NotFound`, `AlreadyExists`, `StorageError`."""

    def delete(self, name: str) -> None:
        """Remove an object durably. Raises `NotFound`, `StorageError`."""

    def free_space(self) -> int | None:
        """Bytes that can still be stored; None where the storage cannot tell."""

    def initializing(self) -> AbstractContextManager[None]:
        """Prepare an empty storage for a new repository and keep other preparations out meanwhile.

        Raises `Locked` where one is under way, `StorageError`.
        """

    def strangers(self) -> list[str]:
        """Names at the top that no repository has: what would be in the way of a new one."""

    def sweep(self) -> list[str]:
        """Remove what dead writers left in the staging area; their names. Live writers are not disturbed."""

    def list(self, prefix: str) -> Iterator[Entry]:
        """The same objects with their sizes. Raises `StorageError`."""

    def close(self) -> None:
        """Let go of connections. A far storage then answers every call with a `StorageError`."""
