"""`imager sync`: copy a repository, or some of its sets, to another place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from imager.cli.group import verb
from imager.cli.shell import Shell, plain
from imager.cli.style import count
from imager.errors import EXIT_DONE, EXIT_INTEGRITY
from imager.units import format_duration, format_size

if TYPE_CHECKING:
    from imager.repository.sync import SyncPlan, SyncSummary


@verb("sync")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option("--set", "sets", multiple=True, metavar="ID", help="Only this set (an id, or a prefix of one).")
@click.option("--latest", type=click.IntRange(1), metavar="N", help="Only the newest N sets of each lineage.")
@click.option("--since", metavar="TIME", help="Only sets made at or after TIME.")
@click.option("--name", "names", multiple=True, metavar="NAME", help="Only sets of this name (needs a key).")
@click.option("--tag", "tags", multiple=True, metavar="TAG", help="Only sets with this tag (needs a key).")
@click.option("--verify-after", is_flag=True, help="Read back from DST what was copied.")
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be copied, and copy nothing.")
def command(
    shell: Shell,
    source: str,
    target: str,
    sets: tuple[str, ...],
    latest: int | None,
    since: str | None,
    names: tuple[str, ...],
    tags: tuple[str, ...],
    verify_after: bool,
    dry_run: bool,
) -> int:
    """Copy what DST lacks of the repository SRC: the same sets, under the same ids.

    No secret is asked for, unless sets are chosen by name or tag. DST is an
    empty place, or a copy that was made before; nothing there is deleted.
    What was interrupted goes on. Exit 30 where SRC is damaged: what that hurts
    is named and not copied, all else is.
    """
    from imager.repository import sync
    from imager.repository.imageset import parse_time
    from imager.repository.keyless import open_keyless
    from imager.repository.repository import Repository

    wishes = sync.Wishes(sets, names, tags, latest, parse_time(since, begin=True) if since else None)
    origin, place = shell.storage(source), shell.storage(target)
    opened = Repository.open(origin, shell.credentials()) if wishes.need_key else open_keyless(origin)
    with opened as repository, shell.reporter() as reporter:
        plan = sync.plan(repository, place, wishes)
        if not dry_run:
            done = sync.execute(repository, place, wishes, plan, reporter, verify=verify_after)
    if dry_run:
        if shell.json:
            fields = plain(plan)
            del fields["relies"]
            shell.message("plan", fields)
        else:
            _print_plan(shell, plan)
        return EXIT_INTEGRITY if plan.refused else EXIT_DONE
    if shell.json:
        shell.message("summary", done)
    else:
        _print(shell, done)
    return EXIT_DONE if done.ok else EXIT_INTEGRITY


def _print_plan(shell: Shell, plan: SyncPlan) -> None:
    for refused in plan.refused:
        shell.print(f"NOT COPIED: {refused.object}: {refused.reason}")
    for note in plan.notes:
        shell.print(note)
    where = f"{plan.target}, which becomes a copy" if plan.creates else plan.target
    packs = f"{count(len(plan.packs), 'pack')} and {count(len(plan.maps), 'map pack')}"
    shell.print(
        f"would copy {count(len(plan.sets), 'set')} to {where}: {packs}, {format_size(plan.bytes)}; "
        f"{count(plan.present, 'set')} there already"
    )
    for set_id in plan.sets:
        shell.print(f"  {set_id}")


def _print(shell: Shell, done: SyncSummary) -> None:
    for refused in done.refused:
        shell.print(f"NOT COPIED: {refused.object}: {refused.reason}")
    for note in done.notes:
        shell.print(note)
    packs = f"{count(done.packs, 'pack')} and {count(done.maps, 'map pack')}"
    back = "" if done.verified is None else f"; {count(done.verified, 'pack')} read back whole"
    shell.print(
        f"copied {count(len(done.sets), 'set')} to {done.target}: {packs}, {format_size(done.bytes)} "
        f"in {format_duration(done.seconds)}; {count(done.present, 'set')} there already{back}"
    )
