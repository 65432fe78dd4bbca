"""A session that makes no image set of its own: sync and heal while they write to a repository.

Invariant: it is announced before it looks at what there is, and what a prune had
condemned by then counts as absent; so all that it stores and relies on stays
until it ends. Whoever was fenced learns of it before it relies on what it stored.
"""

from __future__ import annotations

import os
from typing import Self

from imager.repository import sessions
from imager.repository.format import EPOCHS, SETS, Config, numbered
from imager.storage.base import Storage
from imager.storage.errors import StorageError


class Announcement:
    """An open session. Use it as a context manager: at its end the announcement is taken back."""

    def __init__(self, storage: Storage, session: str) -> None:
        self._storage = storage
        self.id = session

    @classmethod
    def begin(cls, config: Config, storage: Storage, kind: str) -> Announcement:
        """Announce that somebody writes; `kind` says what, for those who look. Raises `StorageError`."""
        session = os.urandom(16).hex()
        epoch = max(numbered(storage.list_names(EPOCHS)), default=0)
        host = os.uname().nodename
        sessions.announce(storage, config.repository, session, host=host, epoch=epoch, kind=kind)
        return cls(storage, session)

    def fenced(self) -> bool:
        """Whether this session was declared dead. Raises `StorageError`."""
        return self._storage.exists(SETS + self.id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            sessions.end(self._storage, self.id)
        except StorageError:
            pass  # It harms nobody: a prune declares it dead in the end.
