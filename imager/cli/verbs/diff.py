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

    Each is a set, or a device or file (a name with a slash). The text form has
    a line for each extent: start and length in bytes. Exit 0 where they are
    equal, 1 where they differ.
    """
    from imager.engine import diff

    opening = None if diff.is_file(a) and diff.is_file(b) else shell.open(cached=True)
    with shell.reporter(long_job=False) as reporter:
        summary = diff.diff(opening.unlock() if opening else None, a, b, reporter)
    if shell.json or form == "json":
        shell.document(summary)
    else:
        from imager.changes import formats

        sys.stdout.write(formats.render(form, summary.extents, summary.size).decode())
    return EXIT_FAILED if summary.differs else EXIT_DONE
