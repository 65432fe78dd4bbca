"""Calls that are repeated where the storage did not answer.

Invariant: a repeated call means what one call means. A creation whose answer
got lost and that finds its own bytes under the name has succeeded; one that
finds other bytes has lost the race, as it would have at the first attempt. A
deletion that finds nothing left, and a move that is done, have succeeded too.
What is not `Unavailable` is never repeated.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from typing import TypeVar

from imager.storage.base import Staged, Storage
from imager.storage.errors import AlreadyExists, NotFound, Unavailable
from imager.storage.spool import PIECE
from imager.storage.wrapper import Wrapper

T = TypeVar("T")

PATIENCE = 180.0
"Seconds that a call is repeated before its error is told."
FIRST_PATIENCE = 5.0
"The same before the storage has answered for the first time: the address may be wrong."
_LARGE = 1 << 20
_FIRST_WAIT = 0.1
_LONGEST_WAIT = 15.0


_ending = threading.Event()


def give_up() -> None:
    """Repeat nothing any more: the process is about to end, and waits for calls that are under way."""
    _ending.set()


def _pause(seconds: float) -> None:
    _ending.wait(seconds)


class Retrying(Wrapper):
    """A storage whose calls are repeated, with growing pauses, while it is `Unavailable`."""

    def __init__(
        self,
        inner: Storage,
        *,
        patience: float = PATIENCE,
        sleep: Callable[[float], None] = _pause,
    ) -> None:
        super().__init__(inner)
        self._patience = patience
        self._sleep = sleep
        self._answered = False
        self.repeated = 0
        "Calls that were made once more."

    def around(self, call: str, name: str, do: Callable[[], T]) -> T:
        """Carry out `do`, again and again where need be."""
        return self._repeat(do)

    def _repeat(self, do: Callable[[], T], failed: Callable[[], T | None] | None = None) -> T:
        """`failed` is asked before each repetition whether the call took effect: its result, or None."""
        pause, waited = _FIRST_WAIT, 0.0
        while True:
            try:
                result = do()
                self._answered = True
                return result
            except Unavailable:
                # Pauses are counted, not the clock: a machine that slept has not been patient.
                if _ending.is_set() or waited >= (
                    self._patience if self._answered else min(FIRST_PATIENCE, self._patience)
                ):
                    raise
                moment = random.uniform(pause / 2, pause)
                self._sleep(moment)
                if _ending.is_set():
                    raise
                waited += moment
                pause = min(pause * 2, _LONGEST_WAIT)
                self.repeated += 1
                if failed is not None and (found := failed()) is not None:
                    return found
            except Exception:
                self._answered = True  # It may refuse, but it is there.
                raise

    def create(self, name: str, data: bytes) -> None:
        """See `Storage.create`."""

        def do() -> bool:
            self.inner.create(name, data)
            return True

        self._make(name, do, lambda at, count: data[at : at + count], len(data))

    def publish(self, staged: Staged, name: str) -> None:
        """See `Staged.publish`."""
        kept = os.dup(staged.fd)  # It is needed once more after the bytes are discarded.

        def do() -> bool:
            staged.publish(name)
            return True

        try:
            size = os.fstat(kept).st_size
            self._make(name, do, lambda at, count: os.pread(kept, count, at), size)
        finally:
            staged.discard()
            os.close(kept)

    def _make(self, name: str, do: Callable[[], bool], piece: Callable[[int, int], bytes], size: int) -> None:
        """Create an object by `do`. Raises `AlreadyExists` where another one is there."""
        again = False

        def failed() -> bool | None:
            nonlocal again
            again = True
            # A store that refuses a large object may hang up before it has all of it, so that
            # its answer is never seen; and what has arrived need not be sent once more.
            if size <= _LARGE or not self.exists(name):
                return None
            if self._differs(name, piece, size):
                raise AlreadyExists(f"writing {name} failed: the name is taken in {self.url}")
            return True

        try:
            self._repeat(do, failed)
        except AlreadyExists:
            if not again or self._differs(name, piece, size):
                raise

    def _differs(self, name: str, piece: Callable[[int, int], bytes], size: int) -> bool:
        """Whether the object is another than the one that was to be created."""
        try:
            if self.size(name) != size:
                return True
            for at in range(0, size, PIECE):
                if self.read(name, at, PIECE) != piece(at, PIECE):
                    return True
        except NotFound:
            return True  # Somebody took it away again: who won is not ours to say.
        return False

    def delete(self, name: str) -> None:
        """See `Storage.delete`."""
        again = _Again()
        try:
            self._repeat(lambda: self.inner.delete(name), again)
        except NotFound:
            if not again.said:
                raise

    def move(self, name: str, target: str) -> None:
        """See `Storage.move`."""
        again = _Again()
        try:
            self._repeat(lambda: self.inner.move(name, target), again)
        except NotFound:
            if not again.said or not self.exists(target):
                raise
        except AlreadyExists:
            if not again.said:
                raise
            if self._differs(target, lambda at, count: self.read(name, at, count), self.size(name)):
                raise
            self.delete(name)


class _Again:
    """Whether a call was repeated."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self) -> None:
        self.said = True
