"""`imager key list`: the slots of a repository and what each can do."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.cli.style import table
from imager.units import format_time

if TYPE_CHECKING:
    from imager.repository.keyslots import Keyring, SlotFacts


@verb("list")
def command(shell: Shell) -> None:
    """List the key slots: what opens them, their role, and the key epochs that each reads.

    The slot that opened the repository just now is marked with an asterisk.
    """
    opening = shell.open()
    from imager.repository import keyslots

    found = keyslots.listing(opening.unlock())
    with shell.reporter(long_job=False) as reporter:
        for problem in found.problems:
            reporter.warn(problem, hint="imager check tells more")
    if shell.json:
        shell.document(found)
        return
    headings = ("", "SLOT", "LABEL", "KIND", "ROLE", "CREATED", "READS EPOCHS")
    table(sys.stdout, headings, [_row(slot, found) for slot in found.slots])
    for writer in found.revoked:
        shell.print(f"revoked: writer {writer[:8]}")


def _row(slot: SlotFacts, found: Keyring) -> tuple[str, ...]:
    if slot.role == "write":
        reads = f"none; backs up {'any machine' if slot.host == '*' else slot.host or 'nothing'}"
    elif slot.reads is None:
        reads = "not told"
    else:
        reads = ", ".join(map(str, slot.reads))
        reads += f" of {len(found.epochs)}" if slot.slot in found.lacking else ""
    kind = slot.kind + (" (being removed)" if slot.removing else "")
    mark = "*" if slot.opened else ""
    return (mark, slot.slot[:8], slot.label, kind, slot.role, format_time(slot.created / 1e6), reads)
