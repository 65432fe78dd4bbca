"""A session that makes no image set of its own: sync and heal while they write to a repository.

Invariant: whatever is stored before it has an outcome is safe from a prune
that knows the rules of docs/design/repository-format.md, section 9; and whoever
was fenced learns of it before it relies on what it stored.
"""

from __future__ import annotations

import os
from typing import Self

from imager.repository.format import (
    CONDEMNED,
    EPOCHS,
    SESSIONS,
    SETS,
    Config,
    SessionObject,
    canonical,
    now,
    numbered,
)
from imager.storage.base import Storage
from imager.storage.errors import StorageError


class Announcement:
    """An open session. Use it as a context manager: at its end the announcement is taken back."""

    def __init__(self, storage: Storage, session: str) -> None:
        self._storage = storage
        self.id = session

    @classmethod
    def begin(cls, config: Config, storage: Storage) -> Announcement:
        """Announce that somebody writes. Raises `StorageError`."""
        session = os.urandom(16).hex()
        generation = max(numbered(storage.list_names(CONDEMNED)), default=0)
        epoch = max(numbered(storage.list_names(EPOCHS)), default=0)
        host = os.uname().nodename
        announced = SessionObject(session, config.repository, now(), epoch, host, os.getpid(), generation)
        storage.create(SESSIONS + session, canonical(announced))
        return cls(storage, session)

    def fenced(self) -> bool:
        """Whether this session was declared dead. Raises `StorageError`."""
        return self._storage.exists(SETS + self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._storage.delete(SESSIONS + self.id)
        except StorageError:
            pass  # It harms nobody: a prune declares it dead in the end.
