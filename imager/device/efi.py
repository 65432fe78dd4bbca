"""The boot entries that this machine's UEFI firmware keeps.

Invariant: the variables are only read; an entry that makes no sense is left
out; a machine without UEFI has none.

Structures: UEFI specification 2.10, 3.1.3 (`EFI_LOAD_OPTION`), 10.3 (device paths); efivarfs of
Linux puts four bytes of attributes before each value (Documentation/filesystems/efivarfs.rst).
"""

from __future__ import annotations

import os
import re
import struct

from msgspec import Struct

from imager.device.partition_table import guid_text

FIRMWARE = "/sys/firmware/efi"
_GLOBAL = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
_ENTRY = rf"Boot([0-9A-F]{{4}})-{_GLOBAL}"
_MOST = 256
_LONGEST = 64 << 10


class BootEntry(Struct, frozen=True):
    """An entry. `number`: four hexadecimal digits; `order`: its place in the boot order, None: not in it.

    `partition`: the GUID of the partition (or the signature of the MBR) that it names; `path`: the file
    on it.
    """

    number: str
    description: str
    active: bool
    order: int | None
    current: bool
    partition: str | None
    path: str | None


def is_uefi(firmware: str = FIRMWARE) -> bool:
    """Whether this machine was started by UEFI."""
    return os.path.isdir(firmware)


def boot_entries(firmware: str = FIRMWARE) -> tuple[BootEntry, ...]:
    """The entries, by number; none where there is no UEFI or its variables may not be read."""
    folder = os.path.join(firmware, "efivars")
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return ()
    raw = _variable(folder, f"BootOrder-{_GLOBAL}") or b""
    order = [f"{number:04X}" for (number,) in struct.iter_unpack("<H", raw[: len(raw) // 2 * 2])]
    raw = _variable(folder, f"BootCurrent-{_GLOBAL}") or b""
    current = f"{struct.unpack('<H', raw)[0]:04X}" if len(raw) == 2 else None
    out: list[BootEntry] = []
    for name in names:
        match = re.fullmatch(_ENTRY, name)
        value = _variable(folder, name) if match else None
        if match and value and len(out) < _MOST:
            entry = parse_entry(match[1], value, order, current)
            if entry is not None:
                out.append(entry)
    return tuple(out)


def _variable(folder: str, name: str) -> bytes | None:
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return file.read(_LONGEST)[4:]
    except OSError:
        return None


def parse_entry(number: str, raw: bytes, order: list[str], current: str | None) -> BootEntry | None:
    """An `EFI_LOAD_OPTION`; None where it is none."""
    if len(raw) < 8:
        return None
    attributes, length = struct.unpack_from("<IH", raw)
    at = 6
    while at + 2 <= len(raw) and raw[at : at + 2] != b"\0\0":
        at += 2
    description = raw[6:at].decode("utf-16-le", errors="replace")
    partition, path = _device_path(raw[at + 2 : at + 2 + length])
    place = order.index(number) if number in order else None
    return BootEntry(number, description, bool(attributes & 1), place, number == current, partition, path)


def _device_path(raw: bytes) -> tuple[str | None, str | None]:
    """The partition and the file of a device path; other kinds of nodes are passed over."""
    partition = path = None
    at = 0
    while at + 4 <= len(raw):
        kind, sub, length = struct.unpack_from("<BBH", raw, at)
        body = raw[at + 4 : at + length]
        if length < 4 or kind == 0x7F:
            break
        if (kind, sub) == (4, 1) and len(body) >= 38:
            signature = body[20:36]
            number = struct.unpack("<I", signature[:4])[0]
            partition = guid_text(signature) if body[37] == 2 else f"{number:08x}"
        elif (kind, sub) == (4, 4):
            path = (path or "") + body.decode("utf-16-le", errors="replace").split("\0")[0]
        at += length
    return partition, path
