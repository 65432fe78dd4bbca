"""`imager key export`: a recovery sheet to print and put away."""

from __future__ import annotations

import os
import sys

import click

from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.errors import UsageError


@verb("export")
@click.option("--label", metavar="TEXT", default="", help="What to call the slot of the recovery key.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "html", "svg", "png"]),
    default="text",
    show_default=True,
    help="The sheet as text or as a page for a browser; or its QR code alone.",
)
@click.option("--out", metavar="FILE", help="Write it to the new FILE, which only you can read.")
def command(shell: Shell, label: str, form: str, out: str | None) -> None:
    """Make a recovery key, and print its sheet: key, QR code, and what they open.

    The key is shown this once. It opens the repository in full, also when
    every passphrase is forgotten. Print the sheet, and keep it away from the repository.
    """
    if form in ("svg", "png") and out is None and sys.stdout.isatty():
        raise UsageError("a picture does not go to a terminal", hint="name a file with --out FILE")
    opening = shell.open(writing=True)
    from imager.repository import keyring
    from imager.repository.recovery_sheet import render

    repository = opening.unlock()
    with keyring.recovery(repository, label=label) as sheet:
        content = render(sheet, form, on_dark=out is None and sys.stdout.isatty())
        if out is not None:
            _write_new(out, content)
        elif not shell.json:
            sys.stdout.flush()
            sys.stdout.buffer.write(content)
            sys.stdout.flush()
    if shell.json:
        key = sheet.key if out is None else None
        shell.document({"slot": sheet.slot, "repository": sheet.repository, "out": out, "recovery_key": key})
    elif out is not None:
        shell.print(
            f"wrote the recovery sheet of key slot {sheet.slot[:8]} to {out}: print it, then delete it"
        )


def _write_new(path: str, content: bytes) -> None:
    try:
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise UsageError(f"{path} exists", hint="a sheet goes into a new file") from error
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
