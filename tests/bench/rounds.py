"""One round of the benchmark: a tool does all its jobs on the same image, and each result is checked.

Invariant: a figure counts only if the job's result is right: what was restored is compared byte for
byte with what was backed up, outside of the timing, and the image is the same before and after.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import measure
import mutate
import sparse
from tools import Imager, Place, Tool, summary

BLOCK = 65536
SHARE = 0.01
"""Of the data pages, changed at random."""


@dataclass
class Result:
    """What one tool did: per job the runs, and what it kept after the first backup."""

    runs: dict[str, list[measure.Run]] = field(default_factory=dict)
    stored: list[int] = field(default_factory=list)
    added: list[int] = field(default_factory=list)
    summaries: dict[str, dict[str, object]] = field(default_factory=dict)
    named_blocks: int = 0
    errors: list[str] = field(default_factory=list)

    def seconds(self, job: str) -> measure.Spread | None:
        """The wall times of a job."""
        runs = self.runs.get(job)
        return measure.Spread(tuple(run.seconds for run in runs)) if runs else None

    def peak(self, job: str) -> int:
        """The most memory that any run of a job took."""
        return max((run.peak_bytes for run in self.runs.get(job, [])), default=0)


def play(
    kind: type[Tool], place: Place, result: Result, say: Callable[[str], None], keep: bool = True
) -> None:
    """All jobs of one tool, once. With `keep` false it is a warm-up: only the full backup, not counted."""
    place.folder.mkdir()
    try:
        tool = kind(place)
        tool.prepare()
        for job in tool.jobs if keep else tool.jobs[:1]:
            done = _job(tool, job, result) if job != "changed" else _changed(tool, result)
            if keep:
                result.runs.setdefault(job, []).append(done)
                say(f"  {tool.name:10} {job:8} {done.seconds:7.2f} s  {done.peak_bytes >> 20:5} MiB")
    except (measure.Failed, OSError) as error:
        result.errors.append(str(error))
        say(f"  {kind.name}: {error}")
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)


def _job(tool: Tool, job: str, result: Result) -> measure.Run:
    settle(tool.place.partition if tool.partition_only else tool.place.image)
    held = tool.stored() if job in ("same", "changed") else 0
    done = measure.run(tool.command(job), tool.env, tool.cwd)
    if job == "full":
        result.stored.append(tool.stored())
    elif job == "restore":
        check(tool, tool.place.partition if tool.partition_only else tool.place.image)
    elif job == "changed":
        result.added.append(tool.stored() - held)
    if isinstance(tool, Imager):
        result.summaries[job] = summary(done.output)
    return done


def _changed(tool: Tool, result: Result) -> measure.Run:
    """A backup after a change; imager's is restored as well, since it believed a map."""
    pages = sparse.data_bytes(tool.place.image) // sparse.PAGE
    change = mutate.scatter(tool.place.image, int(pages * SHARE), seed=7)
    try:
        mutate.write_map(tool.place.changed_map, change)
        result.named_blocks = mutate.blocks_named(change, BLOCK)
        done = _job(tool, "changed", result)
        if isinstance(tool, Imager):
            measure.run(tool.command("restore"), tool.env, tool.cwd)
            check(tool, tool.place.image)
        return done
    finally:
        change.undo()


def check(tool: Tool, original: Path) -> None:
    """Compare what was restored with the original, then remove it."""
    same = subprocess.run(
        ["cmp", str(original), str(tool.restored)], check=False, capture_output=True, text=True
    )
    if same.returncode != 0:
        raise measure.Failed(f"{tool.name} restored other bytes: {(same.stdout + same.stderr).strip()}")
    if tool.target.is_dir():
        shutil.rmtree(tool.target)
    else:
        tool.target.unlink()


def settle(image: Path) -> None:
    """The same start for every job: earlier writes are on their storage, the image is in the page cache."""
    os.sync()
    with image.open("rb") as file:
        for start, length in sparse.data_extents(image):
            for at in range(start, start + length, sparse.CHUNK):
                os.pread(file.fileno(), min(sparse.CHUNK, start + length - at), at)
