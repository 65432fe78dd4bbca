"""When an image set was last read back in full, and how that ended.

Invariant: what is kept is what this machine itself verified; objects of a
repository never change, so it needs no place there. Losing it loses no more
than the dates.
"""

from __future__ import annotations

import os
import time

import msgspec

from imager import config


class Verified(msgspec.Struct, frozen=True):
    """`when` in microseconds since 1970 (UTC); `damaged` in bytes; `against`: the device compared with."""

    when: int
    ok: bool
    bytes: int
    damaged: int = 0
    against: str | None = None


def _folder(repository: str) -> str:
    return os.path.join(config.state_dir(), "verified", repository)


def record(
    repository: str, set_id: str, *, ok: bool, size: int, damaged: int = 0, against: str | None = None
) -> bool:
    """Remember a verification of a set; False where that could not be kept.

    `repository`: its place, as `Repository.place` has it.
    """
    entry = Verified(time.time_ns() // 1000, ok, size, damaged, against)
    path = os.path.join(_folder(repository), f"{set_id}.json")
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        staged = f"{path}.{os.getpid()}"
        with open(staged, "wb") as file:
            file.write(msgspec.json.encode(entry))
        os.rename(staged, path)
    except OSError:
        return False
    return True


def last(repository: str, set_id: str) -> Verified | None:
    """The last verification of a set on this machine; None where there is none on record."""
    try:
        with open(os.path.join(_folder(repository), f"{set_id}.json"), "rb") as file:
            return msgspec.json.decode(file.read(1 << 16), type=Verified)
    except (OSError, msgspec.DecodeError, UnicodeError, RecursionError):
        return None
