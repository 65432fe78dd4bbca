"""Prune after half of 50 image sets were forgotten: imager beside restic, in one run.

    python tests/bench/prune.py [--sets 50] [--size 128] [--change 16] [--folder /dev/shm]

The same series of images goes into both: random data, of which every set changes `--change` runs of
1 MiB at random places of its first quarter, as databases and logs do. Every other set is forgotten. Both
prune to 10 % unused. Printed are seconds of the whole command, what each stores before and after,
and, for imager, the bytes that it copied beside what the threshold demands: the live bytes of the
packs that have to go.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB = 1 << 20


def processor() -> float:
    """Seconds of processor time of all commands so far."""
    used = os.times()
    return used.children_user + used.children_system


def run(argv: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """(seconds, standard output) of a command that has to succeed."""
    begun = time.monotonic()
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}")
    return time.monotonic() - begun, done.stdout


def stored(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def first(image: Path, size: int) -> None:
    """The first image of the series."""
    with image.open("wb") as file:
        for _ in range(size):
            file.write(os.urandom(MIB))


def alter(image: Path, size: int, change: int, seed: int) -> None:
    """The next image of the series."""
    chance = random.Random(seed)
    with image.open("r+b") as file:
        for _ in range(change):
            file.seek(chance.randrange(size // 4) * MIB)
            file.write(chance.randbytes(MIB))


def imager_figures(store: Path, environment: dict[str, str], ids: list[str]) -> dict[str, object]:
    command = [sys.executable, "-m", "imager", "--json", "-r", str(store)]
    run([*command, "forget", *ids], environment)
    before = stored(store)
    _, said = run([*command, "prune", "--dry-run"], environment)
    plan = json.loads(said.splitlines()[-1])
    used = processor()
    seconds, said = run([*command, "prune"], environment)
    used = processor() - used
    summary = json.loads(said.splitlines()[-1])
    run([*command, "check", "--read-data"], environment)
    moved = summary["bytes_read"] + summary["bytes_written"]
    return {
        "seconds": seconds,
        "processor": used,
        "before": before,
        "after": stored(store),
        "demanded": plan["copied"],
        "read": summary["bytes_read"],
        "written": summary["bytes_written"],
        "pages": summary["bytes_of_pages"],
        "ratio": (moved + summary["bytes_of_pages"]) / (2 * plan["copied"]) if plan["copied"] else 0.0,
    }


def restic_figures(store: Path, environment: dict[str, str], ids: list[str]) -> dict[str, object]:
    run(["restic", "-q", "forget", *ids], environment)
    before = stored(store)
    used = processor()
    seconds, _ = run(["restic", "-q", "prune", "--max-unused", "10%"], environment)
    used = processor() - used
    run(["restic", "-q", "check"], environment)
    return {"seconds": seconds, "processor": used, "before": before, "after": stored(store)}


def measure(folder: Path, sets: int, size: int, change: int) -> dict[str, dict[str, object]]:
    """Build both, forget every other set, prune both."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("IMAGER_", "RESTIC_"))}
    environment |= {
        "IMAGER_STATE_DIR": str(folder / "state"),
        "IMAGER_PASSPHRASE": "correct horse",
        "RESTIC_REPOSITORY": str(folder / "restic"),
        "RESTIC_PASSWORD": "correct horse",
        "RESTIC_CACHE_DIR": str(folder / "cache"),
    }
    image = folder / "disk.img"
    mine = [sys.executable, "-m", "imager", "--json", "-r", str(folder / "imager")]
    run([*mine, "init", str(folder / "imager")], environment)
    with_restic = shutil.which("restic") is not None
    if with_restic:
        run(["restic", "-q", "init"], environment)
    ids: list[str] = []
    others: list[str] = []
    first(image, size)
    for seed in range(sets):
        if seed:
            alter(image, size, change, seed)
        _, said = run([*mine, "backup", str(image), "--name", "disk"], environment)
        ids.append(json.loads(said.splitlines()[-1])["set"])
        if with_restic:
            _, said = run(["restic", "backup", "--json", "--force", str(image)], environment)
            others.append(json.loads(said.splitlines()[-1])["snapshot_id"])
    found = {"imager": imager_figures(folder / "imager", environment, ids[::2])}
    if with_restic:
        found["restic"] = restic_figures(folder / "restic", environment, others[::2])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=50)
    parser.add_argument("--size", type=int, default=128, help="of the image, MiB")
    parser.add_argument("--change", type=int, default=16, help="MiB that change from set to set")
    parser.add_argument("--folder", default="/dev/shm" if os.access("/dev/shm", os.W_OK) else None)
    wanted = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=wanted.folder, prefix="imager-bench-"))
    try:
        found = measure(folder, wanted.sets, wanted.size, wanted.change)
    finally:
        shutil.rmtree(folder)
    for name, figures in found.items():
        sizes = f"{figures['before'] / MIB:.0f} MiB -> {figures['after'] / MIB:.0f} MiB"  # type: ignore[operator]
        spent = f"{figures['seconds']:.2f} s ({figures['processor']:.2f} s of processor time)"
        print(f"{name:8} prune {spent}   {sizes}")
    mine = found["imager"]
    print(
        f"imager   threshold demands {mine['demanded'] / MIB:.1f} MiB copied; "  # type: ignore[operator]
        f"read {mine['read'] / MIB:.1f}, written {mine['written'] / MIB:.1f}, "  # type: ignore[operator]
        f"map pages {mine['pages'] / MIB:.2f} MiB: {mine['ratio']:.3f} times"  # type: ignore[operator]
    )
    if "restic" in found:
        print(f"restic takes {found['restic']['seconds'] / mine['seconds']:.1f} times as long")  # type: ignore[operator]


if __name__ == "__main__":
    main()
