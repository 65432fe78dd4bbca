"""`imager check`: the repository's structure, and the bytes of its packs."""

from __future__ import annotations

import click

from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.errors import EXIT_DONE, EXIT_INTEGRITY
from imager.units import format_size


@verb("check")
@click.option(
    "--read-data",
    metavar="WHAT",
    is_flag=False,
    flag_value="all",
    help="Read packs back too: all (without WHAT), a part N/M, a share like 10%, or an amount like 5G.",
)
@click.option("--repair", is_flag=True, help="Rebuild what can be rebuilt from the rest.")
def command(shell: Shell, read_data: str | None, repair: bool) -> int:
    """Check that the repository is whole.

    Exit 30 where something is damaged; each finding names the object and the
    sets that it belongs to.
    """
    opening = shell.open(writing=repair)
    from imager.repository import check

    with shell.reporter() as reporter:
        summary = check.check(opening.unlock(), reporter, read_data=read_data, repair=repair)
    if shell.json:
        shell.message("summary", summary)
    else:
        for problem in summary.problems:
            shell.print(f"damaged: {problem}")
        shell.print(
            f"{'whole' if summary.ok else 'DAMAGED'}: {summary.sets} sets, {summary.packs} packs,"
            f" {format_size(summary.bytes_read)} read"
        )
    return EXIT_DONE if summary.ok else EXIT_INTEGRITY
