"""What long work tells while it runs, kept apart from how it is shown.

Invariant: engines speak to a `Reporter` and never print; front ends
implement it. Totals are true: they are known before the phase starts, or
None where they cannot be (a stream).
"""

from __future__ import annotations

import threading
from typing import Protocol


class Reporter(Protocol):
    """Receives progress and remarks. Called from one thread at a time."""

    def phase(self, name: str, total: int | None) -> None:
        """A phase of work begins: `name` such as `reading`; `total` in bytes."""

    def advance(self, done: int, *, stored: int = 0) -> None:
        """`done` more bytes of the phase's total are finished; `stored` more were written."""

    def end(self) -> None:
        """The current phase is over."""

    def note(self, text: str) -> None:
        """Something worth knowing, not worrying."""

    def warn(self, text: str, *, hint: str | None = None) -> None:
        """Something a person must see: loud in every mode but quiet."""


class Silent:
    """A reporter for library use and tests; it keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def phase(self, name: str, total: int | None) -> None: ...

    def advance(self, done: int, *, stored: int = 0) -> None: ...

    def end(self) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str, *, hint: str | None = None) -> None:
        self.warnings.append(text)


class Locked:
    """A reporter that several threads may call."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._lock = threading.Lock()

    def phase(self, name: str, total: int | None) -> None:
        with self._lock:
            self._reporter.phase(name, total)

    def advance(self, done: int, *, stored: int = 0) -> None:
        with self._lock:
            self._reporter.advance(done, stored=stored)

    def end(self) -> None:
        with self._lock:
            self._reporter.end()

    def note(self, text: str) -> None:
        with self._lock:
            self._reporter.note(text)

    def warn(self, text: str, *, hint: str | None = None) -> None:
        with self._lock:
            self._reporter.warn(text, hint=hint)
