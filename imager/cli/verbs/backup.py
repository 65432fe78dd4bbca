"""`imager backup`: put disks, images or a stream into the repository as one image set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from imager.cli.group import verb
from imager.cli.options import CODEC, SIZE, THREADS
from imager.cli.shell import Shell
from imager.cli.style import count
from imager.errors import EXIT_DONE, EXIT_INCOMPLETE
from imager.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from imager.engine.backup import BackupPlan, BackupSummary


@verb("backup")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--name", metavar="NAME", help="Name of the lineage; without it, that of the source.")
@click.option(
    "--strategy",
    type=click.Choice(["auto", "full", "incremental", "differential"]),
    default="auto",
    show_default=True,
    help="What to compare with: nothing, the last set, or the last full set.",
)
@click.option(
    "--compression",
    type=CODEC,
    default="lz4",
    show_default=True,
    metavar="lz4|zstd[:N]|none",
    help="How blocks are compressed.",
)
@click.option("--block-size", type=SIZE, metavar="SIZE", help="Block size of a new lineage (4K to 4M).")
@click.option("--changed", metavar="MAP", help="Read only what MAP names: bmap, ddrescue mapfile or JSON.")
@click.option(
    "--used-blocks/--all-blocks",
    default=True,
    show_default=True,
    help="Leave out what no filesystem uses, or image it all the same.",
)
@click.option(
    "--on-read-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="On sectors that cannot be read: stop, or record them and go on (exit 3).",
)
@click.option("--tag", "tags", metavar="TAG", multiple=True, help="Attach TAG to the set; may be repeated.")
@click.option("--threads", type=THREADS, default=0, metavar="N", help="Worker threads; 0: one for each core.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
def command(
    shell: Shell,
    sources: tuple[str, ...],
    name: str | None,
    strategy: str,
    compression: str,
    block_size: int | None,
    changed: str | None,
    used_blocks: bool,
    on_read_error: str,
    tags: tuple[str, ...],
    threads: int,
    dry_run: bool,
) -> int:
    """Back up every SOURCE into one image set.

    A SOURCE is a disk, a partition, an image file, or - for standard input,
    which needs --name. The second backup of the same name stores only what
    changed; each set is complete by itself all the same. Blocks that no
    filesystem uses are left out, where its own maps can be believed; what
    is printed says for each partition whether they were, or why not.
    """
    opening = shell.open(writing=True, cached=True)
    from imager.engine import backup

    options = backup.BackupOptions(
        name=name,
        strategy=strategy,
        compression=compression,
        block_size=block_size,
        changed=changed,
        on_read_error=on_read_error,
        tags=tags,
        threads=threads,
        used_blocks=used_blocks,
    )
    with shell.reporter() as reporter:
        repository = opening.unlock()
        plan = backup.plan(repository, sources, options, reporter)
        if dry_run:
            if shell.json:
                shell.message("plan", _facts(plan))
            else:
                for line in plan.describe():
                    shell.print(line)
            return EXIT_DONE
        summary = backup.execute(repository, plan, reporter)
    if shell.json:
        shell.message("summary", summary)
    else:
        _print(shell, summary)
    return EXIT_INCOMPLETE if summary.incomplete else EXIT_DONE


def _facts(plan: BackupPlan) -> dict[str, object]:
    """The plan for `--json`: what will be done, without the sets that it was found from."""
    return {
        "name": plan.name,
        "host": plan.host,
        "strategy": plan.strategy,
        "base": plan.base,
        "block_size": plan.block_size,
        "compression": plan.compression,
        "changed": plan.options.changed,
        "used_blocks": plan.options.used_blocks,
        "sources": plan.sources,
    }


def _print(shell: Shell, summary: BackupSummary) -> None:
    base = f", compared with {summary.base[:8]}" if summary.base else ""
    if summary.by_content:
        base = ", compared by content: this key cannot read earlier sets"
    shell.print(f"{summary.name} {summary.set[:8]}: {summary.strategy}{base}")
    for image in summary.images:
        read = f"{format_size(image.bytes_read)} read ({image.change_source})"
        changed = count(image.blocks_changed, "block")
        how = "looked up" if summary.by_content else "changed"
        blocks = f"{changed} {how}, {image.blocks_new} stored, {image.blocks_shared} known"
        shell.print(f"  {image.disk}: {format_size(image.size)}, {read}, {blocks}")
        for part in image.parts:
            shell.print(f"    {part.describe()}")
        for start, length in image.unreadable:
            shell.print(f"  {image.disk}: UNREADABLE: {length} bytes at {start}")
    read_in_all = sum(image.bytes_read for image in summary.images)
    took = f"{format_duration(summary.seconds)} ({format_rate(read_in_all, summary.seconds)})"
    shell.print(f"  {format_size(summary.bytes_stored)} written to the repository in {took}")
    if summary.incomplete:
        shell.print("  INCOMPLETE: the unreadable parts are zeroes in this set")
