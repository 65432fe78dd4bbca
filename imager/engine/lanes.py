"""The sources of one backup, each on its way: what of it is to be read, and reading them all at once.

Invariant: a changed-block map is believed only where it fits the base set and a
random sample of what it calls unchanged is unchanged; a used-block map only
where it is the same before and after. Threads work only while `image_all` runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from msgspec import Struct

from imager import _native
from imager._native import DATA, ZERO, Slots
from imager.changes.holes import Holes
from imager.changes.provider import ZERO as ELSEWHERE_ZERO
from imager.changes.provider import Base, Changes, Request, Unknown
from imager.changes.scan import HashScan
from imager.engine import layouts, unused
from imager.engine.background import Background
from imager.engine.backup_plan import BackupPlan, image_of
from imager.engine.imaging import Imaged, Imaging, read_failed
from imager.engine.source import Opened, SourcePlan, open_source
from imager.engine.unused import Unused
from imager.errors import ImagerError
from imager.events import Reporter
from imager.extents import Extents
from imager.repository import missing
from imager.repository.blockmap import DamagedPage, MapReader
from imager.repository.imageset import Image
from imager.repository.repository import Repository


class Lane(Struct):
    """One source while it is imaged. `wanted`: the blocks that are to be read, if they are in use.

    `begin` makes what images it, once all that it needs is known.
    """

    source: SourcePlan
    opened: Opened | None
    base: Image | None
    wanted: Extents
    elsewhere: int | None
    change_source: str
    sampled: int = 0
    unused: Unused = Unused()
    layout: Background[dict[str, Any]] | None = None
    begin: Callable[[], Imaging] | None = None
    imaging: Imaging | None = None
    imaged: Imaged | None = None

    @property
    def to_read(self) -> int:
        """Bytes that are going to be read, as far as that can be told beforehand."""
        if self.opened is None:
            return 0
        blocks = self.wanted.total - (self.wanted & self.unused.blocks).total
        return min(blocks * self.unused.block_size, self.opened.size)


def open_lane(
    repository: Repository,
    plan: BackupPlan,
    source: SourcePlan,
    known: _native.Known,
    lost: str,
    reporter: Reporter,
) -> Lane:
    """Open a source and find out what of it is to be read. Raises `SourceError`."""
    base = image_of(plan.base_manifest, source, plan.block_size)
    if source.stream:
        return Lane(source, None, base, Extents(), None, "stream")
    opened = open_source(source)
    layout = Background("layout", lambda: layouts.capture(source, opened))
    finding = Background("used blocks", lambda: _unused(plan, opened))
    try:
        gone = Extents()
        if plan.options.changed is not None and base is not None and plan.base_manifest is not None:
            gone = unused.left_out(repository, plan.base_manifest, base)
            gone = gone.clip(-(-opened.size // plan.block_size))
        changes, sampled = _changes(repository, plan, source, opened, base, finding, gone, reporter)
        out = finding.result()
    except BaseException:
        finding.close()
        layout.close()
        opened.close()
        raise
    elsewhere = ZERO if changes.elsewhere == ELSEWHERE_ZERO else None
    wanted = changes.extents.clip(opened.size).blocks(plan.block_size)
    if not changes.exact and base is not None and plan.base_manifest is not None:
        # What the base could not read is not known to be unchanged, whatever a map says.
        unread = Extents.of((start, start + length) for start, length in base.unreadable)
        wanted |= unread.clip(opened.size).blocks(plan.block_size)
        if lost and lost != plan.base_manifest.content.lost:
            wanted |= missing.blocks(repository, base, known)
        wanted |= gone
    return Lane(source, opened, base, wanted, elsewhere, changes.source, sampled, out, layout)


def _unused(plan: BackupPlan, opened: Opened) -> Unused:
    if plan.options.used_blocks:
        return unused.find(opened, plan.block_size)
    return Unused(block_size=plan.block_size, size=opened.size)


def _changes(
    repository: Repository,
    plan: BackupPlan,
    source: SourcePlan,
    opened: Opened,
    base: Image | None,
    finding: Background[Unused],
    gone: Extents,
    reporter: Reporter,
) -> tuple[Changes, int]:
    """What to read, and how many blocks were sampled to find out.

    Blocks that `finding` finds not in use, or that were not when the base was made (`gone`), are no sample.
    """
    request = Request(opened.fd, opened.size, source.identity, _base_of(plan, base))
    sampled = 0
    if plan.options.changed is not None:
        from imager.changes import given

        answer = given.read(plan.options.changed).changes(request)
        if isinstance(answer, Changes) and base is not None:
            try:
                skip = finding.result().blocks | gone
                problem, sampled = _sample(repository, plan, opened, base, answer, skip)
            except DamagedPage as damage:
                reporter.warn(
                    f"the map {plan.options.changed} is not used: {damage.message}",
                    hint=f"all of {source.path} is read instead; imager check names what is damaged",
                )
                return _without_map(request), 0
            if problem is None:
                return answer, sampled
            reporter.warn(
                f"the map {plan.options.changed} is wrong and is not used: {problem}",
                hint=f"all of {source.path} is read instead; find out why it was wrong",
            )
        elif isinstance(answer, Unknown):
            reporter.warn(
                f"the map {plan.options.changed} is not used for {source.path}: {answer.reason}",
                hint=f"all of {source.path} is read instead",
            )
    return _without_map(request), sampled


def _without_map(request: Request) -> Changes:
    return (HashScan() if request.identity.is_device else Holes()).changes(request)


def _base_of(plan: BackupPlan, base: Image | None) -> Base | None:
    if base is None or plan.base_manifest is None:
        return None
    kept = base.source if isinstance(base.source, dict) else {}
    return Base(plan.base_manifest.id, plan.base_manifest.digest.hex(), base.size, kept)


def _sample(
    repository: Repository,
    plan: BackupPlan,
    opened: Opened,
    base: Image,
    changes: Changes,
    skip: Extents,
) -> tuple[str | None, int]:
    """Compare random blocks that a map calls unchanged: (what is wrong, blocks compared).

    Raises `DamagedPage` where the base's map is, `SourceError`.
    """
    from imager.changes import sample

    chosen = sample.choose(changes.extents.blocks(plan.block_size), base.blocks, skip)
    if not chosen:
        return None, 0
    ranges = Extents.of((block, block + 1) for block in chosen)
    slots = Slots()
    for _, count, part in MapReader(repository, base, listed_only=True).walk(ranges.ranges):
        slots.extend(Slots(count, part) if isinstance(part, int) else part)
    try:
        found = _native.scan(
            repository.vault,
            opened.fd,
            list(ranges),
            image_size=opened.size,
            block_size=plan.block_size,
            base=slots,
            threads=plan.options.threads,
            direct=opened.direct,
        )
    except _native.ReadError as error:
        if plan.options.on_read_error == "fail":
            raise read_failed(opened.path, error) from error
        return f"a block that it calls unchanged cannot be read ({error.strerror})", len(chosen)
    wrong = sum(end - start for start, end in found.differing)
    # A base block that could not be read then says nothing about a change.
    lost = sum(end - start for kind, start, end in slots.runs() if kind not in (DATA, ZERO))
    if wrong > lost:
        first = found.differing[0][0] * plan.block_size
        said = f"{wrong} of {len(chosen)} sampled blocks that it calls unchanged have changed"
        return f"{said}, the first at byte {first}", len(chosen)
    return None, len(chosen)


def _image(lane: Lane, reporter: Reporter) -> None:
    assert lane.imaging is not None
    if lane.opened is None:
        path = lane.source.identity.path
        fd = 0 if path == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            lane.imaged = lane.imaging.stream(fd, "standard input" if path == "-" else path)
        finally:
            if fd:
                os.close(fd)
        return
    lane.imaged = lane.imaging.read(lane.opened, lane.wanted, lane.elsewhere, lane.unused.blocks)
    while moved := lane.unused.moved(lane.opened):
        _take_all(lane, moved, reporter)
        lane.imaged = lane.imaging.read(lane.opened, lane.wanted, lane.elsewhere, lane.unused.blocks)


def _take_all(lane: Lane, moved: Sequence[int], reporter: Reporter) -> None:
    """What was left out of some parts may be in use now: begin anew, with every block of them."""
    assert lane.imaging is not None and lane.opened is not None and lane.begin is not None
    for at in moved:
        part = lane.unused.parts[at]
        # Whatever a map of changes said of it, that did not speak of what came to be while it was read.
        place = Extents.of([(part.start, part.start + part.size)]).clip(lane.opened.size)
        lane.wanted |= place.blocks(lane.unused.block_size)
        number = part.number
        what = lane.source.path if number is None else f"partition {number} of {lane.source.path}"
        reporter.warn(
            f"{what} was written to while it was read: every block of it is read now",
            hint="this image is no state that it ever was in: back up an unmounted filesystem, or a snapshot",
        )
    earlier = lane.imaging
    lane.unused = lane.unused.without(moved)
    lane.imaging = lane.begin()
    lane.imaging.follow(earlier)


def image_all(lanes: list[Lane], reporter: Reporter) -> None:
    """Image all lanes at once. None works any longer when this ends: their files are closed after it."""
    if len(lanes) == 1:
        _image(lanes[0], reporter)
        return
    begun: list[Background[None]] = []
    try:
        for lane in lanes:
            work = partial(_image_caught, lane, lanes, reporter)
            begun.append(Background(lane.source.disk, work))
        for one in begun:
            one.done.wait()
    except BaseException:
        _stop(lanes)
        for one in begun:
            one.close()  # It ends with the segment that is being read.
        raise
    errors = [one.error for one in begun if one.error is not None]
    if errors:
        # Others fail for its sake: they were stopped, or waited for a block that it did not store.
        raise next((error for error in errors if isinstance(error, ImagerError)), errors[0])


def _image_caught(lane: Lane, lanes: list[Lane], reporter: Reporter) -> None:
    try:
        _image(lane, reporter)
    except BaseException:
        _stop(lanes)
        raise


def _stop(lanes: list[Lane]) -> None:
    for lane in lanes:
        if lane.imaging is not None:
            lane.imaging.stopped = True
