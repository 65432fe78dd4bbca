"""`imager verify`: read, decrypt and hash every block of a set."""

from __future__ import annotations

import click

from imager.cli.group import verb
from imager.cli.options import THREADS
from imager.cli.shell import Shell
from imager.errors import EXIT_DONE, EXIT_INTEGRITY
from imager.units import format_size


@verb("verify")
@click.argument("set_text", metavar="SET")
@click.option("--against", metavar="DEVICE", help="Compare with DEVICE or a file as well.")
@click.option("--threads", type=THREADS, default=0, metavar="N", help="Worker threads; 0: one for each core.")
def command(shell: Shell, set_text: str, against: str | None, threads: int) -> int:
    """Read every block of SET back and check its hash.

    Exit 30 where something is damaged, with the extents of the disk that a
    restore could not give back.
    """
    opening = shell.open()
    from imager.engine import verify

    with shell.reporter() as reporter:
        summary = verify.verify(opening.unlock(), set_text, reporter, against=against, threads=threads)
    if shell.json:
        shell.message("summary", summary)
    else:
        for damage in summary.damage:
            where = f"{damage.disk}: {format_size(damage.length)} at byte {damage.start}"
            pack = f" (pack {damage.pack})" if damage.pack else ""
            shell.print(f"damaged: {where}: {damage.reason}{pack}")
        for disk, start, length in summary.unreadable:
            shell.print(
                f"not in the set: {disk}: {format_size(length)} at byte {start}: unreadable at backup"
            )
        shell.print(
            f"{'whole' if summary.ok else 'DAMAGED'}: {summary.blocks} blocks, {format_size(summary.bytes)}"
        )
    return EXIT_DONE if summary.ok else EXIT_INTEGRITY
