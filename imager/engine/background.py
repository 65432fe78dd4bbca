"""Work that goes on beside what comes next, until its result is asked for.

Invariant: what it raises is raised by `result`, not lost in a thread that nobody listens to. `close` it
before what it uses is closed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Background(Generic[T]):
    """A function's result, worked out in a thread from the moment this is made."""

    def __init__(self, name: str, work: Callable[[], T]) -> None:
        self._result: T | None = None
        self._error: BaseException | None = None
        self._done = threading.Event()
        threading.Thread(target=self._run, args=(work,), name=name).start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._result = work()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def result(self) -> T:
        """What the function gave, once it has. Raises what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return cast(T, self._result)

    def close(self) -> None:
        """Wait until it works no longer, whatever interrupts that."""
        while not self._done.is_set():
            try:
                self._done.wait()
            except KeyboardInterrupt:
                continue
