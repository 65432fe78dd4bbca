"""LUKS: locked, nothing of it tells what is in use.

Invariant: there is never a map.
"""

from __future__ import annotations

from imager.device import luks
from imager.device.window import Window
from imager.filesystem.used import Unknown, Used


def probe(fd: int, size: int, *, start: int = 0, sector: int = 512) -> str | None:
    """`crypto_LUKS`, or None."""
    try:
        return "crypto_LUKS" if luks.has_magic(Window(fd, start, size).read(0, 8)) else None
    except OSError:
        return None


def used_blocks(fd: int, size: int, *, start: int = 0, sector: int = 512) -> Used | Unknown:
    """`Unknown`; see `used.Reader`."""
    return Unknown("it is encrypted (LUKS), and locked: nothing tells what of it is in use")
