"""Real changes to a tree: what happens to the files of a machine between two backups.

Invariant: within a round, no path takes part in changes of two kinds, so
that a tool which makes them by other means, one path at a time, comes to the
same tree.
"""

from __future__ import annotations

import os
import random
import re
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from imager.lab import content
from imager.units import KIB

MKDIR, CREATE, DELETE, OVERWRITE, APPEND, RENAME, CHMOD = (
    "make folder", "create", "delete", "overwrite", "append", "rename", "chmod",
)  # fmt: skip
_PLAIN = re.compile(r"[A-Za-z0-9._+/-]+")


class Change(Struct, frozen=True):
    """One change. Paths are relative to the tree's root."""

    what: str
    path: str
    to: str = ""  # rename: the new path
    offset: int = 0  # overwrite: where
    data: bytes = b""  # create, overwrite, append
    mode: int = 0  # chmod: the new permissions


def plan(root: Path, number: int, seed: int) -> tuple[Change, ...]:
    """Choose the changes of round `number` for the tree at `root`, about one per cent of it."""
    source = random.Random(seed * 1000 + number)
    prose = content.Prose(source)
    files = _files(root)
    taken: set[str] = set()

    def pick(pattern: str, count: int, *, least: int = 1) -> list[str]:
        fits = [p for p, size in files.items() if p not in taken and size >= least and re.match(pattern, p)]
        chosen = source.sample(fits, min(count, len(fits)))
        taken.update(chosen)
        return chosen

    out = [Change(MKDIR, f"new-{number}")]
    for at in range(24):
        size = source.randint(10, 40 * KIB) if at else 300 * KIB
        make = content.noise(source, size) if at % 3 == 0 else prose.write(size)
        out.append(Change(CREATE, f"new-{number}/file-{at:02}", data=b"".join(make)))
    for path in pick(r"(media|sparse|EFI/debian)/", 4, least=64 * KIB):
        for _ in range(3):
            data = source.randbytes(source.choice((4 * KIB, 10_000, 64 * KIB - 1)))
            out.append(Change(OVERWRITE, path, offset=source.randrange(files[path] - len(data)), data=data))
    for path in pick(r"(logs|loader)/", 4):
        out.append(Change(APPEND, path, data=b"".join(prose.write(source.randint(100, 100 * KIB)))))
    for path in pick(r"(usr|many|fonts)/", 25):
        out.append(Change(DELETE, path))
    for at, path in enumerate(pick(r"(usr|many|media|fonts)/", 8)):
        out.append(Change(RENAME, path, to=f"new-{number}/renamed-{at}"))
    for path in pick(r"(usr|many|fonts)/", 6):
        out.append(Change(CHMOD, path, mode=0o444 if permissions(root / path) & 0o200 else 0o640))
    return tuple(out)


def permissions(path: Path) -> int:
    """The permission bits of a file."""
    return stat.S_IMODE(path.lstat().st_mode)


def apply(root: Path, changes: Sequence[Change]) -> None:
    """Make the changes by ordinary system calls."""
    for change in changes:
        path = root / change.path
        if change.what == MKDIR:
            path.mkdir()
        elif change.what == CREATE:
            path.write_bytes(change.data)
        elif change.what == DELETE:
            path.unlink()
        elif change.what == RENAME:
            path.rename(root / change.to)
        elif change.what == CHMOD:
            path.chmod(change.mode)
        else:
            with path.open("r+b") as file:
                file.seek(change.offset, os.SEEK_END if change.what == APPEND else os.SEEK_SET)
                file.write(change.data)


def summary(changes: Sequence[Change]) -> Counter[str]:
    """How many there are of each kind."""
    return Counter(change.what for change in changes)


def _files(root: Path) -> dict[str, int]:
    """Path and size of the regular files that a change may touch: writable, one name only, plain names."""
    found: dict[str, int] = {}
    for folder, names, files in os.walk(root):
        names.sort()
        for name in sorted(files):
            path = os.path.join(folder, name)
            info = os.lstat(path)
            short = os.path.relpath(path, root)
            if (
                stat.S_ISREG(info.st_mode)
                and info.st_nlink == 1
                and info.st_mode & stat.S_IWUSR
                and _PLAIN.fullmatch(short)
            ):
                found[short] = info.st_size
    return found
