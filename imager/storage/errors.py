"""How a storage says that something is missing, there already, or refused.

Invariant: no `OSError` leaves the storage wing; each becomes a
`StorageError` that names the place and says what to do next.
"""

from __future__ import annotations

import errno
import os

from imager.errors import StorageError

__all__ = ["AlreadyExists", "Gone", "NotFound", "Retained", "StorageError", "Unavailable", "refusal"]


class NotFound(StorageError):
    """There is no object of this name."""

    kind = "not-found"


class Gone(StorageError):
    """The storage itself is not there: a folder removed, a disk unmounted, no such bucket."""

    kind = "gone"


class AlreadyExists(StorageError):
    """An object of this name is there already; it was left as it is."""

    kind = "already-exists"


class Retained(StorageError):
    """The storage keeps the object until some day, and removes it for nobody before."""

    kind = "retained"


class Unavailable(StorageError):
    """The storage did not answer, or said to come again later: the same call may succeed in a while.

    Whether the call took effect is not known. What repeats such calls is `imager.storage.retry`.
    """

    kind = "unavailable"


_HINTS = {
    errno.ENOSPC: "free some space there, or use a larger disk; nothing stored before is hurt",
    errno.EDQUOT: "raise the disk quota, or free some space; nothing stored before is hurt",
    errno.EROFS: "mount it writable; a read-only filesystem may be one that the kernel found damaged",
    errno.EACCES: "run as the user that owns the repository",
    errno.EPERM: "run as the user that owns the repository",
    errno.EIO: "the disk below reports errors: look at the kernel log",
    errno.ESTALE: "the network filesystem was remounted or its server changed: mount it again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def refusal(error: OSError, doing: str, root: str) -> StorageError:
    """The error to raise for `error`, met while `doing` (such as "writing sets/12ab") in `root`."""
    hint = _HINTS.get(error.errno or 0)
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.exists(f"{root}/config"):
        return Gone(
            f"{doing} failed: there is no repository in {root} any more",
            hint="mount its disk again, or check the path",
        )
    if error.errno == errno.ENOENT:
        return NotFound(f"{doing} failed: it is not in {root}")
    if error.errno == errno.EEXIST:
        return AlreadyExists(f"{doing} failed: the name is taken in {root}")
    return StorageError(f"{doing} failed: {reason} ({root})", hint=hint)
