"""`imager check`: the repository's structure, and the bytes of its packs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from imager.cli.group import verb
from imager.cli.options import THREADS
from imager.cli.shell import Shell
from imager.cli.style import count
from imager.errors import EXIT_DONE, EXIT_INTEGRITY
from imager.units import format_size

if TYPE_CHECKING:
    from imager.repository.check import Summary


@verb("check")
@click.option(
    "--read-data",
    metavar="WHAT",
    is_flag=False,
    flag_value="all",
    help="Read packs and index too: all (without WHAT), a part N/M, a share like 10%, or an amount like 5G.",
)
@click.option(
    "--repair",
    is_flag=True,
    help="Set damaged packs aside, rebuild the index, remove what dead writers left.",
)
@click.option("--threads", type=THREADS, default=0, metavar="N", help="Worker threads; 0: one for each core.")
def command(shell: Shell, read_data: str | None, repair: bool, threads: int) -> int:
    """Check that the repository is whole.

    Without --read-data: config, keys, manifests and their chains, block maps,
    and that every pack they name is there. Exit 30 where something is damaged;
    each finding names the object, and the bytes of each set that it costs.
    """
    opening = shell.open(writing=repair)
    from imager.repository import check

    with shell.reporter() as reporter:
        summary = check.check(opening.unlock(), reporter, read_data=read_data, repair=repair, threads=threads)
    if shell.json:
        shell.message("summary", summary)
    else:
        _print(shell, summary)
    return EXIT_DONE if summary.ok else EXIT_INTEGRITY


def _print(shell: Shell, summary: Summary) -> None:
    for problem in summary.problems:
        shell.print(f"{'repaired' if problem.repaired else 'DAMAGED'}: {problem}")
    for line in (*summary.notes, *summary.repaired):
        shell.print(line)
    read = f"{summary.packs_read} of {count(summary.packs, 'pack')} read ({format_size(summary.bytes_read)})"
    verdict = "the repository is whole" if summary.ok else "the repository is DAMAGED"
    shell.print(f"{verdict}: {count(summary.sets, 'set')}, {count(summary.pages, 'map page')}, {read}")
