"""`imager pin`: image sets that no rule forgets."""

from __future__ import annotations

import click

from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.errors import UsageError


@verb("pin")
@click.argument("set_texts", metavar="[SET]...", nargs=-1)
@click.option("--remove", is_flag=True, help="Leave the sets to the rules again.")
@click.option("--note", metavar="TEXT", help="Why the sets are to stay.")
def command(shell: Shell, set_texts: tuple[str, ...], remove: bool, note: str | None) -> None:
    """Keep SET whatever the rules of imager forget say; without SET, list what is pinned."""
    if remove and (note is not None or not set_texts):
        raise UsageError("--remove takes the sets to leave to the rules, and nothing else")
    opening = shell.open(writing=bool(set_texts))
    from imager.repository import imageset, tombstones

    repository = opening.unlock()
    pinned = tombstones.pinned(repository)
    changed: list[str] = []
    for text in set_texts:
        if remove and text in pinned:
            chosen = text  # The set itself may be gone.
        else:
            chosen = imageset.resolve(repository, text).id
        if remove:
            done = tombstones.unpin(repository, chosen)
        else:
            done = tombstones.pin(repository, chosen, host=imageset.this_host(), note=note or "")
        if done:
            changed.append(chosen)
    now = sorted(tombstones.pinned(repository))
    if shell.json:
        shell.document({"pinned": now, "changed": changed})
        return
    for set_id in now if not set_texts else changed:
        shell.print(f"{set_id} {'is no longer pinned' if remove else 'is pinned'}")
    if set_texts and not changed:
        shell.print("nothing to do: no pin was set" if remove else "nothing to do: pinned already")
