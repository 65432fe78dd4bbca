"""`imager show`: what one image set holds."""

from __future__ import annotations

import click

from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.units import format_time


@verb("show")
@click.argument("set_text", metavar="SET")
def command(shell: Shell, set_text: str) -> None:
    """Show what SET holds: disks, layout, strategy, base, and what was read and stored."""
    opening = shell.open()
    from imager.repository import imageset

    manifest = imageset.resolve(opening.unlock(), set_text)
    if shell.json:
        shell.document(manifest)
        return
    facts = [
        ("set", manifest.set),
        ("name", f"{manifest.name}, number {manifest.sequence} of its lineage"),
        ("host", manifest.host),
        ("taken", f"{format_time(manifest.started / 1e6)} to {format_time(manifest.finished / 1e6)}"),
        ("strategy", manifest.strategy + (f" on {manifest.base[:8]}" if manifest.base else "")),
        ("tags", " ".join(manifest.tags) or "-"),
    ]
    for key, value in facts:
        shell.print(f"{key + ':':<10} {value}")
