"""Storages that record, are slow, or fail: for tests, benchmarks and rehearsals.

Invariant: each does one thing to every call alike, by its number; two runs
that make the same calls meet the same troubles.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from imager.storage.base import Storage
from imager.storage.errors import Unavailable
from imager.storage.wrapper import Wrapper

T = TypeVar("T")

QUIET = ("stage", "free_space")
"Calls that ask nothing of a far storage: a staged object is a file of this machine."


class Recording(Wrapper):
    """Counts and lists the calls: `names` has (call, object name) in order, `calls` how many of each."""

    def __init__(
        self,
        inner: Storage,
        calls: Counter[str] | None = None,
        names: list[tuple[str, str]] | None = None,
    ) -> None:
        """Given `calls` and `names` are added to: several storages can be counted together."""
        super().__init__(inner)
        self.calls: Counter[str] = Counter() if calls is None else calls
        self.names: list[tuple[str, str]] = [] if names is None else names
        self.most = 0
        "The most calls that were under way at once."
        self._now = 0
        self._lock = threading.Lock()

    def around(self, call: str, name: str, do: Callable[[], T]) -> T:
        """Carry out `do`, and note it."""
        with self._lock:
            self.calls[call] += 1
            self.names.append((call, name))
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            return do()
        finally:
            with self._lock:
                self._now -= 1

    @property
    def total(self) -> int:
        """How many calls the storage itself was asked for."""
        return sum(count for call, count in self.calls.items() if call not in QUIET)


class Slow(Wrapper):
    """Adds `seconds` to each call, as a distance would."""

    def __init__(self, inner: Storage, seconds: float) -> None:
        super().__init__(inner)
        self._seconds = seconds

    def around(self, call: str, name: str, do: Callable[[], T]) -> T:
        """Wait, then carry out `do`."""
        if call not in QUIET:
            time.sleep(self._seconds)
        return do()


class Distant(Wrapper):
    """A storage that is used as if it were far: nothing is read in place."""

    @property
    def local(self) -> bool:
        """See `Storage.local`."""
        return False


class Faulty(Wrapper):
    """Fails calls as `plan` says: it is asked (number from 0, call, name).

    Where it returns "before", the call is not made; "after": it is made, and its answer gets lost;
    None: nothing happens.
    """

    def __init__(self, inner: Storage, plan: Callable[[int, str, str], str | None]) -> None:
        super().__init__(inner)
        self._plan = plan
        self._lock = threading.Lock()
        self.made = 0
        "Calls so far."

    def around(self, call: str, name: str, do: Callable[[], T]) -> T:
        """Carry out `do`, or fail."""
        if call in QUIET:
            return do()
        with self._lock:
            number = self.made
            self.made += 1
        when = self._plan(number, call, name)
        if when == "before":
            raise Unavailable(f"rehearsed: call {number} ({call} {name}) did not reach the storage")
        result = do()
        if when == "after":
            raise Unavailable(f"rehearsed: the answer to call {number} ({call} {name}) was lost")
        return result


class Crash(BaseException):
    """The process is gone, for all that it could still do to the storage."""


class Crashing(Wrapper):
    """Lets `calls` calls through; each later one raises `Crash`, as if the process had been killed."""

    def __init__(self, inner: Storage, calls: int) -> None:
        super().__init__(inner)
        self._left = calls
        self._lock = threading.Lock()

    def around(self, call: str, name: str, do: Callable[[], T]) -> T:
        """Carry out `do`, or be gone."""
        if call not in QUIET:
            with self._lock:
                if self._left <= 0:
                    raise Crash
                self._left -= 1
        return do()


class Eventual(Wrapper):
    """A listing that shows a new object only after `after` more listings of its folder."""

    def __init__(self, inner: Storage, after: int) -> None:
        super().__init__(inner)
        self._after = after
        self._fresh: dict[str, int] = {}
        self._lock = threading.Lock()

    def around(self, call: str, name: str, do: Callable[[], T]) -> T:
        """Carry out `do`; remember what is new."""
        result = do()
        if call in ("create", "publish"):
            with self._lock:
                self._fresh[name] = self._after
        return result

    def list_names(self, prefix: str) -> list[str]:
        """See `Storage.list_names`."""
        names = super().list_names(prefix)
        with self._lock:
            hidden = {name for name in names if self._fresh.get(name, 0) > 0}
            for name in hidden:
                self._fresh[name] -= 1
        return [name for name in names if name not in hidden]
