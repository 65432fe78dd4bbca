"""Colour and tables on a terminal, and plain text anywhere else.

Invariant: colour repeats what the words say and is left out where the output
is no terminal or NO_COLOR is set; a table that is piped is aligned text with
one row a line and nothing cut off.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import IO

from imager.units import count as count  # for those who print

_CODES = {"bold": "1", "dim": "2", "red": "1;31", "green": "32", "yellow": "1;33", "cyan": "36"}


def is_terminal(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal that understands more than plain lines."""
    try:
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def paint(text: str, style: str, stream: IO[str]) -> str:
    """`text` in a colour, where `stream` shows colours and nobody asked for none."""
    if os.environ.get("NO_COLOR") or not is_terminal(stream):
        return text
    return f"\033[{_CODES[style]}m{text}\033[0m"


def table(
    stream: IO[str], headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()
) -> None:
    """Write `rows` under `headings`; the columns in `right` are aligned to the right."""
    if is_terminal(stream):
        _rich_table(stream, headings, rows, right)
        return
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    for row in (headings, *rows):
        cells = [
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        stream.write("  ".join(cells).rstrip() + "\n")


def _rich_table(
    stream: IO[str], headings: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]
) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if i in right else "left", no_wrap=i in right)
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(file=stream).print(drawn)
