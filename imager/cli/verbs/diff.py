"""`imager diff`: which extents differ between two sets, two devices, or a set and a device."""

from __future__ import annotations

import sys

import click

from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.errors import EXIT_DONE, EXIT_FAILED


@verb("diff")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json", "bmap", "ddrescue"]),
    default="text",
    show_default=True,
    help="How the extents are written; the last three can be given to backup --changed.",
)
def command(shell: Shell, a: str, b: str, form: str) -> int:
    """Show the extents that differ between A and B.

    Each is a set, or a device or file (a name with a slash). Exit 0 where they
    are equal, 1 where they differ.
    """
    opening = None if "/" in a and "/" in b else shell.open()
    from imager.changes import formats
    from imager.engine import diff

    with shell.reporter(long_job=False) as reporter:
        repository = opening.unlock() if opening else None
        summary = diff.diff(repository, a, b, reporter)
    if shell.json or form == "json":
        shell.document(summary)
    else:
        sys.stdout.write(formats.write(summary, form))
    return EXIT_FAILED if summary.differs else EXIT_DONE
