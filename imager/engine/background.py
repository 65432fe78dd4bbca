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
        self.error: BaseException | None = None
        "What it raised."
        self.done = threading.Event()
        "Set once it works no longer."
        threading.Thread(target=self._run, args=(work,), name=name).start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._result = work()
        except BaseException as error:
            self.error = error
        finally:
            self.done.set()

    def result(self) -> T:
        """What the function gave, once it has. Raises what it raised."""
        self.done.wait()
        if self.error is not None:
            raise self.error
        return cast(T, self._result)

    def close(self) -> None:
        """Wait until it works no longer, whatever interrupts that."""
        while not self.done.is_set():
            try:
                self.done.wait()
            except KeyboardInterrupt:
                continue
