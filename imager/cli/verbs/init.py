"""`imager init`: create a repository."""

from __future__ import annotations

import click

from imager.cli.group import verb
from imager.cli.options import SIZE
from imager.cli.shell import Shell


@verb("init")
@click.argument("place", metavar="REPO", required=False)
@click.option(
    "--encryption",
    type=click.Choice(["passphrase", "keyfile", "none"]),
    default="passphrase",
    show_default=True,
    help="How the repository is locked.",
)
@click.option(
    "--block-size", type=SIZE, metavar="SIZE", help="Use blocks of SIZE for every image (4K to 4M)."
)
def command(shell: Shell, place: str | None, encryption: str, block_size: int | None) -> None:
    """Create a repository at REPO: a folder, or an address with s3://, gs://, az:// or ssh://.

    It is encrypted unless you say --encryption none. The passphrase is asked
    for twice; there is no way back into the repository without it, unless
    imager key export has made a recovery sheet. With --encryption keyfile,
    --keyfile FILE names the key; it is made where FILE does not exist.
    """
    from imager.repository.repository import Repository

    place = place or shell.repository_name()
    repository = Repository.init(
        shell.storage(place),
        shell.credentials(),
        encryption=encryption,
        block_size=block_size or 0,
    )
    if shell.json:
        shell.document(
            {
                "repository": repository.id.hex(),
                "location": place,
                "encryption": encryption,
                "block_size": block_size,
            }
        )
    else:
        shell.print(f"created repository {repository.id.hex()[:8]} in {place}, encryption {encryption}")
