"""The target's old partition table, kept before the first write.

Invariant: what is kept is on the disk (fsynced, folder included) when
`save` returns, and `undo` says in commands how to put it back. Nothing here
writes to a device.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from msgspec.structs import asdict

from imager import command
from imager.device import blockio
from imager.device.identity import Identity
from imager.errors import CommandError, TargetError
from imager.units import MIB

EDGE = MIB  # kept at either end: the MBR, its gap, and both GPTs at any sector size
_GRAIN = 4096
ABOUT = "about.json"


def default_folder() -> Path:
    """Where old tables are kept: the system's state folder for root, the person's own otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/imager/tables")
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(state, "imager", "tables")


def save(fd: int, identity: Identity, state_folder: Path | None = None) -> Path:
    """Keep both ends of the device open as `fd`, and its table as text; returns the new folder."""
    size = blockio.size(fd)
    tail = max(size - EDGE, 0)
    head, lost_head = _read(fd, 0, min(EDGE, size))
    end, lost_end = _read(fd, tail, size - tail)
    about = {
        "saved": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": asdict(identity),
        "head": {"file": "head.bin", "offset": 0, "length": len(head)},
        "tail": {"file": "tail.bin", "offset": tail, "length": len(end)},
        "unreadable": lost_head + lost_end,
    }
    files = {"head.bin": head, "tail.bin": end, ABOUT: json.dumps(about, indent=1).encode() + b"\n"}
    dump = _dump(identity.path)
    if dump:
        files["table.sfdisk"] = dump
    try:
        return _keep(state_folder or default_folder(), identity, files)
    except OSError as error:
        raise TargetError(
            f"cannot keep the old partition table of {identity.path}: {error.filename}: {error.strerror}",
            hint="name a writable state folder; nothing was written to the device",
        ) from error


def undo(folder: Path, device: str | None = None) -> list[str]:
    """The commands that put both ends back as they were, on `device` or on the one they came from."""
    about = json.loads((folder / ABOUT).read_bytes())
    path = device or about["device"]["path"]
    options = "bs=64K oflag=seek_bytes conv=notrunc,fsync"
    commands = [
        f"dd if={folder / part['file']} of={path} seek={part['offset']} {options}"
        for part in (about["head"], about["tail"])
        if part["length"]
    ]
    if about["device"]["kind"] != "partition":
        commands.append(f"partx --update {path}")
    return commands


def _keep(parent: Path, identity: Identity, files: dict[str, bytes]) -> Path:
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    who = re.sub(r"[^A-Za-z0-9._-]", "_", f"{identity.name}-{identity.serial or 'no-serial'}")
    stamp = time.strftime("%Y%m%dT%H%M%S")
    for attempt in range(1000):
        folder = parent / f"{stamp}-{who}{f'-{attempt}' if attempt else ''}"
        try:
            folder.mkdir(mode=0o700)
            break
        except FileExistsError:
            continue
    for name, content in files.items():
        with open(folder / name, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    for path in (folder, parent):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return folder


def _read(fd: int, start: int, length: int) -> tuple[bytes, list[tuple[int, int]]]:
    """The bytes, with zeroes for what cannot be read, and where that was."""
    whole = _try(fd, start, length)
    if whole is not None:
        return whole, []
    out, lost = bytearray(), []
    for at, span in _grains(start, length):
        piece = _try(fd, at, span)
        if piece is None:
            lost.append((at, span))
        out += piece or bytes(span)
    return bytes(out), lost


def _grains(start: int, length: int) -> Iterable[tuple[int, int]]:
    end = start + length
    return ((at, min(_GRAIN, end - at)) for at in range(start, end, _GRAIN))


def _try(fd: int, start: int, length: int) -> bytes | None:
    out = bytearray()
    while len(out) < length:
        try:
            piece = os.pread(fd, length - len(out), start + len(out))
        except OSError:
            return None
        if not piece:
            return None
        out += piece
    return bytes(out)


def _dump(path: str) -> bytes | None:
    """The table as sfdisk can read it back; None where there is none."""
    try:
        return command.run(["sfdisk", "--dump", path], timeout=60).stdout
    except CommandError:
        return None
