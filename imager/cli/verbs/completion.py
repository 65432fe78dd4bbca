"""`imager completion`: the script that makes a shell complete verbs and options."""

from __future__ import annotations

import click

from imager.cli.group import verb
from imager.cli.shell import Shell


@verb("completion")
@click.argument("shell_name", metavar="SHELL", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: Shell, shell_name: str) -> None:
    """Print the completion script for SHELL: bash, zsh or fish.

    \b
    bash:  imager completion bash > ~/.local/share/bash-completion/completions/imager
    zsh:   imager completion zsh > a folder of $fpath, as _imager
    fish:  imager completion fish > ~/.config/fish/completions/imager.fish
    """
    from click.shell_completion import get_completion_class

    from imager.cli.main import group

    kind = get_completion_class(shell_name)
    assert kind is not None
    shell.page(kind(group, {}, "imager", "_IMAGER_COMPLETE").source())
