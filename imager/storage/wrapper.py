"""The ground of all decorators: a storage around another one.

Invariant: every call that reaches the inner storage goes through `around`, so
a decorator that changes only that changes all of them alike; and a copy of a far
object is read through the outermost decorator, a piece a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from imager.storage.base import Entry, Staged, Storage
from imager.storage.spool import Spool

T = TypeVar("T")


class Wrapper:
    """Hands every call on. See `Storage`."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    @property
    def url(self) -> str:
        """Where it is."""
        return self.inner.url

    @property
    def local(self) -> bool:
        """Whether `open` reads in place."""
        return self.inner.local

    @property
    def append_only(self) -> bool:
        """Whether it refuses to remove anything; what has no such mode does not say."""
        return bool(getattr(self.inner, "append_only", False))

    def around(self, call: str, name: str, do: Callable[[], T]) -> T:
        """Carry out `do`, which is the method `call` (`stage` and `publish` among them) for `name`."""
        return do()

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Storage.read`."""
        return self.around("read", name, lambda: self.inner.read(name, offset, length))

    def open(self, name: str) -> int:
        """See `Storage.open`."""
        if self.local:
            return self.around("open", name, lambda: self.inner.open(name))
        return Spool.reading(self.read).copy(name, self.size(name))

    def size(self, name: str) -> int:
        """See `Storage.size`."""
        return self.around("size", name, lambda: self.inner.size(name))

    def exists(self, name: str) -> bool:
        """See `Storage.exists`."""
        return self.around("exists", name, lambda: self.inner.exists(name))

    def create(self, name: str, data: bytes) -> None:
        """See `Storage.create`."""
        self.around("create", name, lambda: self.inner.create(name, data))

    def stage(self) -> Staged:
        """See `Storage.stage`."""
        return WrappedStage(self, self.around("stage", "", self.inner.stage))

    def publish(self, staged: Staged, name: str) -> None:
        """`Staged.publish`, for decorators that have more to do than `around`."""
        self.around("publish", name, lambda: staged.publish(name))

    def list_names(self, prefix: str) -> list[str]:
        """See `Storage.list_names`."""
        return self.around("list", prefix, lambda: self.inner.list_names(prefix))

    def list(self, prefix: str) -> Iterator[Entry]:
        """See `Storage.list`."""
        return iter(self.around("list", prefix, lambda: [*self.inner.list(prefix)]))

    def move(self, name: str, target: str) -> None:
        """See `Storage.move`."""
        self.around("move", name, lambda: self.inner.move(name, target))

    def delete(self, name: str) -> None:
        """See `Storage.delete`."""
        self.around("delete", name, lambda: self.inner.delete(name))

    def free_space(self) -> int | None:
        """See `Storage.free_space`."""
        return self.around("free_space", "", self.inner.free_space)

    def initializing(self) -> AbstractContextManager[None]:
        """See `Storage.initializing`."""
        return self.inner.initializing()

    def strangers(self) -> list[str]:  # type: ignore[valid-type]
        """See `Storage.strangers`."""
        return self.around("list", "", self.inner.strangers)

    def sweep(self) -> list[str]:  # type: ignore[valid-type]
        """See `Storage.sweep`."""
        return self.around("sweep", "", self.inner.sweep)

    def close(self) -> None:
        """See `Storage.close`."""
        self.inner.close()


class WrappedStage:
    """A staged object whose `publish` goes through the decorator."""

    __slots__ = ("_inner", "_storage")

    def __init__(self, storage: Wrapper, inner: Staged) -> None:
        self._storage = storage
        self._inner = inner

    @property
    def fd(self) -> int:
        """See `Staged.fd`."""
        return self._inner.fd

    def publish(self, name: str) -> None:
        """See `Staged.publish`."""
        self._storage.publish(self._inner, name)

    def discard(self) -> None:
        """See `Staged.discard`."""
        self._inner.discard()
