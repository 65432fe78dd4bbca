"""Types of arguments that several verbs take.

Invariant: a value that cannot be read ends in a usage error that shows how
to write it, before anything is opened.
"""

from __future__ import annotations

from collections.abc import Callable

import click

from imager.errors import UsageError


class Size(click.ParamType[int]):
    """`64K`, `1.5GiB`, `4096`: bytes."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from imager.units import parse_size

        if isinstance(value, int):
            return value
        try:
            return parse_size(str(value))
        except UsageError as error:
            self.fail(f"{error.message}: {error.hint}", param, ctx)


class Codec(click.ParamType[str]):
    """`lz4`, `zstd`, `zstd:7` or `none`."""

    name = "codec"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value)
        name, colon, level = text.partition(":")
        fits = name in ("lz4", "none") and not colon
        fits = fits or (name == "zstd" and (not colon or (level.isdecimal() and 1 <= int(level) <= 19)))
        if not fits:
            self.fail(
                f"not a compression: {text!r}: write lz4, zstd, zstd:LEVEL (1 to 19) or none", param, ctx
            )
        return text


class Duration(click.ParamType[int]):
    """`12h`, `7d`, `2w`, `6m`, `1y`, or several: microseconds."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from imager.units import parse_span

        if isinstance(value, int):
            return value
        try:
            return parse_span(str(value))
        except UsageError as error:
            self.fail(f"{error.message}: {error.hint}", param, ctx)


DURATION = Duration()


def new_secret_options(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """The options that say where the secret of a new key slot comes from."""
    # Their variables (IMAGER_NEW_PASSPHRASE_FILE and so on) are for `imager.repository.credentials` to judge.
    for name, value, text in (
        ("--new-passphrase-command", "COMMAND", "Take the new passphrase from what COMMAND prints."),
        ("--new-passphrase-file", "FILE", "Take the new passphrase from the first line of FILE."),
        ("--new-keyfile", "FILE", "The new key is FILE, which is made if it does not exist."),
    ):
        function = click.option(name, metavar=value, allow_from_autoenv=False, help=text)(function)
    return function


SIZE = Size()
CODEC = Codec()
THREADS = click.IntRange(0, 1024)
