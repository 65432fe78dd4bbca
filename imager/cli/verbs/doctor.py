"""`imager doctor`: what a storage really guarantees."""

from __future__ import annotations

import click

from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.errors import EXIT_DONE, EXIT_FAILED
from imager.units import format_duration


@verb("doctor")
@click.argument("place", metavar="REPO", required=False)
def command(shell: Shell, place: str | None) -> int:
    """Try out what the storage of REPO guarantees.

    Writes, races, reads, lists, moves and deletes small objects of its own, and removes
    them again. Needs no key, and no repository: try a place before you trust it. Exit 1
    where a promise is broken that the safety of a repository hangs on.
    """
    place = place or shell.repository_name()
    from imager.storage import probe

    diagnosis = probe.probe(shell.storage(place))
    if shell.json:
        shell.document(diagnosis)
    else:
        width = max(len(finding.promise) for finding in diagnosis.findings)
        for finding in diagnosis.findings:
            shell.print(f"{finding.state:<8} {finding.promise:<{width}}  {finding.detail}")
        verdict = "is fit" if diagnosis.ok else "is NOT fit"
        took = format_duration(diagnosis.seconds)
        shell.print(f"{diagnosis.location} {verdict} for a repository (tried in {took})")
    return EXIT_DONE if diagnosis.ok else EXIT_FAILED
