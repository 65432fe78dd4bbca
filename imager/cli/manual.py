"""The reference page of the command, from the same texts that `--help` shows.

Invariant: `docs/reference/commands.md` is exactly what
`python -m imager.cli.manual` prints; a test holds them together.
"""

from __future__ import annotations

import inspect
import sys

import click

from imager.cli.group import LazyGroup, Verb
from imager.cli.main import group


def _prose(text: str | None) -> str:
    """A help text as Markdown: paragraphs, and what stands after a \\b as it is."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text or "").split("\n\n"):
        if paragraph.startswith("\b"):
            paragraphs.append("```text\n" + paragraph.removeprefix("\b").strip("\n") + "\n```")
        else:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _options(parameters: list[click.Parameter], context: click.Context) -> list[str]:
    lines = ["| option | what it does |", "|---|---|"]
    for parameter in parameters:
        record = parameter.get_help_record(context)
        if not isinstance(parameter, click.Option) or record is None or parameter.name == "help":
            continue
        names = " ".join(f"`{name}`" for name in parameter.opts)
        value = "" if parameter.is_flag or parameter.count else parameter.make_metavar(context)
        value = f" `{value}`".replace("|", "\\|") if value else ""
        lines.append(f"| {names}{value} | {record[1]} |")
    return lines


def page() -> str:
    """The whole page, in Markdown."""
    top = click.Context(group, info_name="imager")
    lines = ["# Commands", ""]
    lines += ["*Made by `python -m imager.cli.manual`; the words are those of `--help`.*", ""]
    lines += ["    imager [OPTION...] VERB [OPTION...] [ARGUMENT...]", "", _prose(group.help), ""]
    lines += ["## Options of every verb", "", "They stand before or after the verb.", ""]
    common = [p for p in group.params if isinstance(p, click.Option) and p.name != "version"]
    lines += [*_options(list(common), top), ""]
    begun: set[str] = set()
    for words in group.leaves(top):
        above = group.leaf(top, words[:1])
        if isinstance(above, LazyGroup) and words[0] not in begun:
            begun.add(words[0])
            lines += [f"## {words[0]}", "", f"    imager {words[0]} VERB", "", _prose(above.help), ""]
        command = group.leaf(top, words)
        assert isinstance(command, Verb)
        name = " ".join(words)
        context = click.Context(command, info_name=name, parent=top)
        usage = " ".join(command.collect_usage_pieces(context))
        lines += [f"## {name}", "", f"    imager {name} {usage}", "", _prose(command.help), ""]
        if any(isinstance(p, click.Option) for p in command.own):
            lines += [*_options(command.own, context), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
