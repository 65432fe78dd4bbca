"""Filesystems changed and read by their own tools, without mounting them.

Invariant: the tree at `staged` already shows what the filesystem shall hold
when a function here returns; the filesystem is changed in place wherever its
tools can do that, and a function says where they could not.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from imager import command
from imager.errors import CommandError
from imager.lab import changes as ch
from imager.lab.changes import Change

BLOCK = 4096
"""Block size that the lab's ext4 filesystems are made with."""

_MTOOLS = {"MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": os.devnull}
_BMAP = re.compile(r"^\d+$")


def change_ext4(part: str, staged: Path, changes: Sequence[Change]) -> str:
    """Make the changes inside an ext4 filesystem with debugfs. Returns a remark."""
    script: list[str] = []
    rewritten = 0
    overwrites: dict[str, list[Change]] = {}
    with tempfile.TemporaryDirectory(prefix="new-", dir=staged.parent) as name:
        for number, change in enumerate(changes):
            path = f'"/{change.path}"'
            if change.what == ch.OVERWRITE:
                overwrites.setdefault(change.path, []).append(change)
            elif change.what == ch.MKDIR:
                script.append(f"mkdir {path}")
            elif change.what == ch.CREATE:
                new = Path(name, str(number))
                new.write_bytes(change.data)
                script.append(f'write "{new}" {path}')
            elif change.what == ch.DELETE:
                script.append(f"rm {path}")
            elif change.what == ch.RENAME:
                script += [f'ln {path} "/{change.to}"', f"unlink {path}"]
            elif change.what == ch.CHMOD:
                script.append(f"set_inode_field {path} mode 0{0o100000 | change.mode:o}")
            else:
                script += _rewrite(staged, change.path)
                rewritten += 1
        for short, pieces in overwrites.items():
            if not _in_place(part, short, pieces):
                script += _rewrite(staged, short)
                rewritten += 1
        _debugfs(part, script, write=True)
    return f"by debugfs, in place ({rewritten} grown files written anew)"


def _rewrite(staged: Path, path: str) -> list[str]:
    return [f'rm "/{path}"', f'write "{staged / path}" "/{path}"']


def _in_place(part: str, path: str, pieces: Sequence[Change]) -> bool:
    """Write into the blocks that the file has; False (nothing written) where one of them is a hole."""
    spans = [range(p.offset // BLOCK, (p.offset + len(p.data) - 1) // BLOCK + 1) for p in pieces]
    blocks = sorted(set().union(*spans))
    said = _debugfs(part, [f'bmap "/{path}" {block}' for block in blocks])
    places = [int(line) for line in said.splitlines() if _BMAP.match(line)]
    if len(places) != len(blocks):
        raise CommandError(f"debugfs did not say where /{path} lies")
    if 0 in places:
        return False
    where = dict(zip(blocks, places, strict=True))
    with open(part, "r+b", buffering=0) as file:
        for piece in pieces:
            at = 0
            while at < len(piece.data):
                position = piece.offset + at
                length = min(BLOCK - position % BLOCK, len(piece.data) - at)
                data = piece.data[at : at + length]
                os.pwrite(file.fileno(), data, where[position // BLOCK] * BLOCK + position % BLOCK)
                at += length
        os.fsync(file.fileno())
    return True


def _debugfs(part: str, script: Sequence[str], *, write: bool = False) -> str:
    """Run debugfs commands. It ends with code 0 whatever happens, so what it says decides."""
    argv = ["debugfs", *(["-w"] if write else []), "-f", "-", part]
    done = command.run(argv, stdin="\n".join([*script, ""]).encode())
    _raise_said(part, done.stderr)
    return done.stdout.decode(errors="replace")


def _raise_said(part: str, stderr: bytes, *harmless: str) -> None:
    """Raise for anything but debugfs's banner and what is `harmless`."""
    for line in stderr.decode(errors="replace").splitlines():
        if not line.startswith("debugfs 1.") and not any(text in line for text in harmless):
            raise CommandError(f"debugfs on {part}: {line}")


def fill_fat(part: str, staged: Path) -> None:
    """Copy a tree into an empty FAT filesystem."""
    entries = sorted(str(entry) for entry in staged.iterdir())
    _mtool(["mcopy", "-s", "-p", "-m", "-i", part, *entries, "::"])


def change_fat(part: str, staged: Path, changes: Sequence[Change]) -> str:
    """Make the changes inside a FAT filesystem with mtools. Returns a remark."""
    again: dict[str, None] = {}
    for change in changes:
        path = f"::{change.path}"
        if change.what == ch.MKDIR:
            _mtool(["mmd", "-i", part, path])
        elif change.what == ch.DELETE:
            _mtool(["mdel", "-i", part, path])
        elif change.what == ch.RENAME:
            _mtool(["mmove", "-i", part, path, f"::{change.to}"])
        elif change.what == ch.CHMOD:
            _mtool(["mattrib", "-i", part, "-r" if change.mode & 0o200 else "+r", path])
        else:
            again[change.path] = None
    for short in again:
        _mtool(["mcopy", "-o", "-m", "-i", part, str(staged / short), f"::{short}"])
    return "by mtools, in place"


def _mtool(argv: Sequence[str]) -> None:
    command.run(argv, env=_MTOOLS, hint="install mtools")


def extract_ext4(part: str, out: Path) -> None:
    """Copy everything out of an ext4 filesystem."""
    argv = ["debugfs", "-R", f'rdump / "{out}"', part]
    _raise_said(part, command.run(argv).stderr, "changing ownership")  # only root gives files away


def extract_fat(part: str, out: Path) -> None:
    """Copy everything out of a FAT filesystem."""
    _mtool(["mcopy", "-s", "-n", "-m", "-i", part, "::*", str(out)])


def extract_btrfs(part: str, out: Path) -> None:
    """Copy everything out of a btrfs filesystem."""
    command.run(["btrfs", "restore", "--symlinks", part, str(out)])


def prototype(staged: Path) -> str:
    """The tree as a mkfs.xfs prototype: name, type and mode, owner, group, and the file to copy."""
    owner = "0 0"
    lines = ["/", "0 0", f"d--755 {owner}"]

    def folder(path: Path) -> None:
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            mode = entry.stat(follow_symlinks=False).st_mode & 0o777
            if entry.is_symlink():
                lines.append(f"{entry.name} l--777 {owner} {os.readlink(entry.path)}")
            elif entry.is_dir():
                lines.append(f"{entry.name} d--{mode:03o} {owner}")
                folder(Path(entry.path))
                lines.append("$")
            else:
                lines.append(f"{entry.name} ---{mode:03o} {owner} {entry.path}")

    folder(staged)
    return "\n".join([*lines, "$", ""])
