"""What every verb is handed: the global settings, and the ways out of the program.

Invariant: standard output carries results only: text for a person, or JSON
where `--json` was given. Everything else goes to standard error. (A long job
with `--json` is a stream of JSON Lines on standard output; its last line is
the summary.)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imager.errors import UsageError

if TYPE_CHECKING:
    from imager.cli.reporters import TerminalReporter
    from imager.repository.credentials import Credentials
    from imager.repository.repository import Opening

PROGRESS_MODES = ("auto", "plain", "json", "none")


@dataclass(slots=True)
class Settings:
    """The global options, as they stood before and after the verb and in the environment."""

    repo: str | None = None
    passphrase_file: str | None = None
    passphrase_command: str | None = None
    passphrase_fd: int | None = None
    keyfile: str | None = None
    recovery_key_file: str | None = None
    json: bool = False
    progress: str = "auto"
    verbose: int = 0
    quiet: bool = False


class Shell:
    """The way from a verb to its user, and to the repository that the user named."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.json = settings.json

    # --- what comes out ------------------------------------------------------

    def print(self, text: str = "") -> None:
        """A line of the result. Call it only where `json` is false."""
        sys.stdout.write(text + "\n")

    def document(self, value: object) -> None:
        """The result of a query as one JSON document."""
        sys.stdout.write(encode(value) + "\n")
        sys.stdout.flush()

    def fields(self, value: object) -> dict[str, Any]:
        """The fields of a result, to be joined with others."""
        found: dict[str, Any] = plain(value)
        return found

    def message(self, message_type: str, value: object) -> None:
        """A line of the JSON stream of a long job."""
        self.document({"message_type": message_type, **plain(value)})

    def reporter(self, *, long_job: bool = True) -> TerminalReporter:
        """The reporter that the settings ask for. `long_job`: with `--json`, events join the stream."""
        from imager.cli import reporters

        stream = sys.stdout if self.json and long_job else sys.stderr
        return reporters.choose(self.settings, stream, long_job=long_job)

    # --- the repository ------------------------------------------------------

    def repository_name(self) -> str:
        """What `-r` says. Raises `UsageError`."""
        if not self.settings.repo:
            raise UsageError(
                "no repository was named", hint="name it with -r REPO, or in the environment with IMAGER_REPO"
            )
        return self.settings.repo

    def credentials(self) -> Credentials:
        """Where the secret that opens the repository comes from."""
        from imager.repository.credentials import Credentials

        return Credentials(
            passphrase_file=self.settings.passphrase_file,
            passphrase_command=self.settings.passphrase_command,
            passphrase_fd=self.settings.passphrase_fd,
            keyfile=self.settings.keyfile,
            recovery_key_file=self.settings.recovery_key_file,
        )

    def new_credentials(
        self, *, keyfile: str | None, passphrase_file: str | None, passphrase_command: str | None
    ) -> Credentials:
        """Where the secret of a new key slot comes from: these options, or IMAGER_NEW_ variables."""
        from imager.repository.credentials import Credentials

        return Credentials(
            keyfile=keyfile,
            passphrase_file=passphrase_file,
            passphrase_command=passphrase_command,
            prefix="IMAGER_NEW_",
        )

    def open(self, *, writing: bool = False) -> Opening:
        """Begin to open the repository: the key slots are tried while the verb gets ready.

        Call `unlock()` on the result. Raises `NoRepository`, `WrongKey`, `UsageError`.
        """
        place = self.repository_name()
        from imager.repository.repository import Repository
        from imager.storage.open import open_storage

        return Repository.begin(open_storage(place), self.credentials(), writing=writing)


def plain(value: Any) -> Any:
    """`value` as JSON knows it: extents as `[start, length]`, bytes as hexadecimal digits."""
    from imager.extents import Extents

    if isinstance(value, Extents):
        return [[start, end - start] for start, end in value]
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | frozenset):
        return [plain(one) for one in value]
    names = getattr(value, "__dataclass_fields__", None) or getattr(value, "__struct_fields__", None)
    if names is not None:
        return {name: plain(getattr(value, name)) for name in names}
    return value


def encode(value: object) -> str:
    """Compact JSON of anything that `plain` understands."""
    import msgspec

    return msgspec.json.encode(plain(value)).decode()
