"""What verbs that serve have in common: a socket to listen at, and when to end.

Invariant: a socket that was made here is this user's only, and is gone when its context ends.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote

from imager.errors import EXIT_DONE, UsageError


@contextmanager
def unix(path: str | None) -> Iterator[tuple[socket.socket, str]]:
    """A listening Unix socket and its path; None: in a folder of its own. Raises `UsageError`."""
    if path is None:
        where = os.environ.get("XDG_RUNTIME_DIR")
        with (
            tempfile.TemporaryDirectory(prefix="imager-", dir=where) as folder,
            _listening(os.path.join(folder, "nbd")) as found,
        ):
            yield found
        return
    with _listening(os.path.abspath(path)) as found:
        yield found


@contextmanager
def _listening(path: str) -> Iterator[tuple[socket.socket, str]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(0o177)
        try:
            listener.bind(path)
        except OSError as error:
            said = error.strerror or str(error)
            raise UsageError(f"cannot listen at {path}: {said}", hint="name a path that is free") from error
        finally:
            os.umask(before)
        try:
            listener.listen(64)
            yield listener, path
        finally:
            os.unlink(path)


def address(name: str, path: str) -> str:
    """Where an export is: an NBD URI (doc/uri.md of the NBD project)."""
    return f"nbd+unix:///{quote(name, safe=':')}?socket={quote(path)}"


def wait(over: threading.Event) -> int:
    """Wait until this program is interrupted, which is how serving ends, or the event is set."""
    try:
        over.wait()
    except KeyboardInterrupt:
        pass
    return EXIT_DONE
