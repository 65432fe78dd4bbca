"""The recovery sheet: a recovery key on paper, with what a person needs to know beside it.

Invariant: the key on the sheet is given in two forms that say the same, characters and QR
code, and the sheet names the repository it opens. Nothing is kept: who loses the sheet
makes another one. A sheet never goes to another program.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from msgspec import Struct

from imager.errors import UsageError
from imager.units import format_time

FORMATS = ("text", "html", "svg", "png")
_QUIET = 4
"Light modules around a QR code, as its standard asks."
_HALVES = {(False, False): " ", (False, True): "▄", (True, False): "▀", (True, True): "█"}
"Characters for (upper, lower) modules that are to have the colour of text."


class Sheet(Struct, frozen=True):
    """What a recovery sheet says. `key`: the recovery key's text; `created` in seconds since 1970 UTC."""

    key: str
    repository: str
    location: str
    slot: str
    created: float


def render(sheet: Sheet, form: str, *, on_dark: bool = False) -> bytes:
    """The sheet as `text` (with a QR code of block characters), `html`, or its QR code as `svg` or `png`.

    `on_dark`: the text is for a terminal that shows light characters on dark, not for paper.
    Raises `UsageError` for another form.
    """
    if form == "text":
        return "".join(f"{line}\n" for line in text(sheet, on_dark=on_dark)).encode()
    if form == "html":
        return _html(sheet).encode()
    if form not in FORMATS:
        raise UsageError(f"unknown form {form!r}", hint=f"choose {', '.join(FORMATS)}")
    out = io.BytesIO()
    _code(sheet.key).save(out, kind=form, scale=8, border=_QUIET)
    return out.getvalue()


def text(sheet: Sheet, *, on_dark: bool = False) -> Iterator[str]:
    """The lines of the sheet for a terminal or a printer of text."""
    yield "IMAGER RECOVERY KEY"
    yield ""
    for name, value in _facts(sheet):
        yield f"{name + ':':<12} {value}"
    yield ""
    first, second = _lines(sheet.key)
    yield f"    {first}"
    yield f"    {second}"
    yield ""
    yield from qr_lines(sheet.key, on_dark=on_dark)
    yield ""
    yield from _ADVICE


def qr_lines(key: str, *, on_dark: bool = False) -> list[str]:
    """The QR code of the key in block characters, two modules to a character."""
    matrix = [[bool(module) != on_dark for module in row] for row in _code(key).matrix_iter(border=_QUIET)]
    if len(matrix) % 2:
        matrix.append([on_dark] * len(matrix[0]))
    pairs = zip(matrix[::2], matrix[1::2], strict=True)
    return ["".join(_HALVES[pair] for pair in zip(*rows, strict=True)) for rows in pairs]


_ADVICE = (
    "Whoever has this sheet and the repository can read all that is stored, and",
    "change who else can. Keep it where you keep deeds, not beside the repository.",
    "",
    "To open the repository with it:",
    "    imager -r REPO --recovery-key-file - list",
    "and type the key. Upper and lower case, spaces and dashes do not matter; the",
    "last character of each group is a check: a group that is typed wrong is named.",
)


def _lines(key: str) -> tuple[str, str]:
    groups = key.split("-")
    half = len(groups) // 2
    return "-".join(groups[:half]), "-".join(groups[half:])


def _facts(sheet: Sheet) -> list[tuple[str, str]]:
    return [
        ("repository", sheet.repository),
        ("where", sheet.location),
        ("key slot", sheet.slot),
        ("made", format_time(sheet.created)),
    ]


def _code(key: str) -> Any:
    # Letters, digits and dashes alone: the compact alphanumeric mode.
    import segno

    return segno.make(key, error="q", micro=False)


def _html(sheet: Sheet) -> str:
    from html import escape

    drawn = _code(sheet.key).svg_inline(scale=6, border=_QUIET)
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in _facts(sheet)
    )
    advice = escape("\n".join(_ADVICE))
    key = "<br>".join(escape(line) for line in _lines(sheet.key))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        "<title>imager recovery key</title><style>"
        "body{font-family:sans-serif;margin:2cm;color:#000;background:#fff}"
        "th{text-align:left;padding-right:1em}td,.key{font-family:monospace}"
        ".key{font-size:1.4em;letter-spacing:.05em;margin:1em 0}pre{font-family:sans-serif}"
        f"</style></head><body><h1>imager recovery key</h1><table>{rows}</table>"
        f'<p class="key">{key}</p>{drawn}<pre>{advice}</pre></body></html>\n'
    )
