"""`imager key passwd`: another secret for the slot that opened."""

from __future__ import annotations

from imager.cli.group import verb
from imager.cli.options import new_secret_options
from imager.cli.shell import Shell


@verb("passwd")
@new_secret_options
def command(
    shell: Shell,
    new_keyfile: str | None,
    new_passphrase_file: str | None,
    new_passphrase_command: str | None,
) -> None:
    """Change the passphrase, or the keyfile, of the slot that opens the repository.

    Role and label stay. The new slot is durable before the old one goes. A
    recovery key is not changed. Who kept a copy of the old slot can still open
    that copy with the old secret.
    """
    opening = shell.open(writing=True)
    from imager.repository import keyring

    repository = opening.unlock()
    keyring.check_change(repository)
    sources = shell.new_credentials(
        keyfile=new_keyfile,
        passphrase_file=new_passphrase_file,
        passphrase_command=new_passphrase_command,
    )
    secret = sources.choose("keyfile" if new_keyfile else "passphrase", option="--new-keyfile")
    added, removed = keyring.change(repository, secret)
    if shell.json:
        shell.document({"added": added, "removed": removed})
        return
    shell.print(
        f"key slot {added.slot[:8]} ({added.label}), {added.kind}, in the place of {removed.slot or '':.8}"
    )
