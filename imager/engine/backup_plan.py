"""What a backup is going to do: its sources, its base, its strategy.

Invariant: making a plan reads no content and writes nothing to the
repository; a base is chosen only where its manifest is whole and one of its
disks is a source of the same block size.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from msgspec import Struct

from imager.engine.source import SourcePlan, lineage_name, plan_sources
from imager.errors import ImagerError, UsageError, WrongKey
from imager.events import Reporter
from imager.repository import imageset, knownpages, tombstones
from imager.repository.format import is_block_size, lineage_id
from imager.repository.imageset import Head, Image, Manifest
from imager.repository.repository import Repository
from imager.repository.witness import Witness
from imager.repository.writers import ANY_HOST
from imager.units import KIB, MIB, TIB, format_size

STRATEGIES = ("auto", "full", "incremental", "differential")
_CODECS = {"none": 0, "lz4": 1, "zstd": 2}


class BackupOptions(Struct, frozen=True):
    """What is asked for. `block_size` in bytes, None: by device size or base. `changed`: a map file.

    `used_blocks`: leave out what no filesystem uses, where its maps are believed.
    """

    name: str | None = None
    strategy: str = "auto"
    compression: str = "lz4"
    block_size: int | None = None
    changed: str | None = None
    on_read_error: str = "fail"
    tags: tuple[str, ...] = ()
    threads: int = 0
    used_blocks: bool = True


class BackupPlan(Struct, frozen=True):
    """What is going to be done. `base` is a set's id, `seen` the ids of all sets that were there."""

    name: str
    host: str
    strategy: str
    base: str | None
    block_size: int
    compression: str
    sources: tuple[SourcePlan, ...]
    options: BackupOptions
    base_manifest: Manifest | None
    previous: Manifest | None
    seen: tuple[str, ...] = ()

    @property
    def by_content(self) -> bool:
        """Whether there is an earlier set that the key cannot read: its content is found by the index."""
        return self.previous is not None and self.previous.body is None

    def describe(self) -> list[str]:
        """The plan in lines for a person."""
        base = f" on set {self.base[:8]}" if self.base else ""
        how = f"{self.compression}, blocks of {format_size(self.block_size)}"
        lines = [f"back up as {self.name}: {self.strategy}{base}, {how}"]
        if self.by_content:
            lines.append("  all is read and looked up by its content: this key cannot read earlier sets")
        for source in self.sources:
            size = "a stream" if source.stream else format_size(source.size)
            what = " ".join(filter(None, (source.identity.model, source.identity.serial)))
            lines.append(f"  {source.path} as {source.disk}: {size}{', ' + what if what else ''}")
        if self.options.changed:
            lines.append(f"  changed blocks by {self.options.changed}, where it fits the base set")
        if not self.options.used_blocks:
            lines.append("  blocks that no filesystem uses are imaged, too")
        return lines


def default_block_size(size: int) -> int:
    """64 KiB up to 4 TiB, 256 KiB up to 64 TiB, 1 MiB beyond."""
    return 64 * KIB if size <= 4 * TIB else 256 * KIB if size <= 64 * TIB else MIB


def parse_compression(text: str) -> tuple[int, int]:
    """(codec number, level) of `lz4`, `zstd`, `zstd:N` or `none`. Raises `UsageError`."""
    name, _, level = text.partition(":")
    number = int(level) if level.isdecimal() else 1 if not level else 0
    if name not in _CODECS or (level and name != "zstd") or not 1 <= number <= 19:
        raise UsageError(f"unknown compression {text!r}", hint="lz4, zstd, zstd:1 to zstd:19, or none")
    return _CODECS[name], number


def plan(
    repository: Repository, sources: Sequence[str], options: BackupOptions, reporter: Reporter
) -> BackupPlan:
    """Identify sources, base and strategy. Reads no content.

    Raises `UsageError`, `SourceError`, `StorageError`, `WrongKey` where the key may not back up this host.
    """
    parse_compression(options.compression)
    if options.strategy not in STRATEGIES:
        raise UsageError(f"unknown strategy {options.strategy!r}", hint=", ".join(STRATEGIES))
    found = plan_sources(sources, options.name)
    _refuse_own_storage(repository, found)
    name = lineage_name(found, options.name)
    host = imageset.this_host()
    _may_sign(repository, host)
    heads, damaged = imageset.heads(repository)
    for problem in Witness(repository.place).observe(
        heads,
        damaged=[item.id for item in damaged],
        forgotten=tombstones.digests(repository),
        there=tombstones.exists(repository),
    ):
        reporter.warn(problem, hint="run imager check; if that was you, go on: this backup will be whole")
    lineage = lineage_id(repository.secrets.id_key, host, name)
    previous, unusable = imageset.latest_of(repository, lineage, heads, host)
    for item in unusable:
        reporter.warn(f"image set {item.id[:8]} cannot be used as a base: {item.reason}")
    base = _base(repository, options, lineage, previous, heads, reporter)
    block_size = _block_size(repository, options, found, base, previous)
    if base is not None and not _fits(base, found, block_size):
        reporter.note(
            f"set {base.id[:8]} has none of these disks, or another block size: this is a full backup"
        )
        base = None
    strategy = "full"
    if base is not None:
        strategy = "differential" if options.strategy == "differential" else "incremental"
    return BackupPlan(
        name,
        host,
        strategy,
        base.id if base else None,
        block_size,
        options.compression,
        found,
        options,
        base,
        previous,
        tuple(head.id for head in heads),
    )


def _may_sign(repository: Repository, host: str) -> None:
    secrets = repository.secrets
    if repository.sealed and not secrets.signing_seed:
        raise WrongKey("this key can read, but not back up", hint="use a key with the role write or full")
    writer = secrets.writer
    if writer is None:
        return
    if writer.host not in (ANY_HOST, host):
        raise WrongKey(
            f"this key may back up the machine {writer.host}, and this one is called {host}",
            hint=f"have a key made for it: imager key add --role write --host {host}",
        )
    if writer.writer in repository.revoked():
        raise WrongKey(
            f"the key of writer {writer.label} was revoked: nothing that it signs counts any more",
            hint="have a new one made: imager key add --role write",
        )


def _refuse_own_storage(repository: Repository, sources: Sequence[SourcePlan]) -> None:
    folder = os.path.realpath(repository.storage.url)
    for source in sources:
        if not source.stream and source.identity.path.startswith(folder + os.sep):
            raise UsageError(f"{source.path} is part of the repository itself")


def _base(
    repository: Repository,
    options: BackupOptions,
    lineage: bytes,
    previous: Manifest | None,
    heads: Sequence[Head],
    reporter: Reporter,
) -> Manifest | None:
    if options.strategy == "full" or previous is None:
        if options.strategy in ("incremental", "differential"):
            reporter.note(
                f"there is no earlier set to build on: this is a full backup, not {options.strategy}"
            )
        return None
    if previous.body is None:
        reporter.note(
            "this key cannot read earlier sets: all is read and looked up by its content; "
            "what is stored already is not stored again"
        )
        return None
    if options.strategy != "differential" or previous.body.strategy == "full":
        return previous
    own = sorted((h for h in heads if h.lineage == lineage.hex()), key=lambda h: h.sequence, reverse=True)
    for head in own:
        try:
            manifest = imageset.decode(repository, head.id, head.raw)
        except ImagerError:
            continue  # Told of already, or older than what is needed.
        if manifest.body is not None and manifest.body.strategy == "full":
            return manifest
    reporter.note("there is no full set left to build on: this is a full backup")
    return None


def _block_size(
    repository: Repository,
    options: BackupOptions,
    sources: Sequence[SourcePlan],
    base: Manifest | None,
    previous: Manifest | None,
) -> int:
    wanted = options.block_size
    if wanted is not None and not is_block_size(wanted):
        raise UsageError(f"{wanted} bytes is no block size", hint="a power of two from 4KiB to 4MiB")
    fixed = repository.config.block_size
    if fixed and wanted not in (None, fixed):
        raise UsageError(f"this repository has blocks of {format_size(fixed)}, for every image")
    if fixed or wanted:
        return fixed or wanted or 0
    if base is not None and base.images:
        return base.images[0].block_size
    if previous is not None and previous.body is None:
        # Other blocks would have other ids: all would be stored again.
        told = knownpages.block_size(repository, previous.public)
        if told is not None:
            return told
    return default_block_size(max(source.size for source in sources))


def _fits(base: Manifest, sources: Sequence[SourcePlan], block_size: int) -> bool:
    return any(image_of(base, source, block_size) is not None for source in sources)


def image_of(base: Manifest | None, source: SourcePlan, block_size: int) -> Image | None:
    """The base's image that a source is compared with: of the same disk name, or the same identity."""
    if base is None:
        return None
    images = [image for image in base.images if image.block_size == block_size]
    for image in images:
        if (
            not source.stream
            and isinstance(image.source, dict)
            and image.source.get("key") == source.identity.key
        ):
            return image
    return next((image for image in images if image.disk == source.disk), None)
