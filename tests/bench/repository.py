"""Memory and look-ups against repositories of 1, 10 and 100 million blocks; beside restic and borg.

Invariant: the index entries are synthetic (tests/bench/synthetic.py: real segments and the frames of
packs, for blocks that nobody stored), everything measured is the command as people run it, and peak
memory is the kernel's own figure for the whole process. What is backed up is real: a file of 1.25 GiB
in blocks of 4 KiB, more new blocks than are ever held in memory, restored and compared.

    python tests/bench/repository.py [--entries 1e6,1e7,1e8] [--peer-chunks 1e6] [--dir FOLDER] [--strict]

A hundred million entries take some five minutes and about 10 GB below --dir. No image set refers to the
synthetic packs: prune, which runs last, finds nearly all of them garbage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import content
import measure
import report
from peer_tools import Borg, Restic
from tools import Imager, Place, Tool

MIB = 1 << 20
LIMIT = 300 * MIB
"""Of backup and restore, at any size."""
BOUND = ("backup, all new", "backup, nothing changed", "backup, all known", "restore")
SOURCE = 1280 * MIB
CHUNK = 1024
"""Bytes of a chunk that peers store: so small that a million of them are a gigabyte."""
HERE = Path(__file__).parent


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Scale:
    """What was found with so many entries. `peak` in bytes, `seconds` of whole processes, by job."""

    entries: int
    peak: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    lookups: dict[str, float] = field(default_factory=dict)
    rewritten: int = 0
    skipped: list[str] = field(default_factory=list)

    def run(self, job: str, command: list[str], env: dict[str, str]) -> str:
        """Run a job to its end and keep what it cost; its output."""
        done = measure.run(command, env)
        self.peak[job], self.seconds[job] = done.peak_bytes, done.seconds
        say(f"  {job:24} {done.seconds:7.1f} s  {done.peak_bytes >> 20:5} MiB")
        return done.output


def at_scale(entries: int, folder: Path) -> Scale:
    """All jobs of imager against a repository of so many blocks."""
    found = Scale(entries)
    image, sample = folder / "image", folder / "sample"
    place = Place(folder / "imager", image, image, folder / "none.json")
    place.folder.mkdir()
    try:
        tool = Imager(place)
        tool.prepare()
        key = tool.env["IMAGER_KEYFILE"]
        made = measure.run(
            [sys.executable, str(HERE / "synthetic.py"), str(tool.store), key, str(entries), str(sample)],
            tool.env,
        )
        told = json.loads(made.output)
        found.rewritten = told["rewritten"]
        size = measure.tree_bytes(tool.store / "index")
        say(f"  {'made in':24} {told['seconds']:7.1f} s  {size >> 20:5} MiB of index")
        looked = measure.run(
            [sys.executable, str(HERE / "lookups.py"), str(tool.store), key, str(sample)], tool.env
        )
        found.lookups = json.loads(looked.output)
        found.peak["look-ups"], found.seconds["look-ups"] = looked.peak_bytes, looked.seconds
        start = [*Imager.base_command(), "--json", "-r", str(tool.store)]
        backup = [*start, "backup", str(image), "--name", "disk"]
        found.run("backup, all new", [*backup, "--block-size", "4KiB", "--compression", "none"], tool.env)
        found.run("backup, nothing changed", backup, tool.env)
        other = [*start, "backup", str(image), "--name", "other", "--block-size", "4KiB"]
        found.run("backup, all known", other, tool.env)
        found.run("restore", [*start, "restore", "other", str(tool.target)], tool.env)
        measure.run(["cmp", str(image), str(tool.target)])
        tool.target.unlink()
        found.run("check", [*start, "check"], tool.env)
        if knows("prune"):
            found.run("prune", [*start, "prune"], tool.env)
        else:
            found.skipped.append("prune: this imager has no such verb")
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)
    return found


def knows(verb: str) -> bool:
    """Whether imager has a verb."""
    try:
        measure.run([*Imager.base_command(), verb, "--help"])
    except measure.Failed:
        return False
    return True


def peer(kind: type[Tool], chunks: int, folder: Path, scatter: Callable[[Path], None]) -> Scale:
    """A backup of so many new chunks, one of the same again, and a check of the structure."""
    found = Scale(chunks)
    source = folder / "source"
    place = Place(folder / kind.name, source, source, folder / "none.json")
    place.folder.mkdir()
    try:
        scatter(source)
        tool = kind(place)
        tool.prepare()
        for job in ("full", "same"):
            found.run(f"{kind.name} {job}", small_chunks(tool, job), tool.env)
        check = {"borg": ["borg", "check", str(tool.store)], "restic": ["restic", "-q", "check"]}[kind.name]
        found.run(f"{kind.name} check", check, tool.env)
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)
        shutil.rmtree(source, ignore_errors=True)
        source.unlink(missing_ok=True)
    return found


def small_chunks(tool: Tool, job: str) -> list[str]:
    """The tool's command for a backup, with chunks of `CHUNK` bytes where it can be told so."""
    command = tool.command(job)
    if tool.name == "borg":
        command[command.index("fixed,65536")] = f"fixed,{CHUNK}"
        command[command.index("lz4")] = "none"
    return command


def one_file(chunks: int) -> Callable[[Path], None]:
    """What borg gets: a file that it cuts into chunks of a fixed size."""

    def make(path: Path) -> None:
        with path.open("wb") as file:
            for piece in content.noise(5, chunks * CHUNK):
                file.write(piece)

    return make


def many_files(chunks: int) -> Callable[[Path], None]:
    """What restic gets, whose chunks have half a megabyte at least: a file for each chunk."""

    def make(path: Path) -> None:
        path.mkdir()
        number = 0
        for piece in content.noise(5, chunks * CHUNK):
            for at in range(0, len(piece), CHUNK):
                if number % 1000 == 0:
                    (path / f"{number // 1000}").mkdir()
                (path / f"{number // 1000}" / str(number)).write_bytes(piece[at : at + CHUNK])
                number += 1

    return make


def tables(scales: list[Scale], peers: list[Scale], markdown: bool) -> str:
    """What is printed."""
    jobs = list(dict.fromkeys(job for scale in scales for job in scale.peak))
    header = ["imager, peak MiB (seconds)", *(f"{scale.entries / 1e6:g} M entries" for scale in scales)]
    rows = [
        [job, *(f"{s.peak[job] >> 20} ({s.seconds[job]:.1f})" if job in s.peak else "-" for s in scales)]
        for job in jobs
    ]
    parts = [report.table(header, rows, markdown)] if scales else []
    shown = {
        "segments": "segments",
        "index MB": "bytes",
        "loading, ms": "loading",
        "listing the packs, ms": "listing",
        "hits a second": "hits",
        "misses a second": "misses",
        "hits a second, not in the page cache": "cold_hits",
        "misses a second, not in the page cache": "cold_misses",
    }
    factor = {"bytes": 1e-6, "loading": 1e3, "listing": 1e3}
    rows = [
        [label, *(f"{s.lookups[key] * factor.get(key, 1):,.0f}" for s in scales)]
        for label, key in shown.items()
    ]
    rows.append(
        [
            "bytes rewritten for each byte of index",
            *(f"{s.rewritten / s.lookups['bytes']:.2f}" for s in scales),
        ]
    )
    if scales:
        parts.append(report.table(["look-ups, one thread", *header[1:]], rows, markdown))
    if peers:
        rows = [
            [job, f"{one.entries / 1e6:g} M", f"{one.peak[job] >> 20} ({one.seconds[job]:.1f})"]
            for one in peers
            for job in one.peak
        ]
        parts.append(report.table(["peers", "chunks", "peak MiB (seconds)"], rows, markdown))
    return "\n\n".join(parts)


def main() -> int:
    """Measure, print, and say whether memory stayed within its bound."""
    parser = argparse.ArgumentParser(description="Memory and look-ups of repositories of many blocks.")
    parser.add_argument("--entries", default="1e6,1e7,1e8", help="sizes of the index")
    parser.add_argument(
        "--peer-chunks", type=float, default=1e6, help="for restic and borg; 0: leave them out"
    )
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a bound is broken")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="imager-repository-", dir=options.dir))
    scales: list[Scale] = []
    peers: list[Scale] = []
    errors: list[str] = []
    try:
        say("making the source")
        with (folder / "image").open("wb") as file:
            for piece in content.noise(1, SOURCE):
                file.write(piece)
        for text in filter(None, options.entries.split(",")):
            say(f"{float(text) / 1e6:g} million entries")
            try:
                scales.append(at_scale(int(float(text)), folder))
            except measure.Failed as error:
                errors.append(str(error))
        (folder / "image").unlink()
        chunks = int(options.peer_chunks)
        sources: dict[type[Tool], Callable[[Path], None]] = {
            Borg: one_file(chunks),
            Restic: many_files(chunks),
        }
        for kind, make in sources.items() if chunks else ():
            if not kind.installed():
                say(f"left out, not installed: {kind.name}")
                continue
            say(f"{kind.name}: {chunks / 1e6:g} million chunks of {CHUNK} bytes")
            try:
                peers.append(peer(kind, chunks, folder, make))
            except measure.Failed as error:
                errors.append(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    machine = report.machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), end="\n\n")
    print(tables(scales, peers, options.markdown))
    for scale in scales:
        for text in scale.skipped:
            print(f"skipped at {scale.entries / 1e6:g} M: {text}")
    broken = [
        f"{job} with {scale.entries / 1e6:g} M entries took {scale.peak[job] >> 20} MiB"
        for scale in scales
        for job in BOUND
        if scale.peak[job] > LIMIT
    ]
    if scales and not broken:
        print(f"\nbackup and restore stayed within {LIMIT >> 20} MiB")
    for text in [*broken, *errors]:
        say(f"error: {text}")
    if options.json:
        figures = {"scales": [asdict(scale) for scale in scales], "peers": [asdict(one) for one in peers]}
        options.json.write_text(json.dumps({"machine": machine, **figures}, indent=1))
    return 1 if errors or (options.strict and broken) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)
