"""The group of verbs, loaded one at a time, and the options that all of them share.

Invariant: a global option means the same before and after the verb; where it
stands in both places, or in the environment too, the one nearest to the verb
counts. A verb's module is imported only when that verb is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import click
from click.core import ParameterSource

from imager.cli.options import SIZE
from imager.cli.shell import PROGRESS_MODES, Settings, Shell
from imager.errors import Interrupted


def _keep(context: click.Context, option: click.Parameter, value: object) -> None:
    """Remember a global option, unless nobody gave it."""
    assert option.name is not None
    if context.get_parameter_source(option.name) not in (None, ParameterSource.DEFAULT):
        settings: Settings = context.find_root().obj
        setattr(settings, option.name, value)


def _global_options(*, environment: bool) -> list[click.Option]:
    """The options of every verb. Only those before the verb look into the environment:
    so an option given before the verb is stronger than the environment."""

    def option(*names: str, **more: Any) -> click.Option:
        more.setdefault("allow_from_autoenv", environment)
        return click.Option(names, expose_value=False, callback=_keep, **more)

    # What the environment says of secrets is for `imager.repository.credentials` to judge.
    def secret(*names: str, **more: Any) -> click.Option:
        return option(*names, allow_from_autoenv=False, **more)

    return [
        option(
            "-r", "--repo", metavar="REPO", help="The repository: a folder, s3://, gs://, az:// or ssh://."
        ),
        secret(
            "--passphrase-file",
            metavar="FILE",
            help="Take the passphrase from the first line of FILE.",
        ),
        secret(
            "--passphrase-command",
            metavar="COMMAND",
            help="Take the passphrase from the first line that COMMAND prints.",
        ),
        secret(
            "--passphrase-fd",
            type=click.IntRange(min=0),
            metavar="N",
            help="Take the passphrase from the first line of descriptor N.",
        ),
        secret("--keyfile", metavar="FILE", help="Open the repository with the key in FILE."),
        option(
            "--limit-upload", type=SIZE, metavar="RATE", help="Send at most RATE bytes a second: 10M, 500K."
        ),
        option(
            "--limit-download",
            type=SIZE,
            metavar="RATE",
            help="Fetch at most RATE bytes a second: 10M, 500K.",
        ),
        secret(
            "--recovery-key-file",
            metavar="FILE",
            help="Open the repository with the recovery key in FILE; - asks for it.",
        ),
        option("--json", is_flag=True, default=None, help="Print JSON, for programs."),
        option(
            "--progress",
            type=click.Choice(PROGRESS_MODES),
            metavar="MODE",
            help=f"How to show progress: {', '.join(PROGRESS_MODES)}.",
        ),
        option("-v", "--verbose", count=True, help="Say more: each phase of the work, with its rate."),
        option("-q", "--quiet", is_flag=True, default=None, help="Say nothing but results and errors."),
    ]


class Verb(click.Command):
    """A command that takes the global options as well, and lists them apart."""

    def __init__(self, name: str, **more: Any) -> None:
        super().__init__(name, **more)
        self.own = list(self.params)
        self.params.extend(_global_options(environment=False))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        common = self.params[len(self.own) :]
        own = [p for p in self.get_params(ctx) if p not in common and not isinstance(p, click.Argument)]
        for title, parameters in (("Options", own), ("Options of every verb", common)):
            records = [r for r in (p.get_help_record(ctx) for p in parameters) if r is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def verb(name: str, **more: Any) -> Callable[[Callable[..., int | None]], click.Command]:
    """Make a function a verb: its first argument is the `Shell`, its result the exit code (None: 0)."""

    def decorate(function: Callable[..., int | None]) -> click.Command:
        def run(**options: object) -> int | None:
            settings: Settings = click.get_current_context().find_root().obj
            return function(Shell(settings), **options)

        run.__doc__ = function.__doc__
        run.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
        return click.command(
            name, cls=Verb, context_settings={"help_option_names": ["-h", "--help"]}, **more
        )(run)

    return decorate


class LazyGroup(click.Group):
    """Verbs by name; `modules` says where each one's `command` is.

    `top`: this is the program itself, whose options look into the environment. A verb that is a
    group again has the same options, and lists them apart from its verbs.
    """

    def __init__(self, *, modules: dict[str, str], top: bool = True, **more: Any) -> None:
        super().__init__(**more)
        self._modules = modules
        self._top = top
        self.params.extend(_global_options(environment=top))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self._top:
            super().format_options(ctx, formatter)
            return
        self.format_commands(ctx, formatter)
        records = [r for r in (p.get_help_record(ctx) for p in self.get_params(ctx)) if r is not None]
        with formatter.section("Options of every verb"):
            formatter.write_dl(records)

    def leaves(self, ctx: click.Context) -> list[tuple[str, ...]]:
        """Every verb that does something, by the words that name it: `("list",)`, `("key", "list")`."""
        found: list[tuple[str, ...]] = []
        for name in self._modules:
            command = self.get_command(ctx, name)
            below = command.leaves(ctx) if isinstance(command, LazyGroup) else [()]
            found += [(name, *words) for words in below]
        return found

    def leaf(self, ctx: click.Context, words: Sequence[str]) -> click.Command:
        """The verb that these words name. Raises `LookupError`."""
        command = self.get_command(ctx, words[0])
        if command is None:
            raise LookupError(words[0])
        return command.leaf(ctx, words[1:]) if isinstance(command, LazyGroup) and words[1:] else command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = self._modules.get(cmd_name)
        if module is None:
            return None
        command: click.Command = import_module(module).command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            # click would print an empty line and forget which signal it was.
            raise Interrupted(f"interrupted by {error}" if str(error) else "interrupted") from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in self._modules or ctx.resilient_parsing or name.startswith("-"):
            return super().resolve_command(ctx, args)
        import difflib

        whole = ctx.command_path.partition(" ")[2]
        near: Sequence[str] = difflib.get_close_matches(name, self._modules, n=2)
        raise click.UsageError(
            f"there is no verb {f'{whole} {name}'.strip()!r}"
            + (f"; did you mean {' or '.join(near)}?" if near else ""),
            ctx,
        )
