"""Opening what is to be imaged: a device, an image file, or a stream.

Invariant: a source is opened for reading only, a device past the page cache;
its size is taken from the open descriptor, and looked at again when all is read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from msgspec import Struct

from imager.device.identity import Identity, identify
from imager.errors import SourceError, UsageError
from imager.repository.imageset import check_name
from imager.units import format_size


class SourcePlan(Struct, frozen=True):
    """One source. `disk`: its name within the set. `size`: bytes, 0 for a stream, which tells at its end."""

    path: str
    disk: str
    identity: Identity
    size: int

    @property
    def stream(self) -> bool:
        return self.identity.kind == "stream"


def plan_sources(paths: Sequence[str], name: str | None) -> tuple[SourcePlan, ...]:
    """Identify the sources and name their disks. Raises `UsageError`, `SourceError`."""
    if not paths:
        raise UsageError("there is nothing to back up", hint="name a disk, an image file, or -")
    out: list[SourcePlan] = []
    for path in paths:
        identity = identify(path)
        if identity.kind == "stream" and name is None:
            raise UsageError("a stream has no name of its own", hint="give it one: --name NAME")
        if identity.kind == "stream" and len(paths) > 1:
            raise UsageError(
                "a stream goes into a set of its own", hint="back up the other sources separately"
            )
        for other in out:
            if other.identity.key == identity.key:
                raise UsageError(f"{path} and {other.path} are the same source")
        own = name if identity.kind == "stream" and name else os.path.basename(identity.path)
        disk = _unique(_clean(own), {other.disk for other in out})
        out.append(SourcePlan(path, disk, identity, identity.size))
    return tuple(out)


def lineage_name(sources: Sequence[SourcePlan], name: str | None) -> str:
    """The lineage's name: the one given, else that of the first source. Raises `UsageError`."""
    return check_name(name if name is not None else sources[0].disk)


def _clean(text: str) -> str:
    kept = "".join(c if c.isprintable() and c not in "@:" else "_" for c in text).strip().lstrip("-")
    return kept[:255] or "disk"


def _unique(text: str, taken: set[str]) -> str:
    if text not in taken:
        return text
    number = 2
    while f"{text}-{number}" in taken:
        number += 1
    return f"{text}-{number}"


class Opened(Struct, frozen=True):
    """A source that is open. The caller closes `fd`."""

    fd: int
    path: str
    size: int
    direct: bool
    sector: int

    def close(self) -> None:
        os.close(self.fd)

    def check_unchanged(self) -> None:
        """Raises `SourceError` where the source has shrunk or gone since it was opened."""
        try:
            size = os.lseek(self.fd, 0, os.SEEK_END)
        except OSError as error:
            raise SourceError(f"{self.path} is gone: {error.strerror}") from error
        if size < self.size:
            raise SourceError(
                f"{self.path} shrank from {format_size(self.size)} to {format_size(size)} while it was read",
                hint="nothing was kept; back up again when it is at rest",
            )


def open_source(source: SourcePlan) -> Opened:
    """Open a device or file. Raises `SourceError`."""
    path = source.identity.path
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        hint = (
            "run it as root, or as a member of the group disk" if isinstance(error, PermissionError) else None
        )
        raise SourceError(f"cannot read {source.path}: {error.strerror}", hint=hint) from error
    try:
        if not source.identity.is_device:
            size = os.lseek(fd, 0, os.SEEK_END)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return Opened(fd, source.path, size, False, 512)
        from imager.device import blockio

        direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        os.close(fd)
        fd = direct
        return Opened(fd, source.path, blockio.size(fd), True, blockio.sector_sizes(fd)[0])
    except OSError as error:
        os.close(fd)
        raise SourceError(f"cannot read {source.path}: {error.strerror}") from error
