"""From what a person writes after `-r` to a storage.

Invariant: the form of the text alone decides which storage it is; nothing is
touched or created.
"""

from __future__ import annotations

import re

from imager.errors import UsageError
from imager.storage.base import Storage
from imager.storage.folder import FolderStorage

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")


def open_storage(place: str) -> Storage:
    """The storage at a path, `file://` or `ssh://` URL. Raises `UsageError` for other kinds."""
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
    if scheme[1] == "ssh":
        from imager.storage.ssh import SshStorage

        return SshStorage(place)
    raise UsageError(
        f"this version cannot keep a repository at {scheme[1]}:// addresses", hint="give the path of a folder"
    )
