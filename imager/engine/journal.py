"""How far a restore has come, for `--resume`.

Invariant: a range stands in the journal only after the target was flushed,
so what is listed is on the medium, in whichever version of the journal
survives a crash. A journal speaks of one set, one disk and one target; one
that cannot be read, or speaks of another, is no journal.
"""

from __future__ import annotations

import hashlib
import os

import msgspec

from imager import config
from imager.errors import ImagerError
from imager.extents import Extents


class _State(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    target: str
    place: list[int]
    set: str
    disk: str
    size: int
    block_size: int
    done: list[tuple[int, int]] = []
    begun: tuple[int, int] | None = None
    zeroed: bool = False


class Journal:
    """Finished ranges of block numbers of one restore.

    `target` is the target's identity key, `place` tells this very file
    (device, inode) or this attachment of a device from a later one. `zeroed`:
    whether what is unused is zeroed in the finished ranges.
    """

    def __init__(
        self,
        *,
        target: str,
        place: tuple[int, int],
        set_id: str,
        disk: str,
        size: int,
        block_size: int,
        zeroed: bool = False,
    ) -> None:
        self._state = _State(1, target, list(place), set_id, disk, size, block_size, zeroed=zeroed)
        name = hashlib.sha256("\0".join((target, set_id, disk)).encode(errors="surrogateescape")).hexdigest()
        self.path = os.path.join(config.state_dir(), "restores", f"{name[:32]}.json")

    @property
    def done(self) -> Extents:
        """Blocks that are written and flushed."""
        return Extents.of(self._state.done)

    @property
    def begun(self) -> Extents:
        """Blocks of the window that was being written."""
        return Extents.of([self._state.begun] if self._state.begun else [])

    def place(self, dev: int, inode: int) -> None:
        """The target has been made only now: this is the very file."""
        self._state.place = [dev, inode]

    def load(self) -> bool:
        """Take up an earlier run's state; False where there is none that fits."""
        try:
            with open(self.path, "rb") as file:
                state = msgspec.json.decode(file.read(64 << 20), type=_State)
        except (OSError, msgspec.DecodeError, UnicodeError, RecursionError):
            return False
        blocks = -(-self._state.size // self._state.block_size)
        ranges = [*state.done, *([state.begun] if state.begun else [])]
        mine = msgspec.structs.replace(self._state, done=state.done, begun=state.begun)
        if state != mine or any(not 0 <= start <= end <= blocks for start, end in ranges):
            return False
        self._state = state
        return True

    def begin(self, start: int, end: int) -> None:
        """The blocks `[start, end)` are going to be written. Raises `ImagerError`."""
        self._state.begun = (start, end)
        self._save()

    def finish(self) -> None:
        """What was begun is written and flushed. Raises `ImagerError`."""
        if self._state.begun is not None:
            done = Extents.of([*self._state.done, self._state.begun])
            self._state.done, self._state.begun = list(done.ranges), None
            self._save()

    def remove(self) -> None:
        """The restore is complete."""
        try:
            os.unlink(self.path)
        except OSError:
            pass  # it names finished ranges of this very target only: true, if of no use

    def _save(self) -> None:
        folder = os.path.dirname(self.path)
        try:
            os.makedirs(folder, 0o700, exist_ok=True)
            staged = f"{self.path}.{os.getpid()}"
            fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, msgspec.json.encode(self._state))
            finally:
                os.close(fd)
            os.rename(staged, self.path)
        except OSError as error:
            raise ImagerError(
                f"cannot keep the restore's state in {folder}: {error.strerror}",
                hint="set IMAGER_STATE_DIR to a folder that can be written",
            ) from error
