"""Imaging by used blocks, measured: against partclone on the benchmark's ext4, and maps of 4 TiB.

Invariant: both sides run in the same minute on the same file, as whole processes, each to a compressed
copy in memory; what is read is counted from the maps, not estimated.

    python tests/bench/filesystems.py                  the ext4 partition of the benchmark's disk
    python tests/bench/filesystems.py --disk FILE      of that disk, made earlier by disk.py
    python tests/bench/filesystems.py --large 1000000  and maps of 4 TiB, with so many files (root)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import disk as bench_disk
from measure import Spread, run
from report import table

HERE = Path(__file__)
sys.path.insert(0, str(HERE.parents[2]))
TIB = 1 << 40
MIB = 1 << 20
MAKE = {"ext4": ["mkfs.ext4", "-qF"], "xfs": ["mkfs.xfs", "-qf"]}


def child_map(image: str) -> None:
    """Print what a map comes to, in a process of its own."""
    from imager.filesystem import maps
    from imager.filesystem.used import Used

    fd = os.open(image, os.O_RDONLY)
    answer = maps.used_blocks(fd, 0, os.lseek(fd, 0, os.SEEK_END))
    assert isinstance(answer, Used), answer
    print(json.dumps({"used": answer.extents.total, "extents": len(answer.extents)}))


def child_image(image: str, repository: str) -> None:
    """Image the used blocks into a repository that exists: map, read, hash, compress, encrypt, store."""
    from imager.storage.open import open_storage

    from imager import _native
    from imager.engine.imaging import Imaging, Settings
    from imager.engine.source import open_source, plan_sources
    from imager.events import Silent
    from imager.filesystem import maps
    from imager.filesystem.used import Used
    from imager.repository.credentials import Credentials
    from imager.repository.repository import Repository
    from imager.repository.session import Session

    [source] = plan_sources([image], "bench")
    opened = open_source(source)
    answer = maps.used_blocks(opened.fd, 0, opened.size)
    assert isinstance(answer, Used), answer
    block = 65536
    settings = Settings(block, 1, 1, 0, False)
    opening = Repository.open(
        open_storage(repository), Credentials(keyfile=f"{repository}.key"), writing=True
    )
    with Session.begin(opening, host="bench") as session:
        known = _native.Known(opening.names)
        imaging = Imaging(session, known, settings, None, Silent(), opened.size)
        imaged = imaging.read(opened, answer.extents.blocks(block), _native.ZERO)
        imaging.write_map()
    print(json.dumps({"used": answer.extents.total, "read": imaged.figures.bytes_read}))


def theirs(image: Path) -> int:
    """Bytes that partclone calls used."""
    out = image.with_suffix(".domain")
    argv = ["partclone.ext4", "-q", "-D", "-L", "/dev/null", "-s", str(image), "-o", str(out)]
    subprocess.run(argv, capture_output=True, check=False)
    lines = (line.split() for line in out.read_text().splitlines() if line.endswith("+"))
    return sum(int(fields[1], 16) for fields in lines)


def partition(source: Path, folder: Path) -> Path:
    """The disk's ext4 partition as a file of its own."""
    target = folder / "ext4"
    start, size = bench_disk.ROOT
    argv = ["dd", f"if={source}", f"of={target}", "bs=1M", f"skip={start // MIB}", f"count={size // MIB}"]
    subprocess.run([*argv, "conv=sparse", "status=none"], check=True)
    os.truncate(target, size)
    return target


def against_partclone(source: Path, folder: Path, rounds: int) -> str:
    """Seconds and bytes, side by side."""
    image = partition(source, folder)
    ours, peers, figures = [], [], {}
    for number in range(rounds):
        repository = folder / f"repo-{number}"
        key = ["--keyfile", f"{repository}.key"]
        run([sys.executable, "-m", "imager", *key, "init", str(repository), "--encryption", "keyfile"])
        done = run([sys.executable, str(HERE), "--child-image", str(image), str(repository)])
        figures = json.loads(done.output)
        ours.append(done.seconds)
        pipe = f"partclone.ext4 -q -c -L /dev/null -s {image} -o - | lz4 -q -f - {folder}/out.lz4"
        peers.append(run(["bash", "-o", "pipefail", "-c", pipe]).seconds)
        subprocess.run(["rm", "-r", str(repository)], check=True)
    used = theirs(image)
    mine, other = Spread(tuple(ours)), Spread(tuple(peers))
    read, named = figures["read"], figures["used"]
    rows = [
        ["imager", str(mine), f"{named / 1e6:.1f}", f"{named / used:.4f}", f"{read / 1e6:.1f}"],
        ["partclone.ext4 -c | lz4", str(other), f"{used / 1e6:.1f}", "1", f"{used / 1e6:.1f}"],
    ]
    head = ["ext4 partition", "seconds", "used MB", "of theirs", "read MB (64 KiB blocks)"]
    return table(head, rows, False) + f"\nimager is {other.median / mine.median:.1f} times as fast"


def populate(kind: str, image: Path, count: int) -> None:
    """A filesystem of 4 TiB with so many small files."""
    from imager.device.loop import attach
    from imager.lab.mounting import mounted

    with open(image, "wb") as file:
        file.truncate(4 * TIB)
    subprocess.run([*MAKE[kind], str(image)], check=True)
    with attach(image) as device, mounted(device.path, kind, image.parent / "mnt") as root:
        for number in range(count):
            if number % 1000 == 0:
                folder = root / f"{number // 100_000}" / f"{number // 1000}"
                folder.mkdir(parents=True)
            fd = os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT)
            os.write(fd, b"x" * (number % 3000))
            os.close(fd)


def large(folder: Path, count: int) -> str:
    """The maps of large filesystems: time and memory."""
    rows = []
    for kind in MAKE:
        image = folder / f"large-{kind}"
        populate(kind, image, count)
        done = run([sys.executable, str(HERE), "--child-map", str(image)])
        found = json.loads(done.output)
        figures = [f"{done.seconds:.2f}", f"{done.peak_bytes / MIB:.0f}", f"{found['used'] / 1e6:.0f}"]
        rows.append([f"{kind}, 4 TiB, {count} files", *figures, str(found["extents"])])
        image.unlink()
    return table(["map", "seconds", "peak MiB", "used MB", "extents"], rows, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--disk", type=Path, help="a disk made by disk.py; without it, one is made")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, default=0, metavar="FILES")
    parser.add_argument("--only-large", action="store_true")
    parser.add_argument("--folder", help="where large sparse files may lie (default: the temporary folder)")
    parser.add_argument("--child-map", metavar="IMAGE", help=argparse.SUPPRESS)
    parser.add_argument("--child-image", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child_map:
        return child_map(asked.child_map)
    if asked.child_image:
        return child_image(*asked.child_image)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    if not asked.only_large:
        with tempfile.TemporaryDirectory(prefix="imager-bench-", dir=memory) as name:
            folder = Path(name)
            source = asked.disk
            if source is None:
                source = folder / "disk.img"
                subprocess.run([sys.executable, str(HERE.with_name("disk.py")), str(source)], check=True)
            print(against_partclone(source, folder, asked.rounds))
    if asked.large:
        with tempfile.TemporaryDirectory(prefix="imager-bench-", dir=asked.folder) as name:
            print(large(Path(name), asked.large))
    return None


if __name__ == "__main__":
    main()
