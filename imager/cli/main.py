"""`imager`: from the arguments to an exit code.

Invariant: whatever happens, the program ends with a documented exit code and,
where it failed, one message on standard error that says what and what next;
a Python trace only where IMAGER_DEBUG asks for it.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

import click

from imager import __version__
from imager.cli.group import LazyGroup
from imager.cli.shell import Settings
from imager.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, ImagerError, Interrupted, UsageError

# Imports make many objects that stay: looking through them again and again is a tenth of the start.
gc.set_threshold(50_000, 20, 50)

VERBS = (
    "init",
    "devices",
    "backup",
    "list",
    "show",
    "diff",
    "verify",
    "check",
    "sync",
    "restore",
    "map",
    "serve",
    "doctor",
    "forget",
    "pin",
    "prune",
    "retain",
    "key",
    "lab",
    "completion",
)

group = LazyGroup(
    name="imager",
    modules={verb: f"imager.cli.verbs.{verb}" for verb in VERBS},
    help="""Images of disks, kept in a repository, restored with every hash verified.

    \b
    SET is a set's id or a unique prefix of it, latest, NAME (the newest of
    that name) or NAME@TIME; SET:DISK and SET:DISK:N name a disk and a partition.

    Every option has an environment variable: IMAGER_REPO, IMAGER_PROGRESS,
    IMAGER_BACKUP_COMPRESSION and so on. The passphrase comes from a prompt, or
    from IMAGER_PASSPHRASE, IMAGER_PASSPHRASE_FILE or IMAGER_PASSPHRASE_COMMAND;
    docs/reference/environment.md has every way, in its order.
    """,
    epilog="Exit codes: 0 done, 1 failed or differs, 2 usage, 3 incomplete, 10 no repository, "
    "11 locked, 12 wrong key, 20 refused by the write guard, 21 not confirmed, 30 damage, 130 interrupted.",
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "IMAGER"},
)
click.version_option(__version__, message="imager %(version)s")(group)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    if (retry := sys.modules.get("imager.storage.retry")) is not None:
        retry.give_up()
    # No subclass of Exception: nothing on the way that forgives errors may take it for one.
    raise KeyboardInterrupt(signal.Signals(number).name)


def _as_error(error: BaseException) -> ImagerError | None:
    """The error in this program's terms; None where it's not one that was foreseen."""
    if isinstance(error, ImagerError):
        return error
    if isinstance(error, click.UsageError):
        where = error.ctx.command_path if error.ctx else "imager"
        message = error.format_message().rstrip(".")
        return UsageError(message[:1].lower() + message[1:], hint=f"see {where} --help")
    if isinstance(error, click.ClickException):
        return UsageError(error.format_message())
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return Interrupted(f"interrupted by {error}" if str(error) else "interrupted")
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: " if error.filename else ""
        return ImagerError(f"{what}{error.strerror}")
    return None


def report(error: ImagerError, *, as_json: bool) -> None:
    """Say what went wrong on standard error."""
    from imager.cli.shell import encode
    from imager.cli.style import clean, paint

    if as_json:
        fields = {
            "kind": error.kind,
            "exit_code": error.exit_code,
            "message": error.message,
            "hint": error.hint,
        }
        text = encode({"message_type": "error", **fields})
    else:
        text = f"{paint('error:', 'red', sys.stderr)} {clean(error.message)}"
        if error.hint:
            text += f"\n\n{paint('hint:', 'cyan', sys.stderr)} {clean(error.hint)}"
    sys.stderr.write(text + "\n")


def run(arguments: Sequence[str]) -> int:
    """Do what `arguments` ask for; the exit code."""
    settings = Settings()
    try:
        code = group.main(list(arguments), prog_name="imager", obj=settings, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else EXIT_DONE
    except BrokenPipeError:
        # Whoever read our output has gone. Nobody is left to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except BaseException as caught:
        if os.environ.get("IMAGER_DEBUG"):
            import traceback

            traceback.print_exc()
        error = _as_error(caught)
        if error is None:
            if not isinstance(caught, Exception):
                raise
            error = ImagerError(
                f"internal error: {type(caught).__name__}: {caught}",
                hint="this is a defect of imager; run it again with IMAGER_DEBUG=1 to see where it happened",
            )
            error.kind = "internal"
        report(error, as_json=settings.json or "--json" in arguments)
        return error.exit_code


def main() -> NoReturn:
    """The console script."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (BrokenPipeError, ValueError):
        code = code or EXIT_FAILED
    # A thread may still sit in native code (a key derivation, say); to wind the interpreter up
    # under it would abort the process. All that has to be durable is, so there is nothing to wind up.
    os._exit(code)


if __name__ == "__main__":
    main()
