"""How much of each device is in use, by the used-block maps that a backup would go by.

Invariant: devices are read, past the page cache where they allow it, and never
written; a device that cannot be read, or has no map, counts as used in whole.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from msgspec.structs import replace

from imager.device.inventory import Device
from imager.filesystem import maps
from imager.filesystem.used import Unknown


def with_usage(devices: Sequence[Device]) -> list[Device]:
    """The same tree, with `used` and `used_why` of every device that has no partitions."""
    return [_measured(device) for device in devices]


def _measured(device: Device) -> Device:
    children = tuple(_measured(child) for child in device.children)
    if device.table is not None or any(child.kind == "partition" for child in device.children):
        return replace(device, children=children)
    used, why = _used(device)
    return replace(device, children=children, used=used, used_why=why)


def _used(device: Device) -> tuple[int | None, str]:
    """(bytes in use, None where all count as used; why, or what was taken into account)."""
    if not device.size:
        return None, "there is no medium in it"
    try:
        fd = os.open(device.path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        return None, f"it cannot be read: {error.strerror}"
    try:
        answer = maps.used_blocks(fd, 0, device.size, sector=device.logical_sector)
    finally:
        os.close(fd)
    if isinstance(answer, Unknown):
        return None, answer.reason
    return answer.extents.total, answer.note
