"""Sizes, rates and durations, as people write and read them.

Invariant: sizes are bytes in binary units (1 KiB = 1024 bytes) everywhere;
`parse_size(format_size(n))` is within the printed precision of `n`.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone

from imager.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_SUFFIXES = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB, "P": 1 << 50}
_SIZE = r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(?:i?B)?"


def count(number: int, thing: str, one: str = "", many: str = "") -> str:
    """`1 block`, `3 blocks`; with a verb for each, `1 pack holds` and `3 packs hold`."""
    words = (f"{number} {thing}", one) if number == 1 else (f"{number} {thing}s", many)
    return " ".join(filter(None, words))


def parse_size(text: str) -> int:
    """Bytes of `64K`, `1.5GiB`, `4096`. Raises `UsageError`."""
    match = re.fullmatch(_SIZE, text.strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"not a size: {text!r}", hint="write it like 64KiB, 1.5G or 4096")
    return int(float(match[1]) * _SUFFIXES[match[2].upper()])


def format_size(count: float) -> str:
    """`count` bytes with three significant digits: `512 B`, `64.0 KiB`, `1.25 GiB`."""
    if abs(count) < KIB:
        return f"{count:.0f} B"
    value = float(count)
    for suffix in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        value /= 1024
        if abs(value) < 1000 or suffix == "PiB":
            break
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f} {suffix}"


def format_rate(count: float, seconds: float) -> str:
    """Bytes a second, as a size."""
    return f"{format_size(count / seconds)}/s" if seconds > 0 else "-"


def format_duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def format_time(timestamp: float) -> str:
    """A moment in local time with its offset: `2026-11-22 13:40:20 +0000`."""
    return datetime.fromtimestamp(timestamp, timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


_SPAN = r"(\d+)([hdwmy])"
_HOURS = {"h": 1, "d": 24, "w": 7 * 24, "m": 31 * 24, "y": 366 * 24}


def parse_span(text: str) -> int:
    """Microseconds of `12h`, `7d`, `2w`, `6m` (of 31 days), `1y` (of 366), or several: `1y6m`.

    Raises `UsageError`.
    """
    parts = re.findall(_SPAN, text)
    hours = sum(int(number) * _HOURS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not 0 < hours < 1 << 30:
        raise UsageError(f"not a duration: {text!r}", hint="write 12h, 7d, 2w, 6m or 1y, or several: 1y6m")
    return hours * 3_600_000_000
