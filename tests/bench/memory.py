"""A sparse 1 TiB image that holds 100 MiB, next to the same 100 MiB as a dense image: imager alone.

Invariant: both images hold the same bytes, so the difference in time, metadata and memory is what the
empty terabyte costs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import content
import measure
import rounds
import sparse
from tools import Imager, Place

MIB = 1 << 20
TIB = 1 << 40
PIECES = 100


@dataclass
class Sparse:
    """Seconds and peak memory per job, for each image; and the metadata kept for the sparse one."""

    dense_seconds: dict[str, list[float]] = field(default_factory=dict)
    sparse_seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    metadata: int = 0
    dense_metadata: int = 0


def measured(folder: Path, repeat: int, say: Callable[[str], None]) -> Sparse:
    """Back up, verify and restore both images in turn."""
    found = Sparse()
    dense, wide = folder / "dense.img", folder / "sparse.img"
    _make(dense, MIB, PIECES * MIB)
    _make(wide, TIB // PIECES // MIB * MIB, TIB)
    for number in range(repeat + 1):
        for image, seconds in ((dense, found.dense_seconds), (wide, found.sparse_seconds)):
            place = Place(folder / "job", image, image, folder / "none.json")
            place.folder.mkdir()
            try:
                tool = Imager(place)
                tool.prepare()
                for job in ("full", "verify", "restore"):
                    rounds.settle(image)
                    done = measure.run(tool.command(job), tool.env)
                    if number:
                        seconds.setdefault(job, []).append(done.seconds)
                        say(f"  {image.stem:10} {job:8} {done.seconds:7.2f} s  {done.peak_bytes >> 20:5} MiB")
                    if image is wide:
                        found.peak[job] = max(found.peak.get(job, 0), done.peak_bytes)
                if not sparse.same_content(image, tool.target):
                    raise measure.Failed(f"imager restored {image.name} with other bytes")
                if image is wide:
                    found.metadata = metadata_bytes(tool.store)
                else:
                    found.dense_metadata = metadata_bytes(tool.store)
            finally:
                shutil.rmtree(place.folder, ignore_errors=True)
    return found


def metadata_bytes(store: Path) -> int:
    """Everything in a repository but the packs of data."""
    return sum(
        item.stat().st_size
        for item in store.rglob("*")
        if item.is_file() and not is_data(item.relative_to(store))
    )


def is_data(name: Path) -> bool:
    """Whether an object of a repository is a pack of data."""
    return name.parts[0] in ("packs", "data")


def _make(path: Path, stride: int, size: int) -> None:
    """100 MiB in pieces of 1 MiB, each at the same multiple of the stride."""
    with path.open("wb") as file:
        file.truncate(size)
        for number, chunk in enumerate(content.prose(11, PIECES * MIB)):
            file.seek(number * stride)
            file.write(chunk)
