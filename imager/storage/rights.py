"""What a served repository lets its client do.

Invariant: what is not permitted here is refused before anything is touched. In
append-only mode nothing that a repository holds can be removed, renamed or
hidden, and nothing can be added to what decides who may read and what counts.
And whoever may not do everything reaches repositories only, no other folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from imager.storage import wire
from imager.storage.base import TOP

FULL = "full"
APPEND_ONLY = "append-only"
READ_ONLY = "read-only"

TRIED = "probe/"
"No part of any repository: `imager doctor` tries there what a storage can do, and cleans up."

# What a backup writes, and a sync. Just these forms: a file `packs/3f`, or a folder of a set's name, would
# keep everybody else from storing theirs.
_APPENDED = re.compile(
    r"(?:sessions|sets|absent)/[0-9a-f]{32}|(?:packs|maps)/([0-9a-f]{2})/\1[0-9a-f]{62}|index/[0-9a-f]{64}"
)
# A new repository's own parts may be made only while there is none.
_MADE = ("slots/", "epochs/", "revoked/")
_MARK = b'"format":"imager"'
_ELSEWHERE = "do it on the machine that holds the repository, or over a key that is not so restricted"


class Rights:
    """What one connection may do in its folder `root`, in one of the three modes.

    Each method raises `Refused` where it may not.
    """

    def __init__(self, mode: str, root: str) -> None:
        self.mode = mode
        self.making = False
        "Whether this connection is making a repository where there was none."
        self._root = root
        self._announced: set[str] = set()
        self._whole = False

    def _refuse(self, doing: str) -> wire.Refused:
        return wire.Refused(f"{doing} is refused: this repository is served {self.mode}", hint=_ELSEWHERE)

    def _repository(self) -> bool | None:
        """Whether the folder holds a repository; None where it has not even a `config`."""
        if not self._whole:
            found = _is_repository(self._root)
            if not found:
                return found
            self._whole = True
        return self._whole

    def open(self) -> None:
        """Begin to work in the folder. A part of a repository is no place for another one.

        For what is permitted in that other one would change the repository around it.
        """
        above = os.path.dirname(self._root)
        while self.mode != FULL and above != os.path.dirname(above):
            if _is_repository(above):
                raise wire.Refused(
                    f"{self._root} is refused: it is a part of the repository in {above}",
                    hint="name the folder of a repository, or a new one",
                )
            above = os.path.dirname(above)

    def look(self, name: str) -> None:
        """Look at an object, or at all of a folder ("": at everything)."""
        if self.mode == FULL:
            return
        found = self._repository()
        parts = ("", *TOP, TRIED.rstrip("/"))
        if not found and not (found is None and name.partition("/")[0] in parts):
            raise wire.Refused(
                f"looking at {name or 'everything'} is refused: there is no repository in {self._root}",
                hint="name the folder of a repository, or a new one",
            )

    def upload(self) -> None:
        """Begin to send an object whose name is not known yet."""
        if self.mode == READ_ONLY:
            raise self._refuse("storing an object")

    def create(self, name: str) -> None:
        """Make an object."""
        if self.mode == FULL:
            return
        if self.mode == APPEND_ONLY:
            if name.startswith(TRIED) or (_APPENDED.fullmatch(name) and self._repository()):
                return
            if self.making and (name == "config" or name.startswith(_MADE)):
                return
        raise self._refuse(f"creating {name}")

    def created(self, name: str) -> None:
        """Remember what this connection made: a session that it announced is its own."""
        if name.startswith("sessions/"):
            self._announced.add(name)

    def delete(self, name: str) -> None:
        """Remove an object.

        An append-only writer may take back its own announcement as long as it has stored no set: it
        does so where it stops before it stored one. And an init that was interrupted leaves
        slots and epochs behind, which the next one removes.
        """
        if self.mode == FULL:
            return
        if self.mode == APPEND_ONLY:
            if name.startswith(TRIED) or (self.making and name.startswith(_MADE)):
                return
            set_name = "sets/" + name.removeprefix("sessions/")
            if name in self._announced and not os.path.lexists(f"{self._root}/{set_name}"):
                return
        raise self._refuse(f"deleting {name}")

    def move(self, name: str, target: str) -> None:
        """Give an object another name."""
        tried = name.startswith(TRIED) and target.startswith(TRIED)
        if self.mode != FULL and not (self.mode == APPEND_ONLY and tried):
            raise self._refuse(f"moving {name}")

    def sweep(self) -> None:
        """Remove what dead writers left: bytes without a name."""
        if self.mode == READ_ONLY:
            raise self._refuse("tidying up")

    def begin(self, strangers: Sequence[str]) -> None:
        """Prepare the folder for a new repository. `strangers`: what is in it and no repository's."""
        if self.mode == READ_ONLY:
            raise self._refuse("making a repository")
        if self.mode == APPEND_ONLY and (strangers or self._repository() is not None):
            raise self._refuse("making a repository in a folder that is in use")


def _is_repository(folder: str) -> bool | None:
    """Whether a folder holds a repository; None where it has not even a `config`."""
    try:
        with open(f"{folder}/config", "rb") as file:
            return _MARK in file.read(wire.PIECE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (IsADirectoryError, PermissionError):
        return False


class Confines:
    """The folders that a client may reach: those below `allowed`, or any where that is empty."""

    def __init__(self, allowed: Sequence[str]) -> None:
        self._allowed = tuple(os.path.realpath(path) for path in allowed)

    def root(self, path: str) -> str:
        """The real path of the folder that a client names. Raises `ProtocolError`, `Refused`."""
        try:
            real = os.path.realpath(os.path.expanduser(wire.check_path(path)))
        except UnicodeEncodeError as error:
            raise wire.ProtocolError("the path has characters that no path has here") from error
        for folder in self._allowed:
            if real == folder or real.startswith(folder.rstrip("/") + "/"):
                return real
        if self._allowed:
            raise wire.Refused(
                f"{wire.printable(path, 200)} is outside of what is served here",
                hint="the far end's authorized_keys restricts this key to another folder (--restrict)",
            )
        return real

    def name(self, root: str, name: str) -> str:
        """`name`, as one that stays below `root`. Raises `ProtocolError`, `Refused`."""
        wire.check_name(name)
        # Only the machine's own users can have put a link there; but where it leads is not theirs to say.
        if self._allowed and os.path.realpath(path := f"{root}/{name}") != path:
            raise wire.Refused(f"{name} is refused: a symbolic link leads out of the repository")
        return name
