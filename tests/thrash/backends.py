"""Where the thrashed repository lies. Another storage is one more entry here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def folder(place: Path) -> str:
    """A folder."""
    return str(place / "repo")


BACKENDS: dict[str, Callable[[Path], str]] = {"folder": folder}
"Name -> a function that makes an empty place and gives what `imager -r` is told."
