"""`imager show`: what one image set holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from imager.cli import sets
from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.units import format_duration, format_size, format_time

if TYPE_CHECKING:
    from imager.engine.verified import Verified
    from imager.repository.manifest import Image, Manifest


@verb("show")
@click.argument("set_text", metavar="SET")
@click.option("--layout", is_flag=True, help="Show partitions, volumes, filesystems and systems.")
@click.option("--svg", metavar="FILE", help="Draw the disks to scale into FILE, as SVG; - prints it.")
def command(shell: Shell, set_text: str, layout: bool, svg: str | None) -> None:
    """Show what SET holds: disks, layout, strategy, base, and what was read and stored."""
    opening = shell.open(cached=True)
    from imager.engine import verified
    from imager.repository import imageset

    repository = opening.unlock()
    selector = imageset.split_selector(set_text)
    manifest = imageset.resolve(repository, selector.set)
    images = [imageset.select_image(manifest, selector.disk)] if selector.disk else list(manifest.images)
    if svg is not None:
        from imager.engine import layouts

        picture = layouts.picture(repository, manifest, images)
        if svg == "-":
            shell.print(picture.rstrip())
            return
        layouts.save(svg, picture)
    checked = verified.last(repository.place, manifest.id)
    if shell.json:
        shell.document({**sets.document(manifest), "verified": checked})
        return
    for key, value in (*_facts(manifest), ("verified", _when(checked))):
        shell.print(f"{key + ':':<10} {value}")
    for image in images:
        shell.print()
        for line in (*_disk(manifest, image), *(_layout(image) if layout else ())):
            shell.print(line)


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    body = manifest.content
    yield "set", manifest.id
    yield "name", f"{body.name}, number {manifest.sequence} of its lineage, from {body.host}"
    took = format_duration((body.finished - body.started) / 1e6)
    yield "taken", f"{format_time(body.started / 1e6)}, in {took}"
    yield "strategy", body.strategy + (f", compared with {body.base[:8]}" if body.base else "")
    if body.tags:
        yield "tags", " ".join(body.tags)
    yield "made by", body.tool


def _when(checked: Verified | None) -> str:
    """When the set was last verified in full on this machine, and how that ended."""
    if checked is None:
        return "never on this machine"
    verdict = "whole" if checked.ok else f"{format_size(checked.damaged)} DAMAGED"
    return f"{format_time(checked.when / 1e6)}, {verdict}"


def _disk(manifest: Manifest, image: Image) -> Iterator[str]:
    from imager.engine import unused

    left_out, parts = unused.recorded(manifest, manifest.images.index(image))
    size = f"{format_size(image.size)} in blocks of {format_size(image.block_size)}"
    yield f"{image.disk}: {size}" + (f", {format_size(image.size - left_out)} of it imaged" if parts else "")
    yield from (f"  {part.describe()}" for part in parts)
    for start, length in image.unreadable:
        yield f"  UNREADABLE when taken: {format_size(length)} at byte {start}"


def _layout(image: Image) -> Iterator[str]:
    from imager.cli import layouts as lines
    from imager.engine import layouts

    found = layouts.read(image)
    if found is None:
        yield "  its layout is not in this set, or of a form that this program does not know"
        return
    yield from (f"  {line}" for line in lines.lines(found))
