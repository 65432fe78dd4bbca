"""`imager lab`: a rehearsal of everything on loopback disks."""

from __future__ import annotations

import click

from imager.cli.group import verb
from imager.cli.options import SIZE
from imager.cli.shell import Shell
from imager.errors import EXIT_DONE, EXIT_FAILED


@verb("lab")
@click.option("--size", type=SIZE, metavar="SIZE", help="Size of the disk that is built.")
@click.option(
    "--keep", metavar="DIR", help="Work in DIR, new or empty, and leave everything there to look at."
)
@click.option("--workdir", metavar="DIR", help="Make the temporary folder in DIR.")
@click.option("--files-only", is_flag=True, help="No loop devices and mounts, even as root.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of the content that is generated.")
def command(
    shell: Shell, size: int | None, keep: str | None, workdir: str | None, files_only: bool, seed: int
) -> int:
    """Build a partitioned disk in loopback files, and rehearse everything on it.

    Full backup, changes, incremental, differential, restore onto a disk full
    of random bytes, comparison, file system checks, and one corruption that
    verify has to find. As root it works on loop devices, else on files alone.
    Exit 0 only if all held.
    """
    from imager import lab

    options = lab.LabOptions(
        size=lab.DEFAULT_SIZE if size is None else size,
        keep=keep,
        workdir=workdir,
        files_only=files_only,
        seed=seed,
    )
    with shell.reporter() as reporter:
        summary = lab.run(options, reporter)
    if shell.json:
        shell.message("summary", summary)
    else:
        for line in summary.describe():
            shell.print(line)
    return EXIT_DONE if summary.ok else EXIT_FAILED
