"""How the cost of an incremental grows with the image: it should not, for the same change.

Invariant: images of each size are a quarter full of the same kind of data, spread evenly, and get the
same change (64 MiB in pieces, scattered over the data), told by a map; only the size differs. The
counts (bytes stored, objects written, blocks read) may be at most 1.1 times those of the smallest image.

    python tests/bench/growth.py [--rounds N] [--piece BYTES] [--markdown] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import content
import measure
import mutate
import report
import rounds
from tools import Imager, Place, summary

MIB = 1 << 20
GIB = 1 << 30
CHANGE = 64 * MIB
STRIDE = 4
"""One MiB in so many holds data."""
ALLOWED = 1.1


@dataclass
class Cost:
    """What the incremental of one image took."""

    gib: int
    seconds: list[float] = field(default_factory=list)
    stored: int = 0
    objects: int = 0
    blocks_read: int | None = None
    named_blocks: int = 0

    @property
    def time(self) -> measure.Spread:
        """The wall times."""
        return measure.Spread(tuple(self.seconds))


def make(path: Path, gib: int) -> None:
    """An image that is a quarter full, evenly."""
    with path.open("wb") as file:
        file.truncate(gib * GIB)
        for number, chunk in enumerate(content.noisy_prose(gib, gib * GIB // STRIDE)):
            file.seek(number * STRIDE * MIB)
            file.write(chunk)


def incremental(folder: Path, image: Path, cost: Cost, piece: int) -> None:
    """A full backup, the change, and the incremental that is measured; then it is restored and compared."""
    place = Place(folder / "job", image, image, folder / "changed.json")
    place.folder.mkdir()
    try:
        tool = Imager(place)
        tool.prepare()
        measure.run(tool.command("full"), tool.env)
        bytes_before, objects_before = measure.tree_bytes(tool.store), _objects(tool.store)
        change = mutate.scatter(image, CHANGE // piece, seed=5, piece=piece)
        try:
            mutate.write_map(place.changed_map, change)
            cost.named_blocks = mutate.blocks_named(change, rounds.BLOCK)
            rounds.settle(image)
            done = measure.run(tool.command("changed"), tool.env)
            cost.seconds.append(done.seconds)
            cost.stored = measure.tree_bytes(tool.store) - bytes_before
            cost.objects = _objects(tool.store) - objects_before
            said = summary(done.output)
            cost.blocks_read = _number(said, "blocks_read")
            measure.run(tool.command("restore"), tool.env)
            rounds.check(tool, image)
        finally:
            change.undo()
    finally:
        shutil.rmtree(place.folder, ignore_errors=True)


def _objects(store: Path) -> int:
    return sum(1 for item in store.rglob("*") if item.is_file())


def _number(said: dict[str, object], name: str) -> int | None:
    value = said.get(name)
    return value if isinstance(value, int) else None


def rows(costs: list[Cost]) -> tuple[list[list[str]], list[str]]:
    """The table's rows, and what grew that should not."""
    first = costs[0]
    grew: list[str] = []
    shown: list[list[str]] = []
    for cost in costs:
        cells = [f"{cost.gib} GiB", str(cost.time), f"{cost.time.median / first.time.median:.2f}x"]
        for name in ("stored", "objects", "blocks_read"):
            value, smallest = getattr(cost, name), getattr(first, name)
            if value is None or not smallest:
                cells += ["-" if value is None else str(value), ""]
                continue
            ratio = value / smallest
            cells += [str(value), f"{ratio:.2f}x"]
            if ratio > ALLOWED:
                grew.append(f"{name} at {cost.gib} GiB: {ratio:.2f}x of that at {first.gib} GiB")
        shown.append(cells)
    return shown, grew


def main() -> int:
    """Measure, print, and fail if a count grows."""
    parser = argparse.ArgumentParser(description="How an incremental's cost grows with the image.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sizes", default="1,4,16", help="in GiB")
    parser.add_argument(
        "--piece", type=int, default=1 << 20, help="the change comes in pieces of so many bytes"
    )
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    costs = [Cost(int(size)) for size in options.sizes.split(",")]
    folder = Path(tempfile.mkdtemp(prefix="imager-growth-", dir=options.dir))
    try:
        for cost in costs:
            make(folder / f"{cost.gib}.img", cost.gib)
        for number in range(options.rounds):
            for cost in costs:
                incremental(folder, folder / f"{cost.gib}.img", cost, options.piece)
                print(
                    f"round {number + 1}: {cost.gib} GiB {cost.seconds[-1]:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    except (measure.Failed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    machine = report.machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"incremental with a given map, {CHANGE // MIB} MiB changed in pieces of {options.piece} bytes\n")
    shown, grew = rows(costs)
    header = [
        "image",
        "seconds",
        "",
        "bytes stored",
        "",
        "objects",
        "",
        "blocks read",
        "",
    ]
    print(report.table(header, shown, options.markdown))
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "costs": [asdict(c) for c in costs]}, indent=1)
        )
    for line in grew:
        print(f"grew: {line}", file=sys.stderr)
    return 1 if grew else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        os._exit(130)
