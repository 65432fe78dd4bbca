"""What issue 2 asks for, against what was measured.

Invariant: each line of the issue's table is one or more targets here, with its number as the issue
gives it; a target that could not be measured is shown as such and never as met.
"""

from __future__ import annotations

from dataclasses import dataclass

from limits import Limits
from memory import Sparse
from rounds import BLOCK, Result

MEMORY = 256 << 20
METADATA = 256 << 10


@dataclass(frozen=True)
class Target:
    """One thing to reach. `measured` is None if it was not measured."""

    work: str
    at_least: str
    measured: float | None
    met: bool
    unit: str = "x"

    @property
    def shown(self) -> str:
        """The measured figure in words."""
        if self.measured is None:
            return "not measured"
        return f"{self.measured:.2f} {self.unit}" if self.unit != "x" else f"{self.measured:.2f}x"

    @property
    def verdict(self) -> str:
        """Met, missed or unknown."""
        return "-" if self.measured is None else "yes" if self.met else "MISSED"


FASTER = (
    ("full backup", "full", "borg", 5.0),
    ("full backup", "full", "borg-sha256", 5.0),
    ("full backup", "full", "zstd", 2.5),
    ("incremental, nothing changed, no map", "same", "borg", 10.0),
    ("incremental, nothing changed, no map", "same", "borg-sha256", 10.0),
    ("incremental, 1 % of pages changed, given map", "changed", "borg", 10.0),
    ("incremental, 1 % of pages changed, given map", "changed", "borg-sha256", 10.0),
    ("restore with read-back", "restore", "borg", 8.0),
    ("restore with read-back", "restore", "borg-sha256", 8.0),
    ("restore with read-back", "restore", "qemu-img", 3.0),
    ("restore with read-back", "restore", "zstd", 2.0),
    ("verify", "verify", "borg", 10.0),
    ("verify", "verify", "borg-sha256", 10.0),
)


def reached(results: dict[str, Result], limits: Limits, sparse: Sparse | None) -> list[Target]:
    """Every target of the issue, in its order."""
    targets = [_faster(results, *line) for line in FASTER]
    targets.insert(3, _share_of_limit(results, limits))
    targets.insert(8, _blocks_read(results))
    targets.append(_stored(results))
    targets.append(_memory(results, sparse))
    targets.extend(_sparse(sparse))
    return targets


def _faster(results: dict[str, Result], work: str, job: str, peer: str, factor: float) -> Target:
    ours = results["imager"].seconds(job) if "imager" in results else None
    theirs = results[peer].seconds(job) if peer in results else None
    ratio = theirs.median / ours.median if ours and theirs else None
    return Target(work, f"{factor:g}x {peer}", ratio, ratio is not None and ratio >= factor)


def _share_of_limit(results: dict[str, Result], limits: Limits) -> Target:
    ours = results["imager"].seconds("full") if "imager" in results else None
    share = None
    if ours and limits.backup_whole:
        share = 100 * sorted(limits.backup_whole)[len(limits.backup_whole) // 2] / ours.median
    return Target("full backup", "75 % of the limit", share, share is not None and share >= 75, "%")


def _blocks_read(results: dict[str, Result]) -> Target:
    ours = results.get("imager")
    read = ours.summaries.get("changed", {}).get("blocks_read") if ours else None
    ratio = read / ours.named_blocks if ours and isinstance(read, int) and ours.named_blocks else None
    met = ratio is not None and ratio <= 1.1
    return Target(f"blocks of {BLOCK >> 10} KiB read, given map", "at most 1.1x named", ratio, met)


def _stored(results: dict[str, Result]) -> Target:
    ours, theirs = results.get("imager"), results.get("borg")
    ratio = ours.stored[-1] / theirs.stored[-1] if ours and theirs and ours.stored and theirs.stored else None
    return Target("bytes stored, full", "at most 1.03x borg", ratio, ratio is not None and ratio <= 1.03)


def _memory(results: dict[str, Result], sparse: Sparse | None) -> Target:
    ours = results.get("imager")
    peaks = [ours.peak(job) for job in ours.runs] if ours else []
    peaks += list(sparse.peak.values()) if sparse else []
    peak = max(peaks) if peaks else None
    shown = peak / (1 << 20) if peak is not None else None
    return Target(
        "peak memory, all jobs, sparse 1 TiB too",
        "at most 256 MiB",
        shown,
        (peak or 1 << 40) <= MEMORY,
        "MiB",
    )


def _sparse(sparse: Sparse | None) -> list[Target]:
    work = "sparse 1 TiB holding 100 MiB, full backup"
    ratio = metadata = None
    if sparse and sparse.sparse_seconds.get("full"):
        wide, dense = sorted(sparse.sparse_seconds["full"]), sorted(sparse.dense_seconds["full"])
        ratio = wide[len(wide) // 2] / dense[len(dense) // 2]
        metadata = sparse.metadata / 1024
    small = metadata is not None and metadata * 1024 <= METADATA
    return [
        Target(work, "at most 1.5x dense", ratio, ratio is not None and ratio <= 1.5),
        Target(f"{work}: metadata", "at most 256 KiB", metadata, small, "KiB"),
    ]
