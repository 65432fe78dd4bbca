"""`imager retain`: object locks of a repository in S3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from imager.cli.group import verb
from imager.cli.options import DURATION
from imager.cli.shell import Shell, plain
from imager.errors import EXIT_DONE, EXIT_INTEGRITY, UsageError
from imager.units import format_time

if TYPE_CHECKING:
    from imager.repository.retain import RetainPlan, RetainSummary

_DAY = 24 * 3600 * 1_000_000


@verb("retain")
@click.option("--for", "span", type=DURATION, metavar="DURATION", help="Lock for DURATION from now: 30d, 6m.")
@click.option("--until", metavar="TIME", help="Lock until TIME.")
@click.option(
    "--at-upload",
    type=DURATION,
    metavar="DURATION",
    help="Have the bucket lock each new object for DURATION (whole days), whoever writes it.",
)
@click.option(
    "--mode",
    type=click.Choice(["governance", "compliance"]),
    help="Of new locks: compliance can be lifted by nobody. Default: as the bucket does it, else governance.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be locked, and do nothing.")
def command(
    shell: Shell,
    span: int | None,
    until: str | None,
    at_upload: int | None,
    mode: str | None,
    dry_run: bool,
) -> int:
    """Lock what image sets need, in a bucket with object lock.

    Locks are only ever made longer. Needs no key of the repository, and no right to write or to
    delete in the bucket: let it run by a process that the machines that back up
    can't reach. Exit 30 where objects were deleted or overwritten that never are; then everything is
    locked, what is hidden too, and s3://BUCKET/PREFIX?as-of=TIME shows it.
    """
    if span is not None and until is not None:
        raise UsageError("--for and --until say the same thing: give one")
    if span is None and until is None and at_upload is None:
        raise UsageError("no time to lock for", hint="write --for 30d, --until 2027-06-01 or --at-upload 30d")
    if at_upload is not None and at_upload % _DAY:
        raise UsageError("--at-upload takes whole days")
    from imager.repository import retain
    from imager.repository.imageset import parse_time
    from imager.storage.object_versions import MODES, versions_of

    wanted = None if mode is None else MODES[mode == "compliance"]
    moment = parse_time(until) if until is not None else None
    storage = shell.storage(shell.repository_name())
    if at_upload is not None and not dry_run:
        versions_of(storage).lock_at_upload(wanted or MODES[0], at_upload // _DAY)
        if not shell.json:
            shell.print(f"from now on the bucket locks each new object for {at_upload // _DAY} days")
    if span is None and moment is None:
        return EXIT_DONE
    with shell.reporter() as reporter:
        plan = retain.plan(storage, reporter, span=span, until=moment, mode=wanted)
        summary = None if dry_run else retain.execute(storage, plan, reporter)
    _print(shell, plan, summary)
    return EXIT_INTEGRITY if plan.suspicions else EXIT_DONE


def _print(shell: Shell, plan: RetainPlan, summary: RetainSummary | None) -> None:
    if shell.json:
        if summary is not None:
            shell.message("summary", {**shell.fields(summary), "ok": summary.ok})
        else:
            fields = plain(plan)
            fields["extend"] = len(fields.pop("targets"))
            shell.message("plan", fields)
        return
    for line in plan.describe():
        shell.print(line)
    if summary is not None:
        shell.print(f"{summary.extended} locked until {format_time(summary.until / 1e6)}")
    if plan.suspicions:
        shell.print(f"look at what was there before: imager list -r '{plan.location}?as-of=TIME'")
