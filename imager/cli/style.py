"""Colour and tables on a terminal, and plain text anywhere else.

Invariant: colour repeats what the words say and is left out where the output
is no terminal or NO_COLOR is set; a table that is piped is aligned text with
one row a line and nothing cut off. What others have named (machines, sets, disks, reasons) can neither
steer a terminal nor look like a line of this program's: `clean` is for every line that is shown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import IO

from imager.units import count as count  # for those who print

_CODES = {"bold": "1", "dim": "2", "red": "1;31", "green": "32", "yellow": "1;33", "cyan": "36"}


_OWN = re.compile(r"(\033\[(?:0|" + "|".join(_CODES.values()) + ")m)")
"What `paint` adds."


def clean(line: str) -> str:
    """One line as it may be shown: what is not printable becomes a question mark, but for our own colours."""
    if line.isprintable():
        return line
    parts = _OWN.split(line)
    parts[::2] = ("".join(c if c.isprintable() else "?" for c in part) for part in parts[::2])
    return "".join(parts)


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
    rows = [[clean(cell) for cell in row] for row in rows]
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
