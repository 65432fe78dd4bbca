"""Backup: several sources into one image set.

Invariant: the manifest is written last, when all that it names is durable; an
error before that leaves no set. A changed-block map is believed only where it
fits the base set and a random sample of what it calls unchanged is unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from msgspec import Struct
from msgspec.structs import asdict

from imager import __version__, _native
from imager.engine.backup_plan import (
    STRATEGIES,
    BackupOptions,
    BackupPlan,
    default_block_size,
    parse_compression,
    plan,
)
from imager.engine.imaging import Figures, Imaging, Settings
from imager.engine.lanes import Lane, image_all, open_lane
from imager.engine.source import SourcePlan
from imager.engine.unused import PartUse
from imager.events import Locked, Reporter
from imager.repository import imageset, index, merging, missing
from imager.repository.blockmap import MapReader
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
    """What imaging one source came to. Extents as (start, length) in bytes.

    `blocks_unused` were left out, `bytes_used` is the size without them, and `parts` says for each
    partition how that is known; nothing where every block was asked for.
    """

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
    bytes_used: int = 0
    parts: tuple[PartUse, ...] = ()


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


def execute(repository: Repository, plan: BackupPlan, reporter: Reporter) -> BackupSummary:
    """Carry out a plan.

    Raises `SourceError` (a source cannot be read), `StorageError`, `Locked`;
    then no set was made.
    """
    begun, started = time.monotonic(), now()
    locked = Locked(reporter)
    lanes: list[Lane] = []
    try:
        # First of all, so that a prune knows of this writer before it counts on anything.
        with Session.begin(repository, host=plan.host) as session:
            known = index.look_around(session, locked)
            lost = missing.digest(missing.packs(repository, without=session.condemned))
            for source in plan.sources:
                lanes.append(open_lane(repository, plan, source, known, lost, locked))
            return _run(session, plan, lanes, known, lost, locked, started, begun)
    finally:
        for lane in lanes:
            if lane.layout is not None:
                lane.layout.close()
            if lane.opened is not None:
                lane.opened.close()


def _run(
    session: Session,
    plan: BackupPlan,
    lanes: list[Lane],
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
        total = sum(lane.to_read for lane in lanes)
    reporter.phase("reading", total)
    stored = None
    if plan.by_content and plan.previous is not None:
        stored = KnownPages(repository, plan.previous.public.roots)
    for lane in lanes:

        def begin(lane: Lane = lane) -> Imaging:
            base = MapReader(repository, lane.base, listed_only=True) if lane.base is not None else None
            size = lane.opened.size if lane.opened is not None else 0
            return Imaging(session, known, settings, base, reporter, size, stored)

        lane.begin, lane.imaging = begin, begin()
    image_all(lanes, reporter)
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
        changes=[lane.unused.told(lane.change_source, lane.wanted) for lane in lanes],
        stats=_stats(summaries, session.stored),
        tags=plan.options.tags,
        started=started,
        finished=now(),
        tool=f"imager {__version__}",
        lost=lost,
    )
    manifest = imageset.encode(repository, public, body, session.key)
    session.commit(manifest)
    head = Head(session.id, public.created, public.lineage, public.sequence, _native.blake3(manifest))
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


def _identity(source: SourcePlan) -> dict[str, object]:
    kept = {key: value for key, value in asdict(source.identity).items() if value not in (None, 0, "")}
    return {**kept, "given": source.path}


def _summary(plan: BackupPlan, lane: Lane) -> ImageSummary:
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
        bytes_used=lane.imaged.size - lane.unused.bytes,
        parts=lane.unused.uses(lane.wanted),
    )


def _stats(summaries: Sequence[ImageSummary], stored: int) -> dict[str, int]:
    fields = ("blocks_read", "blocks_changed", "blocks_new", "blocks_shared", "blocks_zero", "bytes_read")
    stats = {field: sum(getattr(summary, field) for summary in summaries) for field in fields}
    return {**stats, "bytes_stored": stored, "size": sum(summary.size for summary in summaries)}
