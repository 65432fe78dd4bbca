"""No more than so many bytes a second, over all calls together.

Invariant: over any longer time the rate is kept; a single upload goes at the
speed of the line, and the next one waits until the average is right again.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from msgspec import Struct

from imager.storage.base import Staged, Storage
from imager.storage.wrapper import Wrapper


class Limits(Struct, frozen=True):
    """Bytes a second; None: as fast as it goes."""

    upload: int | None = None
    download: int | None = None


class _Pace:
    """Tells how long to wait before so many bytes may be moved."""

    def __init__(self, rate: int, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._free = clock()
        self._lock = threading.Lock()

    def wait(self, size: int) -> float:
        """Take `size` bytes: seconds to wait before they are moved."""
        with self._lock:
            present = self._clock()
            begin = max(self._free, present)
            self._free = begin + size / self._rate
            return begin - present


class Paces:
    """What the limits leave free at the moment, for all storages together that share it."""

    def __init__(
        self,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sleep = sleep
        self._up = _Pace(limits.upload, clock) if limits.upload else None
        self._down = _Pace(limits.download, clock) if limits.download else None

    @property
    def slows_reading(self) -> bool:
        """Whether there is a limit for downloads."""
        return self._down is not None

    def upload(self, size: int) -> None:
        """Wait until `size` bytes may be sent."""
        self._wait(self._up, size)

    def download(self, size: int) -> None:
        """Wait until `size` bytes may be fetched."""
        self._wait(self._down, size)

    def _wait(self, pace: _Pace | None, size: int) -> None:
        if pace is not None and (pause := pace.wait(size)) > 0:
            self._sleep(pause)


class Limited(Wrapper):
    """A storage that is used at a limited rate. Where reading is limited, nothing is read in place."""

    def __init__(self, inner: Storage, paces: Paces) -> None:
        super().__init__(inner)
        self._paces = paces

    @property
    def local(self) -> bool:
        """Whether `open` reads in place: what is read through a descriptor could not be counted."""
        return self.inner.local and not self._paces.slows_reading

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """See `Storage.read`."""
        if length is not None:
            self._paces.download(length)
            return super().read(name, offset, length)
        data = super().read(name, offset, length)
        self._paces.download(len(data))
        return data

    def create(self, name: str, data: bytes) -> None:
        """See `Storage.create`."""
        self._paces.upload(len(data))
        super().create(name, data)

    def publish(self, staged: Staged, name: str) -> None:
        """See `Staged.publish`."""
        self._paces.upload(os.fstat(staged.fd).st_size)
        super().publish(staged, name)
