"""Where a passphrase, a keyfile or a recovery key comes from.

Invariant: a secret arrives by environment, file, descriptor, command or terminal,
never in an argument of this program or another, and never in a message.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection

from msgspec import Struct

from imager.errors import UsageError, WrongKey
from imager.repository import recovery_key
from imager.repository.keys import MAX_KEYFILE, Secret, keyfile, passphrase, recovery

_MAX_PASSPHRASE = 64 << 10
HINT = "set IMAGER_PASSPHRASE_FILE or IMAGER_PASSPHRASE_COMMAND, or give --keyfile"
_NAMES = {"passphrase": "passphrase", "keyfile": "keyfile", "recovery": "recovery key"}
_STANDARD = "-"
"As the name of a file with a recovery key: ask at the terminal, or read standard input."


class Credentials(Struct, frozen=True):
    """The ways a caller offers; what the options leave open, the environment says.

    Paths, a descriptor and a command, not secrets. `interactive`: a person at a terminal may
    be asked. `prefix`: of the variables in the environment; IMAGER_NEW_ for the secret of a new slot.
    """

    keyfile: str | None = None
    passphrase_file: str | None = None
    passphrase_command: str | None = None
    interactive: bool = True
    passphrase_fd: int | None = None
    recovery_key_file: str | None = None
    prefix: str = "IMAGER_"

    def obtain(self, kinds: Collection[str]) -> Secret:
        """A secret for a repository whose slots are of these kinds.

        The options are looked at first, then the environment, then what systemd
        passes on, and last a person is asked. Within each: recovery key, keyfile, passphrase. What has no
        slot is passed over. Raises `WrongKey` where none is offered, `UsageError` where what is
        offered cannot be read.
        """
        passed: list[str] = []
        for sources in (self._options(), self._environment(), self._systemd()):
            for kind, source in sources:
                if kind in kinds:
                    return source()
                passed.append(kind)
        if self.interactive and _terminal():
            if "passphrase" in kinds:
                return passphrase(_ask("Passphrase of the repository: "))
            if "recovery" in kinds:
                return recovery(recovery_key.decode(_ask("Recovery key of the repository: ")))
        if passed:
            raise WrongKey(
                f"the repository has no slot for a {_NAMES[passed[0]]}",
                hint="it opens with a " + " or a ".join(sorted(_NAMES[kind] for kind in kinds)),
            )
        if "passphrase" in kinds:
            raise WrongKey("the repository is locked and no passphrase was given", hint=HINT)
        raise WrongKey("the repository is locked and no keyfile was given", hint="give --keyfile FILE")

    def choose(self, kind: str, *, option: str = "--keyfile") -> Secret:
        """The secret of a new slot: asked for twice on a terminal; a missing keyfile is made.

        `kind`: passphrase or keyfile; `option`: what names a keyfile, for messages. Raises `UsageError`.
        """
        if kind == "keyfile":
            path = self.keyfile or self._variable("KEYFILE")
            if not path:
                raise UsageError(
                    "no keyfile named", hint=f"give {option} FILE; it is made if it does not exist"
                )
            if not os.path.lexists(path):
                _make_keyfile(path)
            return keyfile(_read(path, MAX_KEYFILE, "keyfile"))
        for sources in (self._options(), self._environment()):
            for found, source in sources:
                if found == kind:
                    return source()
        if not (self.interactive and _terminal()):
            raise UsageError("no passphrase was given", hint=f"{self._hint()}, or choose another kind of key")
        text = _ask("New passphrase: ")
        if _ask("The same again: ") != text:
            raise UsageError("the two passphrases differ", hint="try again; nothing was created")
        return passphrase(text)

    def _hint(self) -> str:
        names = [f"{self.prefix}PASSPHRASE_{name}" for name in ("FILE", "COMMAND")]
        return f"set {names[0]} or {names[1]}"

    def _variable(self, name: str) -> str | None:
        return os.environ.get(self.prefix + name)

    # --- the sources, in their order: (kind, how to get it) -----------------------------

    def _options(self) -> list[Source]:
        found: list[Source] = []
        if self.recovery_key_file:
            found.append(("recovery", _from_recovery_file(self.recovery_key_file)))
        if self.keyfile:
            found.append(("keyfile", _from_keyfile(self.keyfile)))
        if self.passphrase_fd is not None:
            found.append(("passphrase", _from_descriptor(self.passphrase_fd)))
        if self.passphrase_file:
            found.append(("passphrase", _from_file(self.passphrase_file)))
        if self.passphrase_command:
            found.append(("passphrase", _from_command(self.passphrase_command)))
        return found

    def _environment(self) -> list[Source]:
        found: list[Source] = []
        if (key := self._variable("RECOVERY_KEY")) is not None:
            found.append(("recovery", lambda: recovery(recovery_key.decode(key))))
        if path := self._variable("RECOVERY_KEY_FILE"):
            found.append(("recovery", _from_recovery_file(path)))
        if path := self._variable("KEYFILE"):
            found.append(("keyfile", _from_keyfile(path)))
        if (text := self._variable("PASSPHRASE")) is not None:
            found.append(("passphrase", lambda: passphrase(text)))
        if number := self._variable("PASSPHRASE_FD"):
            if not number.isdecimal():
                raise UsageError(f"{self.prefix}PASSPHRASE_FD is not the number of a descriptor")
            found.append(("passphrase", _from_descriptor(int(number))))
        if path := self._variable("PASSPHRASE_FILE"):
            found.append(("passphrase", _from_file(path)))
        if command := self._variable("PASSPHRASE_COMMAND"):
            found.append(("passphrase", _from_command(command)))
        return found

    def _systemd(self) -> list[Source]:
        """What a unit gets with LoadCredential= or LoadCredentialEncrypted=."""
        folder = os.environ.get("CREDENTIALS_DIRECTORY")
        if not folder:
            return []
        found: list[Source] = []
        if os.path.exists(path := os.path.join(folder, "imager.keyfile")):
            found.append(("keyfile", _from_keyfile(path)))
        if os.path.exists(path := os.path.join(folder, "imager.passphrase")):
            found.append(("passphrase", _from_file(path)))
        return found


Source = tuple[str, Callable[[], Secret]]


def _from_keyfile(path: str) -> Callable[[], Secret]:
    return lambda: keyfile(_read(path, MAX_KEYFILE, "keyfile"))


def _from_file(path: str) -> Callable[[], Secret]:
    return lambda: passphrase(_line(_read(path, _MAX_PASSPHRASE, "passphrase file"), "the passphrase file"))


def _from_descriptor(number: int) -> Callable[[], Secret]:
    def read() -> Secret:
        content = b""
        try:
            while len(content) <= _MAX_PASSPHRASE and (part := os.read(number, _MAX_PASSPHRASE + 1)):
                content += part
        except OSError as error:
            raise UsageError(
                f"cannot read the passphrase from descriptor {number}: {error.strerror}",
                hint="open it for the command: imager --passphrase-fd 3 ... 3< FILE",
            ) from error
        if len(content) > _MAX_PASSPHRASE:
            raise UsageError(f"descriptor {number} gives more than {_MAX_PASSPHRASE} bytes")
        return passphrase(_line(content, f"descriptor {number}"))

    return read


def _from_command(command: str) -> Callable[[], Secret]:
    def run() -> Secret:
        import shlex

        from imager import command as programs

        try:
            argv = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"the passphrase command cannot be split into words: {error}") from error
        if not argv:
            raise UsageError("the passphrase command is empty")
        done = programs.run(argv, hint="run it by hand: it must print the passphrase")
        return passphrase(_line(done.stdout, "the passphrase command"))

    return run


def _from_recovery_file(path: str) -> Callable[[], Secret]:
    def read() -> Secret:
        if path != _STANDARD:
            content = _read(path, _MAX_PASSPHRASE, "recovery key file")
        elif _terminal():
            content = _ask("Recovery key of the repository: ").encode("utf-8", "replace")
        else:
            content = sys.stdin.buffer.read(_MAX_PASSPHRASE)
        return recovery(recovery_key.decode(content.decode("utf-8", "replace")))

    return read


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
