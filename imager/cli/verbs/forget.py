"""`imager forget`: let image sets go, by rules or by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from imager.cli.group import verb
from imager.cli.options import DURATION
from imager.cli.shell import Shell
from imager.cli.style import count
from imager.errors import UsageError

if TYPE_CHECKING:
    from imager.repository.forgetting import ForgetPlan, ForgetSummary

COUNT = click.IntRange(min=1)


@verb("forget")
@click.argument("sets", metavar="[SET]...", nargs=-1)
@click.option("--keep-last", type=COUNT, metavar="N", help="Keep the newest N sets.")
@click.option("--keep-hourly", type=COUNT, metavar="N", help="Keep the newest set of each of N hours.")
@click.option("--keep-daily", type=COUNT, metavar="N", help="Keep the newest set of each of N days.")
@click.option("--keep-weekly", type=COUNT, metavar="N", help="Keep the newest set of each of N weeks.")
@click.option("--keep-monthly", type=COUNT, metavar="N", help="Keep the newest set of each of N months.")
@click.option("--keep-yearly", type=COUNT, metavar="N", help="Keep the newest set of each of N years.")
@click.option(
    "--keep-within",
    type=DURATION,
    metavar="DURATION",
    help="Keep what is no older than the newest set by more than DURATION: 12h, 7d, 2w, 6m, 1y.",
)
@click.option(
    "--keep-tag", "tags", metavar="TAG", multiple=True, help="Keep all sets with TAG; may be repeated."
)
@click.option(
    "--name", "names", metavar="NAME", multiple=True, help="Only lineages called NAME; may be repeated."
)
@click.option(
    "--host", "hosts", metavar="HOST", multiple=True, help="Only lineages of HOST; may be repeated."
)
@click.option(
    "--last-of",
    metavar="NAME",
    multiple=True,
    help="Confirm that no set of NAME may be left; may be repeated.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be forgotten, and do nothing.")
def command(
    shell: Shell,
    sets: tuple[str, ...],
    keep_last: int | None,
    keep_hourly: int | None,
    keep_daily: int | None,
    keep_weekly: int | None,
    keep_monthly: int | None,
    keep_yearly: int | None,
    keep_within: int | None,
    tags: tuple[str, ...],
    names: tuple[str, ...],
    hosts: tuple[str, ...],
    last_of: tuple[str, ...],
    dry_run: bool,
) -> None:
    """Forget image sets: those named, or those that no rule keeps.

    The rules look at each lineage (a name of a host) by itself, and go in this
    order: last, within, hourly, daily, weekly, monthly, yearly. A period in which a set
    is kept already takes no place of a later rule. Pinned sets stay.
    What only forgotten sets need, imager prune deletes.
    """
    opening = shell.open(writing=True)
    from imager.repository import forgetting
    from imager.repository.retention import Rules

    rules = Rules(
        keep_last or 0,
        keep_hourly or 0,
        keep_daily or 0,
        keep_weekly or 0,
        keep_monthly or 0,
        keep_yearly or 0,
        keep_within or 0,
        tags,
    )
    if sets and (not rules.empty or names or hosts):
        raise UsageError("name the sets to forget, or give rules, not both")
    with shell.reporter() as reporter:
        repository = opening.unlock()
        if sets:
            plan = forgetting.plan_sets(repository, sets, reporter, last_of=last_of)
        else:
            plan = forgetting.plan_rules(repository, rules, reporter, names=names, hosts=hosts)
        summary = None if dry_run else forgetting.execute(repository, plan, reporter)
    _print(shell, plan, summary)


def _print(shell: Shell, plan: ForgetPlan, summary: ForgetSummary | None) -> None:
    if shell.json and summary is not None:
        shell.message("summary", summary)
        return
    if shell.json:
        lineages = [
            {
                "name": lineage.name,
                "host": lineage.host,
                "sets": [
                    {
                        "set": one.set,
                        "created": one.created,
                        "forget": one.forget,
                        "reasons": one.reasons,
                        "doubt": one.doubt,
                    }
                    for one in lineage.choices
                ],
            }
            for lineage in plan.lineages
        ]
        shell.message("plan", {"lineages": lineages, "damaged": plan.damaged})
        return
    for line in plan.describe():
        shell.print(line)
    if summary is not None and summary.forgotten:
        shell.print(f"{count(len(summary.forgotten), 'set')} forgotten; imager prune frees the space")
