"""Backup: several sources into one image set.

Invariant: the manifest is written last, when all that it names is durable; an
error before that leaves no set. A changed-block map is believed only where it
fits the base set and a random sample of what it calls unchanged is unchanged.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

from msgspec import Struct, field
from msgspec.structs import asdict

from imager import __version__, _native
from imager._native import DATA, ZERO, Slots
from imager.changes.holes import Holes
from imager.changes.provider import ZERO as ELSEWHERE_ZERO
from imager.changes.provider import Base, Changes, Request, Unknown
from imager.changes.scan import HashScan
from imager.engine import layouts, unused
from imager.engine.backup_plan import (
    STRATEGIES,
    BackupOptions,
    BackupPlan,
    default_block_size,
    image_of,
    parse_compression,
    plan,
)
from imager.engine.imaging import Figures, Imaged, Imaging, Settings, read_failed
from imager.engine.source import Opened, SourcePlan, open_source
from imager.engine.unused import Unused
from imager.errors import ImagerError
from imager.events import Reporter
from imager.extents import Extents
from imager.repository import imageset, index, merging, missing
from imager.repository.blockmap import DamagedPage, MapReader
from imager.repository.format import lineage_id, now
from imager.repository.imageset import Body, Head, Image, Previous, Public
from imager.repository.knownpages import KnownPages
from imager.repository.repository import Repository
from imager.repository.session import Session
from imager.repository.witness import Witness

__all__ = [
    "STRATEGIES", "BackupOptions", "BackupPlan", "BackupSummary", "ImageSummary", "default_block_size",
    "execute", "parse_compression", "plan",
]  # fmt: skip


class ImageSummary(Struct, frozen=True):
    """What imaging one source came to. Extents as (start, length) in bytes."""

    disk: str
    size: int
    block_size: int
    change_source: str
    blocks_read: int
    blocks_changed: int
    blocks_new: int
    blocks_shared: int
    blocks_zero: int
    blocks_sampled: int
    bytes_read: int
    bytes_stored: int
    unreadable: tuple[tuple[int, int], ...]
    blocks_unused: int = 0


class BackupSummary(Struct, frozen=True):
    """A finished set. `bytes_stored`: all that was written to the repository.

    `by_content`: the key cannot read earlier sets, so all was read and looked up by its content.
    """

    set: str
    name: str
    strategy: str
    base: str | None
    sequence: int
    by_content: bool
    images: tuple[ImageSummary, ...]
    bytes_stored: int
    seconds: float

    @property
    def incomplete(self) -> bool:
        """Whether parts of a source could not be read."""
        return any(image.unreadable for image in self.images)


class _Locked:
    """A reporter that several threads may call."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._lock = threading.Lock()

    def phase(self, name: str, total: int | None) -> None:
        with self._lock:
            self._reporter.phase(name, total)

    def advance(self, done: int, *, stored: int = 0) -> None:
        with self._lock:
            self._reporter.advance(done, stored=stored)

    def end(self) -> None:
        with self._lock:
            self._reporter.end()

    def note(self, text: str) -> None:
        with self._lock:
            self._reporter.note(text)

    def warn(self, text: str, *, hint: str | None = None) -> None:
        with self._lock:
            self._reporter.warn(text, hint=hint)


class _Lane(Struct):
    """One source while it is imaged."""

    source: SourcePlan
    opened: Opened | None
    base: Image | None
    wanted: Extents
    elsewhere: int | None
    change_source: str
    sampled: int = 0
    unused: Unused = Unused()
    layout: layouts.Capture | None = None
    imaging: Imaging | None = None
    imaged: Imaged | None = None
    error: BaseException | None = None
    done: threading.Event = field(default_factory=threading.Event)


def execute(repository: Repository, plan: BackupPlan, reporter: Reporter) -> BackupSummary:
    """Carry out a plan.

    Raises `SourceError` (a source cannot be read), `StorageError`, `Locked`;
    then no set was made.
    """
    begun, started = time.monotonic(), now()
    locked = _Locked(reporter)
    lanes: list[_Lane] = []
    try:
        # First of all, so that a prune knows of this writer before it counts on anything.
        with Session.begin(repository, host=plan.host) as session:
            known = index.look_around(session, locked)
            lost = missing.digest(missing.packs(repository, without=session.condemned))
            for source in plan.sources:
                lanes.append(_lane(repository, plan, source, known, lost, locked))
            return _run(session, plan, lanes, known, lost, locked, started, begun)
    finally:
        for lane in lanes:
            if lane.layout is not None:
                lane.layout.close()
            if lane.opened is not None:
                lane.opened.close()


def _lane(
    repository: Repository,
    plan: BackupPlan,
    source: SourcePlan,
    known: _native.Known,
    lost: str,
    reporter: Reporter,
) -> _Lane:
    base = image_of(plan.base_manifest, source, plan.block_size)
    if source.stream:
        return _Lane(source, None, base, Extents(), None, "stream")
    opened = open_source(source)
    try:
        changes, sampled = _changes(repository, plan, source, opened, base, reporter)
        out = unused.find(opened, plan.block_size, reporter) if plan.options.used_blocks else Unused()
    except BaseException:
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
        gone = unused.left_out(repository, plan.base_manifest, base)
        wanted |= gone.clip(-(-opened.size // plan.block_size))
    wanted -= out.blocks
    layout = layouts.Capture(source, opened)
    return _Lane(source, opened, base, wanted, elsewhere, changes.source, sampled, out, layout)


def _changes(
    repository: Repository,
    plan: BackupPlan,
    source: SourcePlan,
    opened: Opened,
    base: Image | None,
    reporter: Reporter,
) -> tuple[Changes, int]:
    """What to read, and how many blocks were sampled to find out."""
    request = Request(opened.fd, opened.size, source.identity, _base_of(plan, base))
    sampled = 0
    if plan.options.changed is not None:
        from imager.changes import given

        answer = given.read(plan.options.changed).changes(request)
        if isinstance(answer, Changes) and base is not None:
            try:
                problem, sampled = _sample(repository, plan, opened, base, answer)
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
) -> tuple[str | None, int]:
    """Compare random blocks that a map calls unchanged: (what is wrong, blocks compared).

    Raises `DamagedPage` where the base's map is, `SourceError`.
    """
    from imager.changes import sample

    chosen = sample.choose(changes.extents.blocks(plan.block_size), base.blocks)
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


def _run(
    session: Session,
    plan: BackupPlan,
    lanes: list[_Lane],
    known: _native.Known,
    lost: str,
    reporter: Reporter,
    started: int,
    begun: float,
) -> BackupSummary:
    repository = session.repository
    codec, level = parse_compression(plan.compression)
    settings = Settings(
        plan.block_size, codec, level, plan.options.threads, plan.options.on_read_error == "skip"
    )
    total = None
    if not any(lane.source.stream for lane in lanes):
        total = sum(
            min(lane.wanted.total * plan.block_size, lane.opened.size)
            for lane in lanes
            if lane.opened is not None
        )
    reporter.phase("reading", total)
    stored = None
    if plan.by_content and plan.previous is not None:
        stored = KnownPages(repository, plan.previous.public.roots)
    for lane in lanes:
        base = MapReader(repository, lane.base, listed_only=True) if lane.base is not None else None
        size = lane.opened.size if lane.opened is not None else 0
        lane.imaging = Imaging(session, known, settings, base, reporter, size, stored)
    if len(lanes) == 1:
        _image(lanes[0])
    else:
        _image_all(lanes)
    reporter.end()
    images: list[Image] = []
    roots = []
    for lane in lanes:
        assert lane.imaging is not None and lane.imaged is not None
        roots.append(lane.imaging.write_map())
        images.append(
            Image(
                disk=lane.source.disk,
                size=lane.imaged.size,
                block_size=plan.block_size,
                unreadable=lane.imaged.unreadable,
                source=_identity(lane.source),
                layout=lane.layout.result() if lane.layout is not None else None,
            )
        )
    segment = index.write_segment(session, known)
    if known.damaged_pages:
        reporter.warn(
            f"{known.damaged_pages} look-ups met a damaged index page",
            hint="nothing is lost, but blocks may be stored twice; imager check --repair mends it",
        )
    previous = plan.previous
    lineage = lineage_id(repository.secrets.id_key, plan.host, plan.name)
    public = Public(
        repository=repository.config.repository,
        set=session.id,
        version=1,
        features=(),
        # A clock that went back must not make an older set the latest.
        created=max(now(), previous.created + 1 if previous else 0),
        lineage=lineage.hex(),
        sequence=previous.sequence + 1 if previous else 1,
        previous=Previous(previous.id, previous.digest.hex()) if previous else None,
        envelope=session.envelope.hex() if session.envelope else None,
        roots=tuple(roots),
    )
    summaries = tuple(_summary(plan, lane) for lane in lanes)
    body = Body(
        name=plan.name,
        host=plan.host,
        images=tuple(images),
        strategy=plan.strategy,
        base=plan.base,
        changes=[lane.unused.told(lane.change_source) for lane in lanes],
        stats=_stats(summaries, session.stored),
        tags=plan.options.tags,
        started=started,
        finished=now(),
        tool=f"imager {__version__}",
        lost=lost,
    )
    manifest = imageset.encode(repository, public, body, session.key)
    session.commit(manifest)
    head = Head(
        session.id, public.created, public.lineage, public.sequence, _native.blake3(manifest), manifest
    )
    for problem in Witness(repository.place).committed(head, plan.seen):
        reporter.note(problem)
    if segment is not None:
        merging.tend(repository, known, reporter, stored=session.stored)
    return BackupSummary(
        set=session.id,
        name=plan.name,
        strategy=plan.strategy,
        base=plan.base,
        sequence=public.sequence,
        by_content=plan.by_content,
        images=summaries,
        bytes_stored=session.stored,
        seconds=round(time.monotonic() - begun, 3),
    )


def _image(lane: _Lane) -> None:
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


def _image_all(lanes: list[_Lane]) -> None:
    """Image all lanes at once. None works any longer when this ends: their files are closed after it."""
    begun: list[_Lane] = []
    try:
        for lane in lanes:
            thread = threading.Thread(target=_image_caught, args=(lane, lanes), name=lane.source.disk)
            begun.append(lane)
            try:
                thread.start()
            except RuntimeError:  # no thread to be had
                begun.pop()
                raise
        for lane in lanes:
            lane.done.wait()
    except BaseException:
        _stop(lanes)
        for lane in begun:
            # Not by Thread.join: interrupted, that takes a running thread for ended (Python 3.11).
            while not lane.done.is_set():
                try:
                    lane.done.wait()
                except KeyboardInterrupt:
                    continue  # It ends with the segment that is being read.
        raise
    errors = [lane.error for lane in lanes if lane.error is not None]
    if errors:
        # Others fail for its sake: they were stopped, or waited for a block that it did not store.
        raise next((error for error in errors if isinstance(error, ImagerError)), errors[0])


def _image_caught(lane: _Lane, lanes: list[_Lane]) -> None:
    try:
        _image(lane)
    except BaseException as error:
        lane.error = error
        _stop(lanes)
    finally:
        lane.done.set()


def _stop(lanes: list[_Lane]) -> None:
    for lane in lanes:
        if lane.imaging is not None:
            lane.imaging.stopped = True


def _identity(source: SourcePlan) -> dict[str, object]:
    kept = {key: value for key, value in asdict(source.identity).items() if value not in (None, 0, "")}
    return {**kept, "given": source.path}


def _summary(plan: BackupPlan, lane: _Lane) -> ImageSummary:
    assert lane.imaging is not None and lane.imaged is not None
    figures: Figures = lane.imaging.figures
    return ImageSummary(
        disk=lane.source.disk,
        size=lane.imaged.size,
        block_size=plan.block_size,
        change_source=lane.change_source,
        blocks_read=figures.blocks_read + lane.sampled,
        blocks_changed=figures.blocks_changed,
        blocks_new=figures.blocks_new,
        blocks_shared=figures.blocks_shared,
        blocks_zero=figures.blocks_zero,
        blocks_sampled=lane.sampled,
        bytes_read=figures.bytes_read + lane.sampled * plan.block_size,
        bytes_stored=figures.bytes_stored,
        unreadable=lane.imaged.unreadable,
        blocks_unused=lane.unused.blocks.total,
    )


def _stats(summaries: Sequence[ImageSummary], stored: int) -> dict[str, int]:
    fields = ("blocks_read", "blocks_changed", "blocks_new", "blocks_shared", "blocks_zero", "bytes_read")
    stats = {field: sum(getattr(summary, field) for summary in summaries) for field in fields}
    return {**stats, "bytes_stored": stored, "size": sum(summary.size for summary in summaries)}
