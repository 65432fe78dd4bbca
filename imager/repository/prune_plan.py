"""What a prune is going to do, and came to: which packs go, which are rewritten, who is waited for.

Invariant: a pack is dropped only if nothing that lives is in it, and rewritten
only if that is worth its bytes: the packs with the largest unused share first, until
what is left unused is within the limit. A pack whose writer may still be at work
is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from msgspec import Struct

from imager.errors import UsageError
from imager.repository import partial
from imager.repository.format import (
    ENVELOPE,
    FOOTER,
    KIND_DATA,
    KIND_MAP,
    PACK_HEADER,
    TRAILER_ENTRY,
    pack_object,
)
from imager.repository.marking import Marked, View
from imager.repository.repository import Repository
from imager.storage.errors import NotFound
from imager.units import count, format_size, parse_size

_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
_HEAD = 64
"Bytes of a pack's header before its envelopes: session and length are among them."
_BATCH = 1 << 30
"Bytes that are copied before what they came from is condemned: so much a kill can cost."


class PruneOptions(Struct, frozen=True):
    """What is asked for. `max_unused`: a share such as `10%`, or a size, of what is stored.

    `max_rewrite` in bytes that are copied, None: no limit; `max_minutes`: no copy is begun after.
    `fence`: sessions to declare dead; `fence_idle`: those that began so many microseconds ago.
    `despite_damage`: give up what hangs on damaged manifests and map pages alone.
    """

    max_unused: str = "10%"
    max_rewrite: int | None = None
    max_minutes: float | None = None
    fence: tuple[str, ...] = ()
    fence_idle: int | None = None
    despite_damage: bool = False


class Pack(Struct, frozen=True):
    """A pack as a prune sees it; sizes in bytes. `live`: of records that live; `unused`: of the others."""

    name: bytes
    number: int
    kind: int
    size: int
    live: int
    newest: int
    unused: int

    @property
    def object(self) -> str:
        """Its object name."""
        return pack_object(self.kind, self.name)


class PrunePlan(Struct, frozen=True):
    """What is going to be done. Sizes in bytes."""

    packs: int
    stored: int
    live: int
    unused: int
    drop: tuple[Pack, ...]
    rewrite: tuple[Pack, ...]
    condemned: int
    "Packs that an earlier prune has condemned."
    busy: int
    "Packs that are left alone, for their writer may still be at work."
    waiting: tuple[str, ...]
    "Sessions without an outcome."
    fence: tuple[str, ...]
    "Sessions that are declared dead."
    max_rewrite: int | None

    @property
    def freed(self) -> int:
        """Bytes that this frees: packs that go, less what is written anew."""
        return sum(pack.size for pack in self.drop) + sum(pack.unused for pack in self.rewrite)

    @property
    def copied(self) -> int:
        """Bytes of the records that are copied."""
        return sum(pack.live for pack in self.rewrite)

    @property
    def left(self) -> int:
        """Bytes that stay stored though nobody needs them."""
        return self.unused - self.freed

    def describe(self) -> list[str]:
        """The plan in lines for a person."""
        lines = [
            f"{count(self.packs, 'pack')}, {format_size(self.stored)}: {format_size(self.live)} live, "
            f"{format_size(self.unused)} unused",
            f"delete {count(len(self.drop), 'pack', 'that holds', 'that hold')} nothing live: "
            f"{format_size(sum(pack.size for pack in self.drop))}",
            f"rewrite {count(len(self.rewrite), 'pack')}: copy {format_size(self.copied)}, "
            f"free {format_size(sum(pack.unused for pack in self.rewrite))}",
            f"leave {format_size(self.left)} unused",
        ]
        if self.condemned:
            lines.append(f"delete {count(self.condemned, 'pack')} that an earlier prune has condemned")
        if self.busy:
            busy = count(self.busy, "pack", "alone: its writer", "alone: their writers")
            lines.append(f"leave {busy} may still be at work")
        lines += [f"declare dead: {who}" for who in self.fence]
        lines += [f"still without an outcome: {who}" for who in self.waiting]
        return lines


class PruneSummary(Struct, frozen=True):
    """What a prune came to. Sizes in bytes; `bytes_read`, `bytes_written`: of packs that were rewritten.

    `condemned`: packs that are condemned and still there; `waiting`: sessions whose end they wait for;
    `retained`: how many of them the storage keeps locked.
    """

    packs_deleted: int
    packs_rewritten: int
    packs_written: int
    bytes_deleted: int
    bytes_read: int
    bytes_written: int
    pages: int
    bytes_of_pages: int
    condemned: int
    retained: int
    waiting: tuple[str, ...]
    fenced: tuple[str, ...]
    damaged: tuple[str, ...]
    seconds: float


def parse_limit(text: str) -> tuple[float | None, int]:
    """(share of what is stored, None where a size is meant; bytes). Raises `UsageError`."""
    share = _SHARE.fullmatch(text)
    if share is None:
        return None, parse_size(text)
    if not 0 <= float(share[1]) <= 100:
        raise UsageError(f"{text} cannot be unused", hint="write a share from 0% to 100%, or a size")
    return float(share[1]) / 100, 0


def allowed(limit: str, live: int, unused: int) -> int:
    """How many bytes may stay unused. Raises `UsageError`."""
    share, size = parse_limit(limit)
    if share is None:
        return size
    # So much that it is this share of what is then stored.
    return unused if share >= 1 else int(live * share / (1 - share))


def make(
    repository: Repository,
    view: View,
    marked: Marked,
    options: PruneOptions,
    *,
    me: str | None,
    fenced: tuple[str, ...] = (),
) -> PrunePlan:
    """The plan for what was seen and marked. `me`: the prune's own session. Raises `StorageError`."""
    drop: list[Pack] = []
    rewrite: list[Pack] = []
    packs, busy = 0, 0
    stored = live = unused = 0
    doomed = view.doomed
    for kind, listed in ((KIND_DATA, view.packs), (KIND_MAP, view.maps)):
        every = [
            _pack(repository, marked, name, kind, size) for name, size in listed.items() if name not in doomed
        ]
        packs += len(every)
        stored += sum(pack.size for pack in every)
        kind_live = sum(pack.live for pack in every)
        doubtful = [pack for pack in every if pack.unused]
        settled = partial.at_once(
            repository.storage, lambda pack: _settled(repository, pack, view, me), doubtful
        )
        free = [pack for pack in settled if pack is not None]
        busy += len(doubtful) - len(free)
        kind_unused = sum(pack.unused for pack in free)
        drop += [pack for pack in free if not pack.live]
        sparse = [pack for pack in free if pack.live and pack.unused]
        rewrite += _worthwhile(sparse, allowed(options.max_unused, kind_live, kind_unused))
        live += kind_live
        unused += kind_unused
    rewrite = _within(rewrite, options.max_rewrite)
    waiting = tuple(str(one) for one in view.open.values() if one.id != me)
    return PrunePlan(
        packs,
        stored,
        live,
        unused,
        tuple(drop),
        tuple(rewrite),
        sum(name in view.packs or name in view.maps for name in doomed),
        busy,
        waiting,
        fenced,
        options.max_rewrite,
    )


def _pack(repository: Repository, marked: Marked, name: bytes, kind: int, size: int) -> Pack:
    number = repository.names.intern(name)
    records, live, newest = marked.marks.extent(number)
    # What frames them is not unused; how many session keys it has, `_settled` looks up.
    frame = PACK_HEADER + FOOTER + records * TRAILER_ENTRY + (ENVELOPE if repository.sealed else 0)
    unused = max(0, size - live - frame) if records else size
    return Pack(name, number, kind, size, live, newest, unused)


def _settled(repository: Repository, pack: Pack, view: View, me: str | None) -> Pack | None:
    """The pack with what is unused told exactly; None where its writer may still be at work."""
    try:
        header = repository.storage.read(pack.object, 0, _HEAD)
    except NotFound:
        return None  # Another prune has deleted it.
    session = header[32:48].hex()
    if session == me or (session in view.open and session not in view.outcomes):
        return None
    if not pack.live:
        return pack
    length = int.from_bytes(header[12:16], "little")
    usual = PACK_HEADER + (ENVELOPE if repository.sealed else 0)
    unused = max(0, pack.unused - max(0, length - usual))
    return Pack(pack.name, pack.number, pack.kind, pack.size, pack.live, pack.newest, unused)


def _worthwhile(sparse: list[Pack], limit: int) -> list[Pack]:
    """The packs to rewrite so that at most `limit` bytes stay unused, the emptiest first."""
    sparse.sort(key=lambda pack: (-pack.unused / pack.size, pack.name))
    left = sum(pack.unused for pack in sparse)
    chosen: list[Pack] = []
    for pack in sparse:
        if left <= limit:
            break
        chosen.append(pack)
        left -= pack.unused
    return chosen


def _within(rewrite: list[Pack], budget: int | None) -> list[Pack]:
    if budget is None:
        return rewrite
    chosen: list[Pack] = []
    for pack in sorted(rewrite, key=lambda pack: (-pack.unused / pack.size, pack.name)):
        if pack.live <= budget:
            chosen.append(pack)
            budget -= pack.live
    return chosen


def describe_damage(damaged: Mapping[str, str], marked: Marked) -> list[str]:
    """What keeps a prune from knowing what lives, in lines."""
    lines = [f"image set {set_id}: {reason}" for set_id, reason in sorted(damaged.items())]
    return lines + [f"image set {set_id}: {reason}" for set_id, reason in sorted(set(marked.damage))]


def batches(packs: Sequence[Pack]) -> list[list[Pack]]:
    """Packs to rewrite in turn; each batch is condemned when it is copied."""
    batches: list[list[Pack]] = []
    size = _BATCH
    for pack in packs:
        if size >= _BATCH:
            batches.append([])
            size = 0
        batches[-1].append(pack)
        size += pack.live
    return batches
