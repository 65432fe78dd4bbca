"""What a served repository lets its client do.

Invariant: what is not permitted here is refused before anything is touched. In
append-only mode nothing that a repository holds can be removed, renamed or
hidden, and nothing can be added to what decides who may read and what counts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from imager.storage import wire

FULL = "full"
APPEND_ONLY = "append-only"
READ_ONLY = "read-only"

# What a backup writes. A new repository's own parts may be made only while there is none.
_APPENDED = ("sessions/", "sets/", "packs/", "maps/", "index/")
_MADE = ("slots/", "epochs/")
# No part of any repository: imager doctor tries there what a storage can do, and cleans up.
_TRIED = "probe/"
_ELSEWHERE = "do it on the machine that holds the repository, or over a key that is not so restricted"


class Rights:
    """What one connection may do in its folder, in one of the three modes."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.making = False
        "Whether this connection is making a repository where there was none."
        self._announced: set[str] = set()

    def _refuse(self, doing: str) -> wire.Refused:
        return wire.Refused(f"{doing} is refused: this repository is served {self.mode}", hint=_ELSEWHERE)

    def create(self, name: str) -> None:
        """Raises `Refused` where `name` may not be created."""
        if self.mode == FULL or (self.mode == APPEND_ONLY and name.startswith((*_APPENDED, _TRIED))):
            return
        if not (self.mode == APPEND_ONLY and self.making and (name == "config" or name.startswith(_MADE))):
            raise self._refuse(f"creating {name}")

    def created(self, name: str) -> None:
        """Remember what this connection made: a session that it announced is its own."""
        if name.startswith("sessions/"):
            self._announced.add(name)

    def delete(self, name: str, root: str) -> None:
        """Raises `Refused` where `name` may not be removed from the repository in `root`.

        An append-only writer may take back its own announcement as long as it has stored no set: it
        does so where it stops before it stored anything. And an init that was interrupted leaves
        slots and epochs behind, which the next one removes.
        """
        if self.mode == FULL:
            return
        if self.mode == APPEND_ONLY:
            if name.startswith(_TRIED) or (self.making and name.startswith(_MADE)):
                return
            set_name = "sets/" + name.removeprefix("sessions/")
            if name in self._announced and not os.path.lexists(f"{root}/{set_name}"):
                return
        raise self._refuse(f"deleting {name}")

    def move(self, name: str, target: str) -> None:
        """Raises `Refused` where `name` may not be renamed to `target`."""
        tried = name.startswith(_TRIED) and target.startswith(_TRIED)
        if self.mode != FULL and not (self.mode == APPEND_ONLY and tried):
            raise self._refuse(f"moving {name}")

    def sweep(self) -> None:
        """Raises `Refused` where what dead writers left, bytes without a name, may not be removed."""
        if self.mode == READ_ONLY:
            raise self._refuse("tidying up")

    def begin(self, root: str) -> None:
        """Raises `Refused` where no repository may be made in `root`."""
        if self.mode == READ_ONLY or (self.mode == APPEND_ONLY and os.path.lexists(f"{root}/config")):
            raise self._refuse("making a repository")


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
