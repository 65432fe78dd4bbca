"""`imager prune`: free the space of what no image set needs any more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from imager.cli.group import verb
from imager.cli.options import DURATION, SIZE
from imager.cli.shell import Shell
from imager.cli.style import count
from imager.errors import EXIT_DONE, EXIT_INTEGRITY
from imager.units import format_size

if TYPE_CHECKING:
    from imager.repository.prune import PrunePlan, PruneSummary


@verb("prune")
@click.option(
    "--max-unused",
    metavar="SHARE|SIZE",
    default="10%",
    show_default=True,
    help="How much of what is stored may stay unused; the rest is freed by rewriting packs.",
)
@click.option("--max-rewrite", type=SIZE, metavar="SIZE", help="Copy at most SIZE in this run.")
@click.option(
    "--max-minutes",
    type=click.FloatRange(min=0),
    metavar="MINUTES",
    help="Begin no further copy after so many minutes.",
)
@click.option(
    "--fence",
    metavar="SESSION",
    multiple=True,
    help="Declare a session dead that has no outcome; may be repeated.",
)
@click.option(
    "--fence-older",
    type=DURATION,
    metavar="DURATION",
    help="Declare sessions dead that began longer ago than DURATION: 12h, 7d.",
)
@click.option(
    "--despite-damage",
    is_flag=True,
    help="Go on though manifests or map pages are damaged: give up what hangs on them.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
def command(
    shell: Shell,
    max_unused: str,
    max_rewrite: int | None,
    max_minutes: float | None,
    fence: tuple[str, ...],
    fence_older: int | None,
    despite_damage: bool,
    dry_run: bool,
) -> int:
    """Delete what no image set needs, and move what lives in sparse packs together.

    Needs no key. Backups and restores may run meanwhile, and are never waited
    for: packs that one of them may still count on are condemned, and go in a later run. It can
    be stopped, or killed, at any time.
    """
    opening = shell.open_keyless(writing=True)
    from imager.repository.prune import Prune, PruneOptions

    options = PruneOptions(max_unused, max_rewrite, max_minutes, fence, fence_older, despite_damage)
    with (
        shell.reporter() as reporter,
        opening() as repository,
        Prune(repository, options, reporter, dry_run=dry_run) as work,
    ):
        plan = work.plan()
        summary = None if dry_run else work.execute(plan)
    _print(shell, plan, summary)
    return EXIT_INTEGRITY if summary is not None and summary.damaged else EXIT_DONE


def _print(shell: Shell, plan: PrunePlan, summary: PruneSummary | None) -> None:
    if shell.json and summary is not None:
        shell.message("summary", summary)
        return
    if shell.json:
        shell.message(
            "plan",
            {
                "packs": plan.packs,
                "stored": plan.stored,
                "live": plan.live,
                "unused": plan.unused,
                "drop": [pack.object for pack in plan.drop],
                "rewrite": [pack.object for pack in plan.rewrite],
                "copied": plan.copied,
                "freed": plan.freed,
                "left": plan.left,
                "condemned": plan.condemned,
                "busy": plan.busy,
                "waiting": plan.waiting,
                "fence": plan.fence,
            },
        )
        return
    for line in plan.describe():
        shell.print(line)
    if summary is None:
        return
    shell.print(
        f"{count(summary.packs_deleted, 'pack')} deleted ({format_size(summary.bytes_deleted)}), "
        f"{summary.packs_written} written ({format_size(summary.bytes_written)})"
    )
    if summary.retained:
        left = count(summary.retained, "pack", "stays condemned", "stay condemned")
        shell.print(f"{left}: the store keeps what is locked for a while")
    if summary.condemned > summary.retained:
        number = summary.condemned - summary.retained
        left = count(number, "pack", "is condemned, and goes", "are condemned, and go")
        shell.print(f"{left} once these have ended:")
        for who in summary.waiting:
            shell.print(f"  {who}")
