"""From what a person writes after `-r` to a storage.

Invariant: the form of the text alone decides which storage it is; nothing is
touched or created. A far storage comes with what every one of them needs:
repetition of calls that were not answered, and the limits that were asked for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from imager.errors import UsageError
from imager.storage.base import Storage
from imager.storage.folder import FolderStorage

if TYPE_CHECKING:
    from imager.storage.limit import Paces

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_OBJECTS = ("s3", "gs", "az")


def open_storage(place: str, paces: Paces | None = None, *, cached: bool = False) -> Storage:
    """The storage at a path, or at a `file://`, `s3://`, `gs://`, `az://` or `ssh://` URL.

    `s3://...?as-of=TIME` is what was there at that time.
    `paces`: the limits to keep, together with all other storages that got the same.
    `cached`: keep copies of small objects of a far one, and use them; not for what looks for damage.
    Raises `UsageError` for other kinds, and where the address makes no sense.
    """
    storage = _connect(place)
    far = not storage.local
    if paces is not None:
        from imager.storage.limit import Limited

        storage = Limited(storage, paces)
    if not far:
        return storage
    from imager.storage.retry import Retrying

    storage = Retrying(storage)
    if cached:
        from imager.storage.cached import Cached

        storage = Cached(storage)
    return storage


def local_path(storage: Storage) -> str | None:
    """The folder of a local storage, whatever decorates it; None for a far one."""
    inner = bare(storage)
    return inner.root if isinstance(inner, FolderStorage) else None


def bare(storage: Storage) -> Storage:
    """The storage without its decorators."""
    from imager.storage.wrapper import Wrapper

    while isinstance(storage, Wrapper):
        storage = storage.inner
    return storage


def _connect(place: str) -> Storage:
    if not place:
        raise UsageError("no repository named", hint="give -r PATH or set IMAGER_REPO")
    scheme = _SCHEME.match(place)
    if scheme is None:
        return FolderStorage(place)
    if scheme[1] == "file":
        from urllib.parse import unquote

        path = unquote(place[len("file://") :])
        if path.startswith("/"):
            return FolderStorage(path)
        raise UsageError(f"not a local path: {place}", hint="write file:///absolute/path")
    if scheme[1] in _OBJECTS and "?as-of=" in place:
        from imager.storage.past import PastStorage

        return PastStorage.connect(place)
    if scheme[1] in _OBJECTS:
        from imager.storage.object_store import ObjectStorage

        return ObjectStorage.connect(place)
    if scheme[1] == "ssh":
        from imager.storage.ssh import SshStorage

        return SshStorage.connect(place)
    raise UsageError(
        f"this version cannot keep a repository at {scheme[1]}:// addresses",
        hint="give the path of a folder, or an address with s3://, gs://, az:// or ssh://",
    )
