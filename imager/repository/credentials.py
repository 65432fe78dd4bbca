"""Where a passphrase or keyfile comes from.

Invariant: a secret arrives by environment, file, command or terminal, never
in an argument of this program or another, and never in a message.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from dataclasses import dataclass

from imager.errors import UsageError, WrongKey
from imager.repository.keys import MAX_KEYFILE, Secret, keyfile, passphrase

_MAX_PASSPHRASE = 64 << 10
HINT = "set IMAGER_PASSPHRASE_FILE or IMAGER_PASSPHRASE_COMMAND, or give --keyfile"


@dataclass(frozen=True, slots=True)
class Credentials:
    """The ways a caller offers; what an option leaves open, the environment says.

    Paths and a command, not secrets. `interactive`: a person at a terminal may be asked.
    """

    keyfile: str | None = None
    passphrase_file: str | None = None
    passphrase_command: str | None = None
    interactive: bool = True

    def obtain(self, kinds: Collection[str]) -> Secret:
        """A secret for a repository whose slots are of these kinds.

        Raises `WrongKey` where none is offered, `UsageError` where what is offered cannot be read.
        """
        path = self.keyfile or os.environ.get("IMAGER_KEYFILE")
        if path and "keyfile" in kinds:
            return keyfile(_read(path, MAX_KEYFILE, "keyfile"))
        if "passphrase" in kinds:
            text = self._passphrase()
            if text is not None:
                return passphrase(text)
            if self.interactive and _terminal():
                return passphrase(_ask("Passphrase of the repository: "))
            raise WrongKey("the repository is locked and no passphrase was given", hint=HINT)
        if path:
            raise WrongKey("the repository has no slot for a keyfile", hint="give its passphrase")
        raise WrongKey("the repository is locked and no keyfile was given", hint="give --keyfile FILE")

    def choose(self, kind: str) -> Secret:
        """The secret of a new slot (at `init`): asked for twice on a terminal; a missing keyfile is made.

        Raises `UsageError`.
        """
        if kind == "keyfile":
            path = self.keyfile or os.environ.get("IMAGER_KEYFILE")
            if not path:
                raise UsageError(
                    "no keyfile named", hint="give --keyfile FILE; it is made if it does not exist"
                )
            if not os.path.lexists(path):
                _make_keyfile(path)
            return keyfile(_read(path, MAX_KEYFILE, "keyfile"))
        text = self._passphrase()
        if text is not None:
            return passphrase(text)
        if not (self.interactive and _terminal()):
            raise UsageError("no passphrase was given", hint=f"{HINT}, or choose --encryption none")
        text = _ask("New passphrase: ")
        if _ask("The same again: ") != text:
            raise UsageError("the two passphrases differ", hint="try again; nothing was created")
        return passphrase(text)

    def _passphrase(self) -> str | None:
        """From option or environment; None where neither says anything."""
        if self.passphrase_file or self.passphrase_command:
            file, command = self.passphrase_file, self.passphrase_command
        else:
            text = os.environ.get("IMAGER_PASSPHRASE")
            if text is not None:
                return text
            file = os.environ.get("IMAGER_PASSPHRASE_FILE")
            command = os.environ.get("IMAGER_PASSPHRASE_COMMAND")
        if file:
            return _line(_read(file, _MAX_PASSPHRASE, "passphrase file"), "the passphrase file")
        if command:
            import shlex

            from imager import command as programs

            try:
                argv = shlex.split(command)
            except ValueError as error:
                raise UsageError(f"the passphrase command cannot be split into words: {error}") from error
            if not argv:
                raise UsageError("the passphrase command is empty")
            done = programs.run(argv, hint="run it by hand: it must print the passphrase")
            return _line(done.stdout, "the passphrase command")
        return None


def _line(content: bytes, source: str) -> str:
    """The first line; an empty rest is allowed, a second line is not."""
    line, _, rest = content.partition(b"\n")
    if rest.strip():
        raise UsageError(f"{source} gives more than one line", hint="it must hold the passphrase alone")
    try:
        return line.removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} gives no valid UTF-8") from error


def _read(path: str, limit: int, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UsageError(f"cannot read the {what} {path}: {error.strerror}") from error
    if len(content) > limit:
        raise UsageError(f"the {what} {path} is larger than {limit} bytes")
    return content


def _make_keyfile(path: str) -> None:
    """A new random keyfile, readable by its owner alone. Raises `UsageError`."""
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, os.urandom(64))
            os.fsync(fd)
        finally:
            os.close(fd)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # Losing the keyfile to a crash would lose the repository.
        finally:
            os.close(folder)
    except OSError as error:
        raise UsageError(f"cannot make the keyfile {path}: {error.strerror}") from error


def _terminal() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _ask(prompt: str) -> str:
    import getpass

    try:
        return getpass.getpass(prompt, sys.stderr)
    except EOFError as error:
        raise WrongKey("no passphrase was entered", hint=HINT) from error
