"""`imager verify`: read, decrypt and hash every block of a set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from imager.cli.group import verb
from imager.cli.options import THREADS
from imager.cli.shell import Shell
from imager.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTEGRITY
from imager.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from imager.engine.verify import VerifySummary


@verb("verify")
@click.argument("set_text", metavar="SET")
@click.option("--against", metavar="DEVICE", help="Compare with DEVICE or a file as well.")
@click.option("--threads", type=THREADS, default=0, metavar="N", help="Worker threads; 0: one for each core.")
def command(shell: Shell, set_text: str, against: str | None, threads: int) -> int:
    """Read every block of SET back and check its hash.

    Exit 30 where something is damaged, with the extents of the disk that a
    restore could not give back; exit 1 where only DEVICE differs.
    """
    opening = shell.open()
    from imager.engine import verify

    with shell.reporter() as reporter:
        summary = verify.verify(opening.unlock(), set_text, reporter, against=against, threads=threads)
    if shell.json:
        shell.message("summary", summary)
    else:
        _print(shell, summary)
    if summary.damage:
        return EXIT_INTEGRITY
    return EXIT_DONE if summary.ok else EXIT_FAILED


def _print(shell: Shell, summary: VerifySummary) -> None:
    for one in summary.damage:
        pack = f" (pack {one.pack})" if one.pack else ""
        shell.print(f"DAMAGED: {one.disk}: {one.length} bytes at {one.start}: {one.reason}{pack}")
    for disk, start, length in summary.unreadable:
        shell.print(f"missing: {disk}: {length} bytes at {start} could not be read at backup")
    for disk, start, length in summary.differing:
        shell.print(f"differs: {disk}: {length} bytes at {start} are others on {summary.against}")
    verdict = f"{format_size(summary.damaged_bytes)} DAMAGED" if summary.damage else "every block is whole"
    if summary.against is not None:
        different = sum(length for _, _, length in summary.differing)
        same = f"{format_size(different)} differ from" if different else "equal to"
        verdict += f", {same} {summary.against}" + (" where it is in use" if summary.unused else "")
    took = f"in {format_duration(summary.seconds)} ({format_rate(summary.bytes, summary.seconds)})"
    shell.print(f"{summary.name} {summary.set[:8]}: {verdict}; {format_size(summary.bytes)} of data {took}")
