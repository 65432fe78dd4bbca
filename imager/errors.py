"""Every way an operation can end badly, and the exit code each one has.

Invariant: an error that reaches the user is an `ImagerError`. It says what
happened and to what (`message`) and, where there is something to do next,
`hint`. The exit code belongs to the class and is part of the command's
contract (docs/reference/exit-codes.md).
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INCOMPLETE = 3
EXIT_NO_REPOSITORY = 10
EXIT_LOCKED = 11
EXIT_WRONG_KEY = 12
EXIT_GUARD = 20
EXIT_NOT_CONFIRMED = 21
EXIT_INTEGRITY = 30
EXIT_DRILL = 31
EXIT_INTERRUPTED = 130


class ImagerError(Exception):
    """An operation failed. `kind` is a stable word for `--json`."""

    exit_code = EXIT_FAILED
    kind = "failed"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(ImagerError):
    """The request itself makes no sense: options, names, sizes."""

    exit_code = EXIT_USAGE
    kind = "usage"


class SourceError(ImagerError):
    """A source cannot be read, shrank, or vanished."""

    kind = "source"


class TargetError(ImagerError):
    """A target cannot be written or did not keep what was written."""

    kind = "target"


class StorageError(ImagerError):
    """The repository's storage refused a call: full, gone, not permitted."""

    kind = "storage"


class CommandError(ImagerError):
    """A system tool is missing or failed."""

    kind = "command"


class NoRepository(ImagerError):
    """There is no repository at the place named, or one of a future format."""

    exit_code = EXIT_NO_REPOSITORY
    kind = "no-repository"


class Locked(ImagerError):
    """This writer was fenced: its session has been declared dead."""

    exit_code = EXIT_LOCKED
    kind = "locked"


class WrongKey(ImagerError):
    """No key slot opens with the secret given."""

    exit_code = EXIT_WRONG_KEY
    kind = "wrong-key"


class GuardRefused(ImagerError):
    """The write guard refuses this target. Nothing was written."""

    exit_code = EXIT_GUARD
    kind = "guard"


class NotConfirmed(ImagerError):
    """The target was not confirmed by its identity. Nothing was written."""

    exit_code = EXIT_NOT_CONFIRMED
    kind = "not-confirmed"


class IntegrityError(ImagerError):
    """Stored data is not what was stored: damaged, swapped, or replayed."""

    exit_code = EXIT_INTEGRITY
    kind = "integrity"


class Interrupted(ImagerError):
    """The person or the system asked to stop."""

    exit_code = EXIT_INTERRUPTED
    kind = "interrupted"
