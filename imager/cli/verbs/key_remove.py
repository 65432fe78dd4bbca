"""`imager key remove`: take a key's access away."""

from __future__ import annotations

import click

from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.cli.style import count


@verb("remove")
@click.argument("slot", metavar="SLOT")
def command(shell: Shell, slot: str) -> None:
    """Remove the key slot SLOT.

    The last full slot that reads everything stays. A key of role write is
    revoked as well: the image sets that it has signed so far still count, what it
    signs from now on does not. Whoever read with a key may have copied
    what it opens: imager key rotate keeps later sets from it.
    """
    opening = shell.open(writing=True)
    from imager.repository import removal

    removed = removal.remove(opening.unlock(), slot)
    if shell.json:
        shell.document(removed)
        return
    if removed.slot is not None:
        shell.print(
            f"removed key slot {removed.slot[:8]} ({removed.label}): {removed.kind}, role {removed.role}; "
            f"{count(removed.remaining, 'slot')} left"
        )
    if removed.revoked is not None:
        kept = count(removed.kept, "image set")
        shell.print(
            f"revoked writer {removed.revoked[:8]} ({removed.label}): "
            f"{kept} of it still count, no later one does"
        )
    elif removed.role != "write":
        shell.print("it may have been copied: imager key rotate keeps later sets from it")
