"""An image read at random access over NBD: `imager map` beside `qemu-nbd` over a compressed qcow2.

    python tests/bench/export.py [--rounds N] [--dir FOLDER] [--reads N] [--markdown] [--strict]

Invariant: both serve the content of the same disk (tests/bench/disk.py), without its holes, through a Unix
socket, one at a time; the same client asks both for the same places, in the same order; rounds take turns.
What is called random reads are 4 KiB each, 32 under way on one connection. What is printed are medians.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import disk  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
from tools import Imager, Place  # noqa: E402

from tests import nbd  # noqa: E402

MIB, READ, STEP = 1 << 20, 4096, 37 << 20
TARGET_RANDOM, TARGET_MEMORY, TARGET_FIRST = 5.0, 300 * MIB, 0.3


@contextmanager
def serving(command: list[str], socket: Path, env: dict[str, str] | None = None) -> Iterator[int]:
    """A server, from the moment that it can be connected to; its process id."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env) as process:
        try:
            connected(socket, process)
            yield process.pid
        finally:
            process.terminate()
            process.wait()


def connected(socket: Path, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            nbd.Client(str(socket)).socket.close()
            return
        except OSError:
            time.sleep(0.002)
    raise SystemExit(f"the server ended with {process.returncode}")


def dense(image: Path, out: Path) -> None:
    """A disk without holes: what the bench disk holds, end to end."""
    with image.open("rb") as source, out.open("wb") as target:
        at, size = 0, image.stat().st_size
        while at < size:
            try:
                at = os.lseek(source.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(source.fileno(), at, os.SEEK_HOLE)
            while at < end:
                at += os.sendfile(target.fileno(), source.fileno(), at, min(end - at, 64 * MIB))
        target.truncate(target.tell() // STEP * STEP)


def at_random(socket: Path, count: int) -> float:
    """Reads a second, by a client of qemu's. Its steps go all over the disk."""
    argv = [
        "qemu-img",
        "bench",
        "-f",
        "raw",
        "-c",
        str(count),
        "-d",
        "32",
        "-s",
        str(READ),
        "-S",
        str(STEP + READ),
    ]
    said = measure.run([*argv, f"nbd+unix:///?socket={socket}"]).output
    seconds = re.search(r"completed in ([0-9.]+) seconds", said)
    assert seconds is not None, said
    return count / float(seconds[1])


def peak(pid: int) -> int:
    """Peak memory of a process, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def first_byte(imager: list[str], env: dict[str, str], folder: Path) -> float:
    """Seconds from the start of `imager map` to the first byte of an image of 1 TiB."""
    image, socket = folder / "tera", folder / "tera.nbd"
    with image.open("wb") as file:
        file.write(random.Random(2).randbytes(MIB))
        file.truncate(1 << 40)
    measure.run([*imager, "backup", str(image), "--name", "tera"], env)
    begun = time.perf_counter()
    with (
        serving([*imager, "map", "tera", "--socket", str(socket)], socket, {**os.environ, **env}),
        nbd.Client(str(socket)).go() as client,
    ):
        client.read(0, 1)
        return time.perf_counter() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reads", type=int, default=20_000)
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--strict", action="store_true", help="exit 1 where a target is missed")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imager-export-", dir=arguments.dir) as folder:
        return run(Path(folder), arguments)


def run(folder: Path, arguments: argparse.Namespace) -> int:
    image = folder / "disk.img"
    whole = folder / "whole.img"
    disk.cached(whole)
    dense(whole, image)
    whole.unlink()
    tool = Imager(Place(folder, image, folder / "none", folder / "none"))
    tool.prepare()
    imager, env = [*tool.base_command(), "-r", str(tool.store)], tool.env
    measure.run([*imager, "backup", str(image), "--name", "disk"], env)
    qcow2 = folder / "disk.qcow2"
    measure.run(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(image), str(qcow2)])
    socket = folder / "nbd"
    servers = {
        "imager map": ([*imager, "map", "disk", "--socket", str(socket)], {**os.environ, **env}),
        "qemu-nbd, compressed qcow2": (
            ["qemu-nbd", "-r", "-t", "-e", "8", "-f", "qcow2", "-k", str(socket), str(qcow2)],
            None,
        ),
    }
    random_reads: dict[str, list[float]] = {name: [] for name in servers}
    in_order: dict[str, list[float]] = {name: [] for name in servers}
    peaks: dict[str, int] = dict.fromkeys(servers, 0)
    for _ in range(arguments.rounds):
        for name, (command, environment) in servers.items():
            socket.unlink(missing_ok=True)
            with serving(command, socket, environment) as pid:
                random_reads[name].append(at_random(socket, arguments.reads))
                copied = measure.run(["nbdcopy", f"nbd+unix:///?socket={socket}", "null:"])
                in_order[name].append(copied.seconds)
                peaks[name] = max(peaks[name], peak(pid))
    restored = statistics.median(
        measure.run([*imager, "restore", "--no-verify", "disk", str(folder / f"out{i}")], env).seconds
        for i in range(arguments.rounds)
    )
    first = first_byte(imager, env, folder)
    ours, theirs = servers
    rows = []
    for name in servers:
        rows.append(
            [
                name,
                f"{statistics.median(random_reads[name]):.0f}",
                f"{statistics.median(in_order[name]):.2f}",
                f"{peaks[name] / MIB:.0f}",
            ]
        )
    print(
        report.table(
            ["", "random 4 KiB reads a second", "whole disk, s", "peak MiB"], rows, arguments.markdown
        )
    )
    ratio = statistics.median(random_reads[ours]) / statistics.median(random_reads[theirs])
    speed = restored / statistics.median(in_order[ours])
    print(f"\nrandom reads: {ratio:.1f}x qemu-nbd (target {TARGET_RANDOM:.0f}x)")
    print(f"in order: {speed:.0%} of the speed of a restore without read-back (target 70 %)")
    print(f"first byte of 1 TiB: {first:.2f} s (target {TARGET_FIRST} s)")
    met = ratio >= TARGET_RANDOM and speed >= 0.7 and first <= TARGET_FIRST and peaks[ours] <= TARGET_MEMORY
    return 0 if met or not arguments.strict else 1


if __name__ == "__main__":
    sys.exit(main())
