"""Imaging by used blocks, measured: against partclone on six filesystems, and maps of 4 TiB.

Invariant: both sides run in turn on the same file, as whole processes, each to a compressed copy in memory:
`imager backup` (which hashes, deduplicates and encrypts as well) and `partclone -c | lz4`. What is called
used is each tool's own word, by its map; nothing is estimated. What imager reads is counted in whole blocks
of the image, holes of the file among them, as it would read a device.

    python tests/bench/filesystems.py                  all kinds (root, loop devices, FUSE)
    python tests/bench/filesystems.py --kinds ext4,xfs --rounds 7
    python tests/bench/filesystems.py --large 1000000  and maps of 4 TiB, with so many files
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import volumes
from measure import Run, Spread, run
from report import table

HERE = Path(__file__)
MIB = 1 << 20
PARTCLONE = {kind: f"partclone.{kind}" for kind in volumes.KINDS}
WANTED_TIMES, WANTED_SHARE, WANTED_SECONDS, WANTED_PEAK = 4, 1.02, 5, 300


def child_map(image: str) -> None:
    """Print what a map comes to, in a process of its own."""
    from imager.filesystem import maps
    from imager.filesystem.used import Used

    fd = os.open(image, os.O_RDONLY)
    answer = maps.used_blocks(fd, 0, os.lseek(fd, 0, os.SEEK_END))
    assert isinstance(answer, Used), answer
    print(json.dumps({"used": answer.extents.total, "extents": len(answer.extents)}))


def imaged(image: Path, folder: Path, block: str) -> tuple[Run, int]:
    """One backup into a new repository: what it took, and the bytes of the blocks that are not left out."""
    program = [
        sys.executable,
        "-m",
        "imager",
        "--keyfile",
        str(folder / "key"),
        "--repo",
        str(folder / "repo"),
    ]
    run([*program, "init", "--encryption", "keyfile"])
    done = run([*program, "--json", "backup", "--block-size", block, str(image)])
    [told] = json.loads(done.output.splitlines()[-1])["images"]
    subprocess.run(["rm", "-r", str(folder / "repo"), str(folder / "key")], check=True)
    assert not told["parts"][0]["every_block"], told
    return done, told["bytes_used"]


def cloned(kind: str, image: Path, folder: Path) -> Run:
    """The same by partclone."""
    pipe = f"{PARTCLONE[kind]} -q -c -L /dev/null -s {image} -o - | lz4 -q -f - {folder}/out.lz4"
    return run(["bash", "-o", "pipefail", "-c", pipe])


def theirs(kind: str, image: Path) -> int:
    """Bytes that partclone calls used. Its exit code says nothing."""
    out = image.with_suffix(".domain")
    argv = [PARTCLONE[kind], "-q", "-D", "-L", "/dev/null", "-s", str(image), "-o", str(out)]
    subprocess.run(argv, capture_output=True, check=False)
    lines = (line.split() for line in out.read_text().splitlines() if line.endswith("+"))
    return sum(int(fields[1], 16) for fields in lines)


def against_partclone(kind: str, folder: Path, rounds: int, block: str) -> list[str]:
    """A row: seconds and bytes, side by side."""
    image = folder / kind
    volumes.volume(kind, image)
    ours, peers, read = list[Run](), list[Run](), 0
    for _ in range(rounds):
        done, read = imaged(image, folder, block)
        ours.append(done)
        peers.append(cloned(kind, image, folder))
    used = theirs(kind, image)
    mapped = json.loads(run([sys.executable, str(HERE), "--child-map", str(image)]).output)["used"]
    image.unlink()
    mine, other = (Spread(tuple(done.seconds for done in runs)) for runs in (ours, peers))
    work = [f"{Spread(tuple(done.cpu_seconds for done in runs)).median:.2f}" for runs in (ours, peers)]
    times, share = other.median / mine.median, read / used
    sizes = [f"{used / 1e6:.1f}", f"{mapped / used:.3f}", f"{read / 1e6:.1f}", f"{share:.3f}"]
    good = "yes" if times >= WANTED_TIMES and share <= WANTED_SHARE else "NO"
    return [kind, str(mine), str(other), f"{times:.1f}", *work, *sizes, good]


def large(count: int) -> str:
    """The maps of large filesystems: time and memory of the whole process, cold and again."""
    rows = []
    for kind in ("ext4", "xfs"):
        image = volumes.huge(kind, count)
        for state in ("cold", "again"):
            if state == "cold":
                fd = os.open(image, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
            done = run([sys.executable, str(HERE), "--child-map", str(image)])
            found = json.loads(done.output)
            peak = done.peak_bytes / MIB
            good = "yes" if done.seconds <= WANTED_SECONDS and peak <= WANTED_PEAK else "NO"
            figures = [
                f"{done.seconds:.2f}",
                f"{peak:.0f}",
                f"{found['used'] / 1e6:.0f}",
                str(found["extents"]),
            ]
            rows.append([f"{kind}, 4 TiB, {count} files", state, *figures, good])
    head = ["map", "cache", "seconds", "peak MiB", "used MB", "extents"]
    return table([*head, f"within {WANTED_SECONDS} s, {WANTED_PEAK} MiB"], rows, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kinds", default=",".join(volumes.KINDS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--block-size", default="64K", metavar="SIZE", help="of the image")
    parser.add_argument("--large", type=int, default=0, metavar="FILES", help="maps of 4 TiB as well")
    parser.add_argument("--only-large", action="store_true")
    parser.add_argument("--child-map", metavar="IMAGE", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child_map:
        return child_map(asked.child_map)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    if not asked.only_large:
        with tempfile.TemporaryDirectory(prefix="imager-bench-", dir=memory) as name:
            rows = [
                against_partclone(kind, Path(name), asked.rounds, asked.block_size)
                for kind in asked.kinds.split(",")
            ]
        head = ["", "imager, s", "partclone | lz4, s", "times as fast", "CPU s", "theirs", "they use MB"]
        head += ["our map", "read MB", "of theirs", f"{WANTED_TIMES}x, {WANTED_SHARE}"]
        print(table(head, rows, False))
    if asked.large:
        print(large(asked.large))
    return None


if __name__ == "__main__":
    main()
