"""`imager check`: the repository's structure, and the bytes of its packs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from imager.cli.group import verb
from imager.cli.options import THREADS
from imager.cli.shell import Shell
from imager.cli.style import count
from imager.errors import EXIT_DONE, EXIT_INTEGRITY, UsageError
from imager.units import format_size, format_time

if TYPE_CHECKING:
    from imager.repository.check import Summary


@verb("check")
@click.option(
    "--read-data",
    metavar="WHAT",
    is_flag=False,
    flag_value="all",
    help="Read packs and index too: all (without WHAT), a share like 1/30 or 10%, or an amount like 5G; "
    "what was not read for the longest time comes first.",
)
@click.option(
    "--repair",
    is_flag=True,
    help="Set damaged packs aside, rebuild the index, remove what dead writers left.",
)
@click.option(
    "--heal-from",
    "sources",
    multiple=True,
    metavar="SOURCE",
    help="With --repair: take what is lost from SOURCE, a device, an image file or a repository.",
)
@click.option("--heal-keyfile", metavar="FILE", help="Opens a SOURCE that is another repository.")
@click.option("--heal-passphrase-file", metavar="FILE", help="The same, with a passphrase.")
@click.option("--keyless", is_flag=True, help="Ask for no secret: check what can be checked without one.")
@click.option("--ages", is_flag=True, help="Also list when each pack was last read back.")
@click.option("--threads", type=THREADS, default=0, metavar="N", help="Worker threads; 0: one for each core.")
def command(
    shell: Shell,
    read_data: str | None,
    repair: bool,
    sources: tuple[str, ...],
    heal_keyfile: str | None,
    heal_passphrase_file: str | None,
    keyless: bool,
    ages: bool,
    threads: int,
) -> int:
    """Check that the repository is whole.

    Without --read-data: config, keys, manifests and their chains, block maps,
    and that every pack they name is there. Exit 30 where something is damaged;
    each finding names the object, and the bytes of each set that it costs.

    --heal-from can be given several times. A copy of this repository gives back
    all it has; a device, an image file and another repository give back the
    blocks whose hashes fit.
    """
    if sources and not repair:
        raise UsageError("--heal-from changes the repository", hint="say --repair as well")
    opening = shell.open_keyless(writing=repair) if keyless else shell.open(writing=repair).unlock
    from imager.repository import check

    with shell.reporter() as reporter:
        repository = opening()
        summary = check.check(
            repository, reporter, read_data=read_data, repair=repair, ages=ages, threads=threads
        )
        if sources:
            from imager.engine import heal

            credentials = shell.credentials_of(heal_keyfile, heal_passphrase_file)
            summary = heal.repaired(
                repository, summary, sources, credentials, reporter, connect=shell.storage
            )
    if shell.json:
        shell.message("summary", summary)
    else:
        _print(shell, summary)
    return EXIT_DONE if summary.ok else EXIT_INTEGRITY


def _print(shell: Shell, summary: Summary) -> None:
    for problem in summary.problems:
        shell.print(f"{'repaired' if problem.repaired else 'DAMAGED'}: {problem}")
        for hurt in problem.hurt:
            shell.print(f"  hurts {hurt}")
    for line in (*summary.notes, *summary.repaired):
        shell.print(line)
    for age in summary.ages or ():
        shell.print(f"{format_time(age.read / 1e6) if age.read else 'never read':<25} {age.pack}")
    on_record = summary.oldest_read is not None
    if summary.ages is not None or (on_record and summary.packs_read < summary.packs):
        shell.print(_ages(summary))
    read = f"{summary.packs_read} of {count(summary.packs, 'pack')} read ({format_size(summary.bytes_read)})"
    what = "structure and digests are whole" if summary.keyless else "the repository is whole"
    if not summary.ok and (place := shell.repository_name()).startswith("s3://"):
        shell.print(
            f"where the bucket keeps versions: --repair --heal-from '{place}?as-of=TIME' takes what was there"
        )
    verdict = what if summary.ok else "the repository is DAMAGED"
    shell.print(f"{verdict}: {count(summary.sets, 'set')}, {count(summary.pages, 'map page')}, {read}")


def _ages(summary: Summary) -> str:
    """How long it is since everything was read back."""
    if summary.oldest_read is None:
        return "no pack was read back yet: --read-data does that"
    since = format_time(summary.oldest_read / 1e6)
    if summary.packs_unread:
        return f"{count(summary.packs_unread, 'pack')} never read back, the others since {since}"
    return f"every pack was read back since {since}"
