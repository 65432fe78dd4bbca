"""`imager devices`: what is on this machine, and whether it may be written."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from imager.cli.group import verb
from imager.cli.shell import Shell
from imager.cli.style import table
from imager.errors import SourceError
from imager.units import format_size

if TYPE_CHECKING:
    from imager.device.inventory import Device


@verb("devices")
@click.argument("only", metavar="[DEVICE]...", nargs=-1)
@click.option("--used", is_flag=True, help="Read how much of each is in use, by its own allocation maps.")
def command(shell: Shell, only: tuple[str, ...], used: bool) -> None:
    """Show disks, partitions and what stands on them, as a tree.

    The last column says whether restore may write there, or why not. With
    DEVICE (a name or a path), only the disks that hold it.
    """
    from imager.device import inventory

    found = inventory.devices(repository_path=shell.settings.repo)
    if only:
        found = [device for device in found if any(_holds(device, name) for name in only)]
        if not found:
            raise SourceError(f"there is no device {' or '.join(only)}", hint="imager devices shows all")
    if used:
        from imager.capture.usage import with_usage

        found = with_usage(found)
    if shell.json:
        shell.document({"devices": found})
        return
    headings = ["NAME", "SIZE", "WHAT", "SERIAL OR UUID", "HOLDS", "USED BY", "MAY BE WRITTEN"]
    rows = [list(_row(branch, device)) for branch, device in _walk(found)]
    if used:
        headings.insert(2, "IN USE")
        for row, (_, device) in zip(rows, _walk(found), strict=True):
            row.insert(2, _in_use(device))
    table(sys.stdout, headings, rows, right=(1, 2) if used else (1,))


def _in_use(device: Device) -> str:
    if device.used is not None:
        return format_size(device.used)
    return "all" if device.used_why else "-"


def _holds(device: Device, name: str) -> bool:
    return name in (device.name, device.path) or any(_holds(child, name) for child in device.children)


def _walk(devices: Sequence[Device], above: str = "", top: bool = True) -> Iterator[tuple[str, Device]]:
    """Each device with the branch that is drawn before its name."""
    for i, device in enumerate(devices):
        last = i == len(devices) - 1
        yield ("" if top else above + ("└─" if last else "├─")), device
        yield from _walk(device.children, "" if top else above + ("  " if last else "│ "), top=False)


def _row(branch: str, device: Device) -> tuple[str, ...]:
    what = device.model or device.kind
    if device.backing:
        what = f"{device.kind} of {device.backing}"
    content = device.filesystem or (f"{device.table} table" if device.table else "")
    if device.label:
        content += f" {device.label!r}"
    used = [*device.mounts, *(["swap"] if device.swap else []), *device.holders]
    verdict = "yes" if device.writable else f"no: {device.reasons[0] if device.reasons else 'not known'}"
    return (
        branch + device.name,
        format_size(device.size),
        what,
        device.serial or device.wwn or device.partuuid or device.ptuuid or "-",
        content or "-",
        ", ".join(used) or "-",
        verdict,
    )
