"""`imager key add`: another way into the repository."""

from __future__ import annotations

import click

from imager.cli.group import verb
from imager.cli.options import new_secret_options
from imager.cli.shell import Shell


@verb("add")
@click.option(
    "--kind",
    type=click.Choice(["passphrase", "keyfile", "recovery"]),
    default=None,
    help="What opens the new slot; keyfile where --new-keyfile is given, else passphrase.",
)
@click.option(
    "--role",
    type=click.Choice(["full", "read", "write"]),
    default="full",
    show_default=True,
    help="What its holder can do: everything; restore and verify; back up one machine and read nothing.",
)
@click.option("--host", metavar="NAME", help="The machine that a key of role write may back up ('*': any).")
@click.option("--label", metavar="TEXT", default="", help="What to call the slot.")
@new_secret_options
def command(
    shell: Shell,
    kind: str | None,
    role: str,
    host: str | None,
    label: str,
    new_keyfile: str | None,
    new_passphrase_file: str | None,
    new_passphrase_command: str | None,
) -> None:
    """Add a key slot: another secret that opens the repository.

    The new passphrase is asked for twice, or comes from an option, or from
    IMAGER_NEW_PASSPHRASE_FILE and the like. A keyfile is made where there is
    none. A recovery key is made and printed, once: see imager key export.
    """
    opening = shell.open(writing=True)
    from imager.repository import keyring, keys, recovery_key

    repository = opening.unlock()
    keyring.check_addition(repository, role=role, host=host, label=label)
    kind = kind or ("keyfile" if new_keyfile else "passphrase")
    text = None
    if kind == "recovery":
        secret = keys.recovery(recovery_key.new())
        text = recovery_key.encode(secret.value)
    else:
        sources = shell.new_credentials(
            keyfile=new_keyfile,
            passphrase_file=new_passphrase_file,
            passphrase_command=new_passphrase_command,
        )
        secret = sources.choose(kind, option="--new-keyfile")
    added = keyring.add(repository, secret, role=role, host=host, label=label)
    if shell.json:
        shell.document({**shell.fields(added), "recovery_key": text})
        return
    shell.print(f"added key slot {added.slot[:8]} ({added.label}): {added.kind}, role {added.role}")
    if text is not None:
        shell.print(f"its recovery key, which is shown this once: {text}")
