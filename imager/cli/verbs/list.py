"""`imager list`: the image sets of a repository."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from imager.cli import sets
from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.cli.style import table
from imager.units import format_size, format_time

if TYPE_CHECKING:
    from imager.repository.manifest import Manifest


@verb("list")
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="Only sets with TAG; may be repeated.")
def command(shell: Shell, names: tuple[str, ...], tags: tuple[str, ...]) -> None:
    """List the image sets, the oldest first; with NAME, only those of these lineages.

    With a key that cannot read, names are not shown, and NAME finds this machine's lineages alone.
    """
    opening = shell.open(cached=True)
    from imager.repository import imageset, suspicion

    repository = opening.unlock()
    listing = imageset.list_sets(repository)
    lineages = imageset.own_lineages(repository, names)
    with shell.reporter(long_job=False) as reporter:
        for problem in listing.problems:
            reporter.warn(problem.reason, hint="imager check tells more")
        for doubt in suspicion.of_listing(repository, listing):
            reporter.warn(doubt, hint="imager check tells more")
        if not listing.sets and not shell.json:
            reporter.note("no image set yet; imager backup makes one")
    shown = [manifest for manifest in listing.sets if _wanted(manifest, names, tags, lineages)]
    if shell.json:
        problems = [{"set": problem.id, "reason": problem.reason} for problem in listing.problems]
        shell.document({"sets": [sets.document(manifest) for manifest in shown], "damaged": problems})
        return
    if not shown:
        return
    headings = ("SET", "NAME", "TAKEN", "STRATEGY", "DISKS", "SIZE", "STORED", "TAGS")
    table(sys.stdout, headings, [_row(manifest, lineages) for manifest in shown], right=(5, 6))


def _wanted(
    manifest: Manifest, names: tuple[str, ...], tags: tuple[str, ...], lineages: dict[str, str]
) -> bool:
    if manifest.body is None:
        return not tags and (not names or manifest.lineage in lineages)
    return (not names or manifest.body.name in names) and set(tags) <= set(manifest.body.tags)


def _row(manifest: Manifest, lineages: dict[str, str]) -> tuple[str, ...]:
    when = format_time(manifest.created / 1e6)
    body = manifest.body
    if body is None:
        writer = manifest.public.writer
        signed = f", by {writer.label}" if writer is not None else ""
        name = lineages.get(manifest.lineage, "")
        sealed = f"{name}{' ' if name else ''}(not readable with this key{signed})"
        return (manifest.id[:8], sealed, when, "-", "-", "-", "-", "-")
    incomplete = any(image.unreadable for image in body.images)
    return (
        manifest.id[:8],
        body.name,
        when,
        body.strategy + (", INCOMPLETE" if incomplete else ""),
        ", ".join(image.disk for image in body.images),
        format_size(sum(image.size for image in body.images)),
        format_size(body.stats.get("bytes_stored", 0)),
        " ".join(body.tags) or "-",
    )
