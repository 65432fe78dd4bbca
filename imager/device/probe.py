"""What is on a device: filesystem, RAID member, LUKS, swap.

Invariant: what is reported is what blkid or udev found; an answer that
cannot be had (no permission, no tool, unreadable) is an empty `Content`.
"""

from __future__ import annotations

import importlib
from typing import Any

from msgspec import Struct

from imager import command
from imager.errors import CommandError

_NOTHING, _AMBIGUOUS = 2, 8  # blkid's exit codes


class Content(Struct, frozen=True):
    """A signature. `type` is blkid's word: ext4, xfs, swap, LVM2_member, crypto_LUKS ..."""

    type: str | None = None
    label: str | None = None
    uuid: str | None = None
    table: str | None = None  # gpt or dos, of a partitioned disk


def parse_export(output: str) -> Content:
    """The lines of `blkid -o export`."""
    fields = dict(line.split("=", 1) for line in output.splitlines() if "=" in line)
    fields = {key: _unquote(value) for key, value in fields.items()}
    table = None if "TYPE" in fields else fields.get("PTTYPE")
    return Content(fields.get("TYPE"), fields.get("LABEL"), fields.get("UUID"), table)


def _unquote(value: str) -> str:
    """blkid's export format puts a backslash before what a shell would read."""
    out, escaped = [], False
    for char in value:
        if char == "\\" and not escaped:
            escaped = True
            continue
        out.append(char)
        escaped = False
    return "".join(out)


def probe(path: str) -> Content:
    """Read the signatures on the device itself."""
    try:
        done = command.run(["blkid", "-p", "-o", "export", path], ok=(0, _NOTHING, _AMBIGUOUS), timeout=30)
    except CommandError:
        return Content()
    return parse_export(done.stdout.decode(errors="replace"))


class Prober:
    """Asks udev's database where it is filled, and the device itself where not."""

    def __init__(self) -> None:
        self._context: Any = None
        try:
            self._pyudev: Any = importlib.import_module("pyudev")  # it has no types
            self._context = self._pyudev.Context()
        except (ImportError, OSError):
            pass

    def content(self, path: str, dev: int) -> Content:
        properties = self._properties(dev)
        if properties is None:
            return probe(path)
        label = properties.get("ID_FS_LABEL_ENC")
        kind = properties.get("ID_FS_TYPE")
        table = None if kind else properties.get("ID_PART_TABLE_TYPE")
        return Content(kind, _decode(label) if label else None, properties.get("ID_FS_UUID"), table)

    def _properties(self, dev: int) -> dict[str, str] | None:
        if self._context is None:
            return None
        try:
            device = self._pyudev.Devices.from_device_number(self._context, "block", dev)
            return dict(device.properties) if device.is_initialized else None
        except self._pyudev.DeviceNotFoundError:
            return None


def _decode(label: str) -> str:
    """Undo udev's encoding: `\\x20` is a space."""
    raw, at = bytearray(), 0
    while at < len(label):
        if label.startswith("\\x", at) and len(label) >= at + 4:
            try:
                raw.append(int(label[at + 2 : at + 4], 16))
                at += 4
                continue
            except ValueError:
                pass
        raw += label[at].encode()
        at += 1
    return raw.decode(errors="replace")
