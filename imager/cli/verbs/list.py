"""`imager list`: the image sets of a repository."""

from __future__ import annotations

import sys

import click

from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.cli.style import table
from imager.units import format_size, format_time


@verb("list")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="Only sets with TAG; may be repeated.")
def command(shell: Shell, names: tuple[str, ...], tags: tuple[str, ...]) -> None:
    """List the image sets, the oldest first; with NAME, only those of these lineages."""
    opening = shell.open()
    from imager.repository import imageset

    sets = [
        manifest
        for manifest in imageset.list_sets(opening.unlock())
        if (not names or manifest.name in names) and set(tags) <= set(manifest.tags)
    ]
    if shell.json:
        shell.document({"sets": sets})
        return
    rows = [
        (
            manifest.set[:8],
            manifest.name,
            format_time(manifest.created / 1e6),
            manifest.strategy,
            ", ".join(image.disk for image in manifest.images),
            format_size(sum(image.size for image in manifest.images)),
            format_size(manifest.stats.get("stored", 0)),
            " ".join(manifest.tags) or "-",
        )
        for manifest in sets
    ]
    headings = ("SET", "NAME", "TAKEN", "STRATEGY", "DISKS", "SIZE", "STORED", "TAGS")
    table(sys.stdout, headings, rows, right=(5, 6))
