"""What this machine remembers of a repository's keys: which slot opened, and what must not be undone.

Invariant: nothing secret is in it. The newest epoch, the revocations that were seen here, and that
there is an encrypted repository at a place, never go back by themselves; a lost or unwritable memory costs a
little time and these guards, never a backup.
"""

from __future__ import annotations

import os

import msgspec

from imager import _native, config
from imager.repository.format import is_id

_MAX_STATE = 64 << 20


class _State(msgspec.Struct):
    version: int = 1
    slot: str = ""
    epoch: int = 0
    revoked: dict[str, str] = {}


class KeyMemory:
    """The memory for one repository, in the state folder of this machine."""

    def __init__(self, repository: bytes) -> None:
        self._path = os.path.join(config.state_dir(), "keys", repository.hex() + ".json")
        self._state = self._load()

    @property
    def slot(self) -> str:
        """Id of the key slot that opened here last; empty where none is remembered."""
        return self._state.slot

    @property
    def epoch(self) -> int:
        """The newest key epoch that was seen here; 0 for none."""
        return self._state.epoch

    @property
    def revoked(self) -> dict[str, str]:
        """Revocations that were seen here: writer -> the object's text."""
        return dict(self._state.revoked)

    def opened(self, slot: str) -> None:
        """Remember which slot opened."""
        if slot != self._state.slot:
            self._state.slot = slot
            self._store()

    def saw_epoch(self, epoch: int) -> None:
        """Remember the newest epoch."""
        if epoch > self._state.epoch:
            self._state.epoch = epoch
            self._store()

    def saw_revocations(self, found: dict[str, str]) -> None:
        """Remember revocations, beside those that are known."""
        more = {writer: text for writer, text in found.items() if writer not in self._state.revoked}
        if more:
            self._state.revoked = {**self._state.revoked, **more}
            self._store()

    def _load(self) -> _State:
        try:
            with open(self._path, "rb") as file:
                return msgspec.json.decode(file.read(_MAX_STATE), type=_State)
        except (OSError, msgspec.DecodeError, UnicodeError, RecursionError):
            return _State()

    def _store(self) -> None:
        _write(self._path, msgspec.json.encode(self._state))


class PlaceMemory:
    """Whether the repository at a place (a storage's URL) was encrypted when it was used here."""

    def __init__(self, url: str) -> None:
        name = _native.blake3(url.encode(errors="surrogateescape"))[:16].hex()
        self.path = os.path.join(config.state_dir(), "encrypted", name)

    @property
    def encrypted(self) -> str:
        """Id of the encrypted repository that was here; empty where none is remembered."""
        try:
            with open(self.path, "rb") as file:
                found = file.read(100).decode(errors="replace")
        except OSError:
            return ""
        return found if is_id(found) else ""

    def saw(self, repository: str) -> None:
        """Remember an encrypted one."""
        if self.encrypted != repository:
            _write(self.path, repository.encode())

    def forget(self) -> None:
        """Another one was made here on purpose."""
        try:
            os.unlink(self.path)
        except OSError:
            pass  # It was not there, or it stays and the next use asks for a person.


def _write(path: str, content: bytes) -> None:
    staged = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        fd = os.open(staged, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        os.replace(staged, path)
    except OSError:
        pass  # It is an aid and a second guard; the first ones are in the repository.
