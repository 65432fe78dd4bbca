"""LVM's metadata text as nested values.

Invariant: whatever the text, parsing ends after work in proportion to its
length, nested no deeper than `MAX_DEPTH`; what does not fit the grammar is
a `ValueError` that says where.

Grammar: libdm/config.c of LVM2 (`dm_config_parse`): sections `name { ... }`, assignments
`key = value`, values being strings in quotes, numbers, and lists of them; `#` begins a comment.
"""

from __future__ import annotations

import re
from typing import Any

MAX_DEPTH = 16
MAX_TEXT = 8 << 20
"""The longest text that is parsed, in bytes. LVM's default metadata area holds 1 MiB."""

Section = dict[str, Any]
_TOKEN = r"""(?xsa)(?:[ \t\r\n\0]|\#[^\n]*)*+(?:
    (?P<string>"(?:[^"\\]|\\.)*+")
    |(?P<number>-?\d{1,20}(?:\.\d{1,20})?(?![\w.]))
    |(?P<word>[A-Za-z0-9_.+\-/@]+)
    |(?P<mark>[{}=\[\],])
    |(?P<end>\Z))"""
"""Compiled where a text is parsed: few disks have one, and it takes longer than the rest of this module."""


def parse(text: str) -> Section:
    """The sections and values of a metadata text. Raises `ValueError`."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"the metadata is longer than {MAX_TEXT} bytes")
    parser = _Parser(text)
    found = parser.section(0)
    return found


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.token = re.compile(_TOKEN)
        self.at = 0
        self.kind = self.value = ""
        self.advance()

    def advance(self) -> None:
        match = self.token.match(self.text, self.at)
        if match is None:
            raise ValueError(f"the metadata makes no sense at character {self.at}")
        self.kind = str(match.lastgroup)
        self.value = match[self.kind]
        self.at = match.end()

    def take(self, mark: str) -> bool:
        if self.kind == "mark" and self.value == mark:
            self.advance()
            return True
        return False

    def section(self, depth: int) -> Section:
        if depth > MAX_DEPTH:
            raise ValueError(f"the metadata is nested deeper than {MAX_DEPTH} sections")
        out: Section = {}
        while not (self.kind == "end" or (self.kind == "mark" and self.value == "}")):
            name = self.name()
            if name in out:
                raise ValueError(f"the metadata says {name[:64]!r} twice")
            if self.take("{"):
                out[name] = self.section(depth + 1)
                if not self.take("}"):
                    raise ValueError(f"section {name[:64]!r} of the metadata has no end")
            elif self.take("="):
                out[name] = self.values() if self.take("[") else self.scalar()
            else:
                raise ValueError(f"{name[:64]!r} at character {self.at} has no value")
        if depth == 0 and self.kind != "end":
            raise ValueError(f"a section ends at character {self.at} that never began")
        return out

    def name(self) -> str:
        if self.kind not in ("word", "string", "number"):
            raise ValueError(f"{self.value!r} at character {self.at} is no name")
        name = unquote(self.value) if self.kind == "string" else self.value
        self.advance()
        return name

    def values(self) -> list[Any]:
        out: list[Any] = []
        while not self.take("]"):
            out.append(self.scalar())
            if not self.take(",") and not (self.kind == "mark" and self.value == "]"):
                raise ValueError(f"a list has no end at character {self.at}")
        return out

    def scalar(self) -> Any:
        kind, value = self.kind, self.value
        if kind not in ("string", "number"):
            raise ValueError(f"{value!r} at character {self.at} is no value")
        self.advance()
        if kind == "string":
            return unquote(value)
        return float(value) if "." in value else int(value)


def unquote(value: str) -> str:
    """The text in quotes: a backslash stands before a quote or another one."""
    return re.sub(r"\\(.)", r"\1", value[1:-1], flags=re.S)
