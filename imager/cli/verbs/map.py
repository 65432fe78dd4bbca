"""`imager map`: the disks of a set as block devices, over NBD."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from imager.cli.group import verb
from imager.cli.shell import Shell

if TYPE_CHECKING:
    from imager.engine.export import ExportPlan


@verb("map")
@click.argument("set_text", metavar="SET")
@click.argument("program", metavar="[COMMAND...]", nargs=-1)
@click.option(
    "--socket", "path", metavar="PATH", type=click.Path(), help="Listen there; else at a place of its own."
)
def command(shell: Shell, set_text: str, program: tuple[str, ...], path: str | None) -> int:
    """Serve the disks and partitions of SET to NBD clients, for reading.

    SET:DISK and SET:DISK:N serve a disk, and a partition, alone. Clients come
    through a Unix socket that is this user's only: nbdcopy, qemu-img, qemu and
    nbd-client are some. It serves until it is interrupted.

    \b
    With COMMAND it runs that, {} in its words stands for the address, and it
    serves until the command ends, whose exit code is its own:

        imager map disk -- qemu-img convert -O qcow2 {} disk.qcow2

    A damaged block is an I/O error for its range alone, and is told of here.
    """
    opening = shell.open(cached=True)
    from imager.cli import listening
    from imager.command import attached
    from imager.engine import export

    with shell.reporter() as reporter:
        repository = opening.unlock()
        planned = export.plan(repository, set_text, reporter)
        with (
            listening.unix(path) as (listener, place),
            export.serving(repository, planned, listener, reporter) as over,
        ):
            if program:
                address = listening.address(planned.exports[0].name, place)
                return attached([word.replace("{}", address) for word in program])
            _tell(shell, planned, place)
            return listening.wait(over)


def _tell(shell: Shell, planned: ExportPlan, place: str) -> None:
    from imager.cli.listening import address

    if shell.json:
        addresses = {one.name: address(one.name, place) for one in planned.exports}
        shell.message("serving", {"set": planned.set, "socket": place, "exports": addresses})
        return
    shell.print(f"{planned.name} {planned.set[:8]} is served, for reading, until this is interrupted:")
    for one in planned.exports:
        shell.print(f"  {address(one.name, place)}")
