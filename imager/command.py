"""The one place that starts other programs.

Invariant: a program gets a fixed argument vector, never a shell; its output
is captured in the C locale; a missing or failing program is a `CommandError`
that names it. One that runs beside this one (`Piped`) never outlives it: its
input ends with this process.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence

from imager.errors import CommandError

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def _path() -> str:
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:{SBIN}"


def find(program: str) -> str | None:
    """Where `program` is, the administrator's folders included; None if it is not there."""
    return shutil.which(program, path=_path())


def _program(name: str, hint: str | None) -> str:
    program = find(name)
    if program is None:
        raise CommandError(f"{name} is not installed", hint=hint or f"install the package that holds {name}")
    return program


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "PATH": _path(), **(more or {})}


def run(
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    ok: tuple[int, ...] = (0,),
    timeout: float | None = 600,
    env: Mapping[str, str] | None = None,
    hint: str | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run `argv` to its end and return it with its output.

    Raises `CommandError` where the program is missing, ends with a code that
    is not in `ok`, or takes longer than `timeout` seconds.
    """
    program = _program(argv[0], hint) if "/" not in argv[0] else argv[0]
    try:
        done = subprocess.run(
            [program, *argv[1:]],
            input=stdin,
            capture_output=True,
            timeout=timeout,
            env=_environment(env),
            check=False,
        )
    except FileNotFoundError as error:
        raise CommandError(f"{argv[0]} is not installed", hint=hint) from error
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"{argv[0]} did not end within {timeout} s", hint=hint) from error
    if done.returncode not in ok:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        said = lines[-1] if lines else "no message"
        raise CommandError(f"{argv[0]} ended with code {done.returncode}: {said}", hint=hint)
    return done


def attached(argv: Sequence[str]) -> int:
    """Run a command of the user's with this program's own input and output, and as it is found by them.

    Its exit code; 128 and the signal's number where one ended it. Raises `CommandError` where it
    cannot be run.
    """
    try:
        with subprocess.Popen(argv) as running:
            code = running.wait()
    except OSError as error:
        raise CommandError(f"cannot run {argv[0]}: {error.strerror}") from error
    return code if code >= 0 else 128 - code


def text(argv: Sequence[str], **options: object) -> str:
    """Standard output of `run(argv)`, decoded."""
    return run(argv, **options).stdout.decode(errors="replace")  # type: ignore[arg-type]


class Piped:
    """A program that runs beside this one, spoken to through pipes.

    A Ctrl-C on the terminal is for this process alone: it decides when the other one ends.
    """

    _KEPT = 8 << 10

    def __init__(self, argv: Sequence[str], *, hint: str | None = None) -> None:
        """Start `argv`. Raises `CommandError` where the program is missing or can't be run."""
        program = _program(argv[0], hint)
        # Blocked signals stay blocked in the child, from whichever thread it is started.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [program, *argv[1:]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=_environment(None),
            )
        except OSError as error:
            raise CommandError(f"{argv[0]} cannot be run: {error.strerror}", hint=hint) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self.stdin: int = self._process.stdin.fileno()
        "The descriptor that the program reads from."
        self.stdout: int = self._process.stdout.fileno()
        "The descriptor of what it writes."
        self._said = b""
        self._listener = threading.Thread(target=self._listen, name="stderr", daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def _listen(self) -> None:
        assert self._process.stderr
        while data := self._process.stderr.read(4096):
            self._said = (self._said + data)[-self._KEPT :]

    def said(self) -> list[str]:
        """The last lines of what it wrote to standard error."""
        return [line for line in self._said.decode(errors="replace").splitlines() if line.strip()]

    def wait(self, timeout: float) -> int | None:
        """Its exit code, once what it said is here; None where it still runs after `timeout` seconds."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        self._listener.join(min(timeout, 1))  # Whoever it started may hold its standard error open for long.
        return code

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()

    def hang_up(self) -> None:
        """End its input. Nobody may write to `stdin` after this."""
        assert self._process.stdin
        self._process.stdin.close()

    def end(self, timeout: float = 5) -> None:
        """End it, gently at first. Nobody may use its descriptors after this."""
        assert self._process.stdout and self._process.stderr
        self.hang_up()
        if self.wait(timeout) is None:
            self._process.terminate()
            if self.wait(timeout) is None:
                self.kill()
        self._process.stdout.close()
        if not self._listener.is_alive():
            self._process.stderr.close()
