"""`imager restore`: write a disk of a set to a device or a file, and read it back."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from imager.cli.group import verb
from imager.cli.options import THREADS
from imager.cli.shell import Shell
from imager.errors import EXIT_DONE, EXIT_INCOMPLETE, UsageError
from imager.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from imager.engine.restore import RestorePlan, RestoreSummary


@verb("restore")
@click.argument("set_text", metavar="SET")
@click.argument("target", metavar="TARGET")
@click.option("--disk", metavar="DISK", help="Which disk, where SET holds several (or write SET:DISK).")
@click.option("--delta", is_flag=True, help="Read TARGET first and write only what differs.")
@click.option("--resume", is_flag=True, help="Go on with a restore that was interrupted.")
@click.option("--no-verify", is_flag=True, help="Do not read back what was written.")
@click.option(
    "--unused",
    type=click.Choice(["discard", "zero", "leave"]),
    default="discard",
    show_default=True,
    help="Blocks that no filesystem used: discard them (where TARGET can), write zeroes, or leave them.",
)
@click.option("--overwrite", is_flag=True, help="Let an image file that has content be overwritten.")
@click.option(
    "--confirm-device",
    metavar="IDENTITY",
    help="Confirm TARGET without a question: its serial, WWN or partition table UUID, as devices shows it.",
)
@click.option("--threads", type=THREADS, default=0, metavar="N", help="Worker threads; 0: one for each core.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be done, and write nothing.")
def command(
    shell: Shell,
    set_text: str,
    target: str,
    disk: str | None,
    delta: bool,
    resume: bool,
    no_verify: bool,
    unused: str,
    overwrite: bool,
    confirm_device: str | None,
    threads: int,
    dry_run: bool,
) -> int:
    """Write SET to TARGET, a device or an image file, then read it back and compare.

    TARGET may be - for standard output: every block is checked before it is
    written, and nothing can be read back.

    A device is written only after you have named it: type what the question
    asks for, or, where nobody is there to type, give --confirm-device.
    """
    opening = shell.open(cached=True)
    if target == "-":
        if any((shell.json, delta, resume, dry_run, overwrite, confirm_device, unused != "discard")):
            raise UsageError(
                "standard output is only written, in order",
                hint="of the options, --disk and --threads go with it; or name a file",
            )
        from imager.engine import stream

        with shell.reporter() as reporter:
            streamed = stream.stream(opening.unlock(), set_text, reporter, disk=disk, threads=threads)
            for start, length in streamed.unreadable:
                reporter.warn(f"not in the set, zeroes written: {format_size(length)} at byte {start}")
        return EXIT_INCOMPLETE if streamed.unreadable else EXIT_DONE
    from imager.engine import restore

    options = restore.RestoreOptions(
        disk=disk,
        delta=delta,
        resume=resume,
        verify=not no_verify,
        overwrite=overwrite,
        confirm_device=confirm_device,
        threads=threads,
        unused=unused,
    )
    with shell.reporter() as reporter:
        repository = opening.unlock()
        plan = restore.plan(repository, set_text, target, options, reporter)
        if dry_run:
            if shell.json:
                shell.message("plan", plan)
            else:
                for line in plan.describe():
                    shell.print(line)
            return EXIT_DONE
        summary = restore.execute(repository, plan, reporter, confirmation=_ask(plan, confirm_device))
    if shell.json:
        shell.message("summary", summary)
    else:
        shell.print(
            f"restored {summary.disk} of {summary.set[:8]} to {summary.target}: {format_size(summary.size)},"
            f" {format_size(summary.bytes_written)} written{_unused(summary)}"
            f" in {format_duration(summary.seconds)}"
            f" ({format_rate(summary.size, summary.seconds)}),"
            f" {'read back and equal' if summary.verified else 'NOT read back (--no-verify)'}"
        )
        for start, length in summary.unreadable:
            shell.print(f"not in the set, zeroes written: {format_size(length)} at byte {start}")
    return EXIT_INCOMPLETE if summary.unreadable else EXIT_DONE


def _unused(summary: RestoreSummary) -> str:
    """What became of what no filesystem used."""
    how = {"discard": "discarded", "leave": "left as it was"}.get(summary.unused)
    return f", {format_size(summary.bytes_unused)} not in use {how}" if summary.bytes_unused and how else ""


def _ask(plan: RestorePlan, confirm_device: str | None) -> str | None:
    """What the person at the terminal typed to confirm the target; None where nobody was asked."""
    settled = not plan.needs_confirmation or confirm_device is not None
    if settled or not sys.stdin.isatty() or not sys.stderr.isatty():
        return None
    for line in plan.describe():
        sys.stderr.write(line + "\n")
    sys.stderr.write(f"\nEverything on {plan.target} will be overwritten.\n{plan.question}: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip()
