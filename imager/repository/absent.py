"""Sets that a copy lacks on purpose, because whoever made it did not choose them.

Invariant: a mark says no more than that somebody left a set out knowingly. It
decides nothing about content and hides nothing from the machines that saw the
set here before: those remember it themselves.
"""

from __future__ import annotations

import msgspec

from imager.repository.format import ABSENT, canonical, is_id, now
from imager.storage.base import Storage
from imager.storage.errors import AlreadyExists


class AbsentMark(msgspec.Struct, frozen=True):
    """A set of this id is known to be absent (section 9)."""

    set: str
    repository: str
    created: int
    reason: str


def names(storage: Storage) -> set[str]:
    """Ids of the sets that are absent on purpose. Raises `StorageError`."""
    found = (name.removeprefix(ABSENT) for name in storage.list_names(ABSENT))
    return {name for name in found if is_id(name)}


def note(storage: Storage, repository: str, set_id: str, reason: str) -> None:
    """Leave a mark; one that is there stays as it is. Raises `StorageError`."""
    try:
        storage.create(ABSENT + set_id, canonical(AbsentMark(set_id, repository, now(), reason)))
    except AlreadyExists:
        pass
