"""imager against its peers and against the machine's limits, on one disk, in turn, in one run.

Invariant: tools take turns in every round on the same image in the same storage, a warm-up comes first,
and the exit code is 0 only if every job of every tool worked and gave the right bytes.

    python tests/bench/peers.py [--rounds N] [--only imager,borg] [--markdown] [--json FILE] [--strict]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import disk
import limits as limit_program
import memory
import report
import sparse
import targets
from limits import Limits
from measure import Failed
from peer_tools import TOOLS
from rounds import Result, play
from tools import Imager, Place, Tool


def say(line: str) -> None:
    """Progress: standard error, so that standard output is the tables alone."""
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure imager and its peers on the same disk.")
    names = ",".join(tool.name for tool in TOOLS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=names, help=f"which tools, by name (default: {names})")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"), help="the storage to measure in")
    parser.add_argument(
        "--unlock", choices=("keyfile", "passphrase"), default=Imager.unlock, help="imager's key"
    )
    parser.add_argument("--no-sparse", action="store_true", help="leave out the sparse 1 TiB image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a target is missed")
    return parser.parse_args()


def chosen(names: list[str]) -> list[type[Tool]]:
    """The tools to run; those that are not installed are named and left out."""
    wanted = [tool for tool in TOOLS if tool.name in names]
    for tool in wanted:
        if not tool.installed():
            say(f"left out, not installed: {tool.name}")
    return [tool for tool in wanted if tool.installed()]


def touch_memory(folder: Path, size: int) -> None:
    """Use the storage's memory once: on a virtual machine a page's first use costs far more than later."""
    filler = folder / "filler"
    with filler.open("wb") as file:
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    filler.unlink()


def measured(
    tools: list[type[Tool]], folder: Path, options: argparse.Namespace
) -> tuple[dict[str, Result], Limits]:
    """A warm-up, then all rounds."""
    image, partition = folder / "disk.img", folder / "root.img"
    say("building the disk (a built one is cached)")
    built = disk.cached(image)
    sparse.copy(image, partition, disk.ROOT)
    say(f"disk: {disk.SIZE >> 30} GiB, {built.data_bytes >> 20} MiB of data; {built.tree}")
    touch_memory(folder, 6 << 30)
    results = {tool.name: Result() for tool in tools}
    limits = Limits()
    program = limit_program.compile_program(folder)
    for number in range(options.rounds + 1):
        say(f"round {number} of {options.rounds}" if number else "warm-up")
        if program:
            limit_program.play(program, image, limits, say, keep=number > 0)
        for tool in tools:
            place = Place(folder / tool.name, image, partition, folder / "changed.json")
            play(tool, place, results[tool.name], say, keep=number > 0)
    image.unlink()
    partition.unlink()
    return results, limits


def main() -> int:
    """Measure, print, and say whether all of it worked."""
    options = arguments()
    Imager.unlock = options.unlock
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    tools = chosen(options.only.split(","))
    folder = Path(tempfile.mkdtemp(prefix="imager-bench-", dir=options.dir))
    wide = None
    errors: list[str] = []
    try:
        results, limits = measured(tools, folder, options)
        if "imager" in results and not options.no_sparse:
            say("sparse 1 TiB image")
            try:
                wide = memory.measured(folder, options.rounds, say)
            except (Failed, OSError) as error:
                errors.append(str(error))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    errors += [error for result in results.values() for error in result.errors]
    reached = targets.reached(results, limits, wide)
    machine = report.machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), end="\n\n")
    for name, said in report.versions(list(results)).items():
        print(f"- {name}: {said}" if options.markdown else f"{name}: {said}")
    print("\n" + report.jobs(results, options.markdown), end="\n\n")
    print("\n".join(report.limit_lines(limits)), end="\n\n")
    print(report.target_table(reached, options.markdown), end="\n\n")
    print(report.peaks(results, wide, options.markdown))
    if options.json:
        figures = {
            "results": {name: asdict(result) for name, result in results.items()},
            "limits": asdict(limits),
        }
        more = {"sparse": asdict(wide) if wide else None, "targets": [asdict(target) for target in reached]}
        options.json.write_text(json.dumps({"machine": machine, **figures, **more}, indent=1))
    for text in errors:
        say(f"error: {text}")
    missed = [target for target in reached if not target.met]
    return 1 if errors or (options.strict and missed) else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)
