"""`imager serve`: let another machine keep a repository here."""

from __future__ import annotations

import click

from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.errors import UsageError


@verb("serve")
@click.option("--stdio", is_flag=True, help="Speak through standard input and output: what ssh runs.")
@click.option(
    "--append-only",
    is_flag=True,
    help="Permit backups, and nothing that removes, renames or replaces what is stored.",
)
@click.option("--read-only", is_flag=True, help="Permit reading alone.")
@click.option(
    "--restrict",
    multiple=True,
    type=click.Path(),
    metavar="PATH",
    help="Serve only repositories at PATH and below. May be given several times.",
)
def command(shell: Shell, stdio: bool, append_only: bool, read_only: bool, restrict: tuple[str, ...]) -> None:
    """Serve repositories in folders of this machine to an imager elsewhere.

    An ssh:// repository needs it at the far end, where ssh runs it; nobody
    starts it by hand. To let a machine keep its backups here, and do nothing
    else, put its public key into ~/.ssh/authorized_keys like this:

    \b
    command="imager serve --stdio --append-only --restrict /srv/backups/host1",restrict ssh-ed25519 AAAA...

    It ends when its client does.
    """
    if not stdio:
        raise UsageError("how to serve is not said", hint="the only way so far is --stdio")
    if append_only and read_only:
        raise UsageError("--append-only and --read-only exclude each other", hint="leave one of them out")
    import os

    from imager.storage import rights
    from imager.storage.serve import Server

    mode = rights.APPEND_ONLY if append_only else rights.READ_ONLY if read_only else rights.FULL
    sink = os.dup(1)
    os.dup2(2, 1)  # Whatever anybody prints from here on is not the protocol.
    Server(0, sink, mode=mode, restrict=restrict).run()
