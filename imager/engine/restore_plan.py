"""What a restore would do, told before it is done.

Invariant: making a plan changes nothing, reads the whole block map (so a
damaged one is known before the target is touched), and asks the guard; a
plan's own fields are plain facts that print and encode.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from msgspec import Struct

from imager.device import guard
from imager.engine import images
from imager.engine.compare import Geometry
from imager.engine.images import Image
from imager.engine.journal import Journal
from imager.errors import IntegrityError, UsageError
from imager.events import Reporter
from imager.repository.repository import Repository
from imager.storage.base import Storage
from imager.storage.location import local_path
from imager.units import KIB, format_size, format_time

_TABLE = 64 * KIB  # holds a GPT of the usual 128 entries at any sector size
SHOWN = 8
"Extents that a message lists."
UNUSED = ("discard", "zero", "leave")
"What becomes of blocks that no filesystem used, and that the set has no content of."


class RestoreOptions(Struct, frozen=True):
    """What is asked for. `disk`: which, where the set has several. `threads` 0: one for each core.

    `unused`: one of `UNUSED`. Discard where the target can, else leave as it is; zero; or leave.
    """

    disk: str | None = None
    delta: bool = False
    resume: bool = False
    verify: bool = True
    overwrite: bool = False
    confirm_device: str | None = None
    threads: int = 0
    unused: str = "discard"


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """What a restore would do: plain facts, sizes in bytes, times in microseconds."""

    set: str
    name: str
    disk: str
    finished: int
    size: int
    block_size: int
    data: int  # bytes that are fetched and written, at most
    zero: int  # bytes that will read as zeroes
    unused: int  # bytes that no filesystem used: neither; 0 where they are zeroed
    unused_becomes: str  # discard, zero or leave
    target: str
    target_kind: str  # "new file", "file", or the kind of device
    target_size: int | None
    target_model: str | None
    target_serial: str | None
    target_holds: tuple[str, ...]
    mode: str  # full, delta or resume
    verify: bool
    resumed: int  # bytes that an earlier run has written
    left_alone: int  # bytes of a larger target that stay as they are
    unreadable: tuple[tuple[int, int], ...]  # (start, length): not in the set
    warnings: tuple[str, ...]
    needs_confirmation: bool
    question: str

    def describe(self) -> list[str]:
        """The plan in lines for a person."""
        what = self.target_kind
        if self.target_size is not None:
            what += f" of {format_size(self.target_size)} ({self.target_size} bytes)"
        if self.needs_confirmation:
            what += f", {self.target_model or 'no model'}, serial {self.target_serial or 'unknown'}"
        lines = [
            f"set:     {self.name} {self.set[:8]} of {format_time(self.finished / 1e6)}, disk {self.disk}",
            f"image:   {format_size(self.size)} ({self.size} bytes), {format_size(self.data)} of data",
            f"target:  {self.target}, {what}",
        ]
        if self.target_kind != "new file":
            lines.append(f"         holds now: {'; '.join(self.target_holds) or 'nothing that is known'}")
        how = {
            "full": "write everything",
            "delta": "read the target, write what differs",
            "resume": f"go on: {format_size(self.resumed)} of the image are written already",
        }[self.mode]
        lines.append(f"work:    {how}; {'then read it all back' if self.verify else 'DO NOT read it back'}")
        if self.unused:
            how = {
                "discard": "are discarded, where the target can (holes in a file)",
                "leave": "are left as they are",
            }[self.unused_becomes]
            lines.append(f"         {format_size(self.unused)} that no filesystem uses {how}")
        if self.left_alone:
            lines.append(f"         the last {format_size(self.left_alone)} of the target are left alone")
        for start, length in self.unreadable[:SHOWN]:
            lines.append(f"missing: {length} bytes at {start} could not be read at backup: zeroes instead")
        if len(self.unreadable) > SHOWN:
            lines.append(f"missing: and {len(self.unreadable) - SHOWN} more such extents")
        return lines + [f"warning: {text}" for text in self.warnings]


class RestoreSummary(Struct, frozen=True):
    """What a restore did; sizes in bytes. `verified`: all was read back and is equal.

    `bytes_unused`: what no filesystem used, and `unused` what became of it: discard, zero (then it is
    among `bytes_zeroed`, and 0 here), or leave, also where the target takes no discards.
    """

    set: str
    name: str
    disk: str
    target: str
    mode: str
    size: int
    bytes_written: int
    bytes_zeroed: int
    bytes_kept: int
    bytes_unused: int
    unused: str
    verified: bool
    seconds: float
    left_alone: int
    saved_table: str | None
    unreadable: tuple[tuple[int, int], ...]


class Planned(RestorePlan):
    """A plan with what it was made from, which is no part of what it tells."""

    __slots__ = ("image", "journal", "options", "verdict")
    image: Image
    journal: Journal
    options: RestoreOptions
    verdict: guard.Verdict


def plan(
    repository: Repository, text: str, target: str, options: RestoreOptions, reporter: Reporter
) -> RestorePlan:
    """What restoring `SET` or `SET:DISK` to `target` would do. Nothing is changed.

    Raises `GuardRefused` for a target that must not be written, `IntegrityError`
    for a damaged block map, `UsageError`, and what resolving the set raises.
    """
    if options.resume and not options.verify:
        raise UsageError(
            "--resume relies on the read-back: it cannot go with --no-verify",
            hint="leave --no-verify out, or use --delta --no-verify, which reads the target first",
        )
    if options.unused not in UNUSED:
        raise UsageError(f"unused blocks cannot be {options.unused!r}", hint=", ".join(UNUSED))
    if target == "-":
        raise UsageError("standard output takes no plan: there is nothing to guard and nothing to read back")
    image = images.select_one(repository, text, options.disk)
    images.tell_of_rollback(repository, reporter)
    storage = repository.storage
    verdict, journal, resuming = _examine(image, target, options, storage)
    verdict.require()
    data, unused = image.totals()
    if options.unused == "zero":
        unused = 0
    identity = verdict.identity
    size = identity.size if identity else None
    device = verdict.is_device
    facts = Planned(
        set=image.manifest.id,
        name=image.manifest.name,
        disk=image.disk,
        finished=image.manifest.content.finished,
        size=image.geometry.size,
        block_size=image.geometry.block_size,
        data=data,
        zero=image.geometry.size - data - unused,
        unused=unused,
        unused_becomes=options.unused,
        target=verdict.path,
        target_kind=identity.kind if identity else "new file",
        target_size=size,
        target_model=identity.model if identity else None,
        target_serial=identity.serial if identity else None,
        target_holds=tuple(_holds(verdict)),
        mode="resume" if resuming else "delta" if options.delta and identity else "full",
        verify=options.verify,
        resumed=image.geometry.total(journal.done),
        left_alone=max(0, (size or 0) - image.geometry.size) if device else 0,
        unreadable=image.unreadable,
        warnings=tuple(_warnings(verdict, image.geometry, data, options, resuming)),
        needs_confirmation=device,
        question=_question(verdict),
    )
    for name, value in (
        ("image", image), ("journal", journal), ("options", options), ("verdict", verdict),
    ):  # fmt: skip
        object.__setattr__(facts, name, value)
    return facts


def _examine(
    image: Image, target: str, options: RestoreOptions, storage: Storage
) -> tuple[guard.Verdict, Journal, bool]:
    root = local_path(storage)  # A far repository lives on no disk of this machine.

    def ask(overwrite: bool) -> guard.Verdict:
        return guard.examine(
            target,
            repository_path=root,
            required_size=image.geometry.size,
            overwrite=overwrite,
            whole_disk=whole,
        )

    whole = _whole_disk(image, target)
    verdict = ask(options.overwrite)
    identity = verdict.identity
    place = (identity.dev, identity.inode or identity.diskseq or 0) if identity else (0, 0)
    journal = Journal(
        target=identity.key if identity else f"file:{verdict.path}",
        place=place,
        set_id=image.manifest.id,
        disk=image.disk,
        size=image.geometry.size,
        block_size=image.geometry.block_size,
        zeroed=options.unused == "zero",
    )
    resuming = options.resume and identity is not None and journal.load()
    if resuming and not options.overwrite and not verdict.allowed:
        verdict = ask(True)  # the content is this very restore's own
    return verdict, journal, resuming


def _whole_disk(image: Image, target: str) -> bool | None:
    """Whether the image is of a whole disk (it has a partition table) or of a partition; None: unsure.

    Asked only where the target is a device; a damaged beginning tells nothing.
    """
    try:
        if not stat.S_ISBLK(os.stat(target).st_mode):
            return None
    except OSError:
        return None
    if isinstance(image.source, dict) and image.source.get("kind") == "partition":
        return False
    from imager.device.partition_table import read_table
    from imager.engine.stream import Streamer

    size = image.geometry.size
    streamer = Streamer(image)
    try:
        streamer.fill(0, min(size, _TABLE))
        for sector in (512, 4096):
            if read_table(lambda at, length: os.pread(streamer.fd, length, at), size, sector):
                return True
    except IntegrityError:
        pass
    finally:
        streamer.close()
    return None


def _holds(verdict: guard.Verdict) -> Iterator[str]:
    """What is on the target now."""
    identity = verdict.identity
    if identity is None:
        return
    if not identity.is_device:
        yield format_size(identity.size) if identity.size else "nothing: it is empty"
        return
    from imager.device import sysfs
    from imager.device.probe import probe

    node = sysfs.read_node(sysfs.name_of(identity.dev) or "")
    for path in [identity.path, *(f"/dev/{name}" for name in (node.partitions if node else ()))]:
        content = probe(path)
        what = content.type or (f"{content.table} partition table" if content.table else None)
        if what:
            label = f" {content.label!r}" if content.label else ""
            yield f"{path}: {what}{label}"


def _warnings(
    verdict: guard.Verdict, geometry: Geometry, data: int, options: RestoreOptions, resuming: bool
) -> Iterator[str]:
    if not options.verify:
        yield "what is written will NOT be read back (--no-verify): errors of the target stay unnoticed"
    if options.resume and not resuming:
        yield "no earlier restore of this set to this target is on record: it begins anew"
    identity = verdict.identity
    if verdict.is_device:
        if identity and identity.size > geometry.size and identity.kind != "partition":
            yield (
                "the target is larger than the image: a GPT's backup stays where it was on the smaller disk"
                " (sgdisk --move-second-header puts it to the end)"
            )
        return
    if identity is not None and identity.size > geometry.size:
        yield f"{verdict.path} is cut to the image's {geometry.size} bytes"
    free = _free(verdict.path)
    if free is not None and free < data and identity is None:
        folder = os.path.dirname(verdict.path)
        yield f"{format_size(data)} are to be written, {format_size(free)} are free in {folder}"


def _free(path: str) -> int | None:
    try:
        stat = os.statvfs(os.path.dirname(path))
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def _question(verdict: guard.Verdict) -> str:
    identity = verdict.identity
    if identity is None or not identity.is_device:
        return ""
    if identity.serial:
        return f"type the last four characters of its serial ({identity.serial})"
    return f"type its name ({identity.confirmation})"
