"""`imager key rotate`: encrypt what comes to a new key."""

from __future__ import annotations

from imager.cli.group import verb
from imager.cli.shell import Shell


@verb("rotate")
def command(shell: Shell) -> None:
    """Begin a new key epoch: image sets from now on are encrypted to a new key.

    The slot that opens the repository gets the new key. Other slots that read
    cannot be given it without their secrets: they go on to open what is
    there, and are listed, so that you can make new ones. Keys of role write need nothing.
    What a removed key has read, or could have, stays known to its holder.
    """
    opening = shell.open(writing=True)
    from imager.repository import keyring

    repository = opening.unlock()
    rotated = keyring.rotate(repository, opening.secret)
    if shell.json:
        shell.document(rotated)
        return
    shell.print(f"key epoch {rotated.epoch} began; key slot {rotated.slot[:8]} reads it")
    for slot in rotated.lacking:
        shell.print(f"key slot {slot.slot[:8]} ({slot.label}, {slot.kind}, role {slot.role}) does not")
    if rotated.lacking:
        shell.print("for each of them: imager key add a new one, then imager key remove the old one")
