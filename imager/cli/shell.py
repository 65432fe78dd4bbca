"""What every verb is handed: the global settings, and the ways out of the program.

Invariant: standard output carries results only: text for a person, or JSON
where `--json` was given. Everything else goes to standard error. (A long job
with `--json` is a stream of JSON Lines on standard output; its last line is
the summary.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imager.cli.style import clean
from imager.errors import UsageError

if TYPE_CHECKING:
    from imager.cli.reporters import TerminalReporter
    from imager.repository.credentials import Credentials
    from imager.repository.repository import Opening, Repository
    from imager.storage.base import Storage
    from imager.storage.limit import Paces

PROGRESS_MODES = ("auto", "plain", "json", "none")


@dataclass(slots=True)
class Settings:
    """The global options, as they stood before and after the verb and in the environment."""

    repo: str | None = None
    passphrase_file: str | None = None
    passphrase_command: str | None = None
    passphrase_fd: int | None = None
    keyfile: str | None = None
    limit_upload: int | None = None
    limit_download: int | None = None
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
        self._paces: Paces | None = None

    # --- what comes out ------------------------------------------------------

    def print(self, text: str = "") -> None:
        """A line of the result. Call it only where `json` is false."""
        sys.stdout.write(clean(text) + "\n")

    def page(self, text: str) -> None:
        """Lines of this program's own making: a picture, a script."""
        sys.stdout.write(text.rstrip() + "\n")

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

    def credentials_of(self, keyfile: str | None, passphrase_file: str | None) -> Credentials:
        """Where the secret of a second repository comes from; where nothing is named, as for the first."""
        from imager.repository.credentials import Credentials

        if keyfile is None and passphrase_file is None:
            return self.credentials()
        return Credentials(keyfile=keyfile, passphrase_file=passphrase_file, interactive=False)

    def open(self, *, writing: bool = False, cached: bool = False) -> Opening:
        """Begin to open the repository: the key slots are tried while the verb gets ready.

        `cached`: copies of what a far repository holds may be used; not where damage is looked for.
        Call `unlock()` on the result. Raises `NoRepository`, `WrongKey`, `UsageError`.
        """
        storage = self.storage(self.repository_name(), cached=cached)
        from imager.repository.repository import Repository

        return Repository.begin(storage, self.credentials(), writing=writing)

    def storage(self, place: str, *, cached: bool = False) -> Storage:
        """The storage at `place`, with the limits that the settings ask for. Raises `UsageError`.

        All that are opened so keep the limits together.
        """
        from imager.storage.location import open_storage

        if self._paces is None and (self.settings.limit_upload or self.settings.limit_download):
            from imager.storage.limit import Limits, Paces

            self._paces = Paces(Limits(self.settings.limit_upload, self.settings.limit_download))
        return open_storage(place, self._paces, cached=cached)

    def open_keyless(self, *, writing: bool = False) -> Callable[[], Repository]:
        """What opens the repository without a secret. Raises `UsageError`."""
        place = self.repository_name()

        def opening() -> Repository:
            from imager.repository.keyless import open_keyless

            return open_keyless(self.storage(place), writing=writing)

        return opening


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
