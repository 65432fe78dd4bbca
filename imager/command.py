"""The one place that starts other programs.

Invariant: a program gets a fixed argument vector, never a shell; its output
is captured in the C locale; a missing or failing program is a `CommandError`
that names it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence

from imager.errors import CommandError

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


def _path() -> str:
    return f"{os.environ.get('PATH', '/usr/bin:/bin')}:{SBIN}"


def find(program: str) -> str | None:
    """Where `program` is, the administrator's folders included; None if it is not there."""
    return shutil.which(program, path=_path())


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
    program = find(argv[0]) if "/" not in argv[0] else argv[0]
    if program is None:
        raise CommandError(
            f"{argv[0]} is not installed", hint=hint or f"install the package that holds {argv[0]}"
        )
    environment = {**os.environ, "LC_ALL": "C", "PATH": _path(), **(env or {})}
    try:
        done = subprocess.run(
            [program, *argv[1:]],
            input=stdin,
            capture_output=True,
            timeout=timeout,
            env=environment,
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


def text(argv: Sequence[str], **options: object) -> str:
    """Standard output of `run(argv)`, decoded."""
    return run(argv, **options).stdout.decode(errors="replace")  # type: ignore[arg-type]
