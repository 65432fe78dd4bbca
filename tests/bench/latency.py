"""How much of its speed a repository in an object store keeps when each call takes 50 ms longer.

    python tests/bench/latency.py [--size MIB] [--rounds N] [--folder FOLDER]

Invariant: server, repository and image are the same for all; each figure is that of a process of its
own, and the two distances take turns. What is printed is what the processes told, and the kernel's own
figure of their peak memory. Exit 1 where the target of the project is missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import measure  # noqa: E402

from imager.engine import backup, restore  # noqa: E402
from imager.engine.backup import BackupOptions  # noqa: E402
from imager.engine.restore import RestoreOptions  # noqa: E402
from imager.engine.verify import verify  # noqa: E402
from imager.events import Silent  # noqa: E402
from imager.repository.credentials import Credentials  # noqa: E402
from imager.repository.repository import Repository  # noqa: E402
from imager.storage.location import open_storage  # noqa: E402
from imager.storage.rehearsal import Recording, Slow  # noqa: E402

LATENCY = 0.05
TARGET = 0.70
MEMORY = 300 << 20
MIB = 1 << 20


def child(job: str, url: str, folder: Path, seconds: float) -> None:
    """One job in this process; prints its seconds and calls."""
    recording = Recording(Slow(open_storage(url), seconds) if seconds else open_storage(url))
    keyfile = Credentials(keyfile=str(folder / "key"), interactive=False)
    if job == "init":
        Repository.init(open_storage(url), keyfile, encryption="keyfile").close()
        return
    with Repository.open(recording, keyfile, writing=job == "backup") as repository:
        begun = time.perf_counter()
        if job == "backup":
            options = BackupOptions(name="d", compression="none")
            plan = backup.plan(repository, [str(folder / "disk.img")], options, Silent())
            backup.execute(repository, plan, Silent())
        elif job == "verify":
            assert verify(repository, "d", Silent()).ok
        else:
            target = folder / "restored.img"
            # Read back it would be from the page cache, at any distance: that is left out.
            wanted = restore.plan(repository, "d", str(target), RestoreOptions(verify=False), Silent())
            restore.execute(repository, wanted, Silent())
        print(time.perf_counter() - begun, recording.total, recording.most)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="MiB of the image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where image, server and target lie")
    parser.add_argument("--child", nargs=3, metavar=("JOB", "URL", "SECONDS"))
    arguments = parser.parse_args()
    if arguments.child:
        job, url, seconds = arguments.child
        child(job, url, arguments.folder, float(seconds))
        return 0
    with tempfile.TemporaryDirectory(prefix="imager-latency-", dir=arguments.folder) as place:
        return _run(Path(place), arguments.size, arguments.rounds)


def _run(folder: Path, size: int, rounds: int) -> int:
    from tests import objectstores

    with (folder / "disk.img").open("wb") as file:
        for _ in range(size):
            file.write(os.urandom(MIB))
    url = f"s3://{objectstores.BUCKET}/latency"
    seconds: dict[tuple[str, float], list[float]] = {}
    peaks: dict[str, int] = {}
    with objectstores.s3s(folder) as server, objectstores.open_door(server) as door:
        environment = {
            **objectstores.environment(door.endpoint),
            "IMAGER_STATE_DIR": str(folder / "state"),
            "IMAGER_CACHE_DIR": str(folder / "cache"),
        }

        def job(name: str, distance: float) -> None:
            command = [sys.executable, __file__, "--folder", str(folder), "--child", name, url, str(distance)]
            done = measure.run(command, environment)
            if name == "init":
                return
            took, calls, most = done.output.split()
            seconds.setdefault((name, distance), []).append(float(took))
            peaks[name] = max(peaks.get(name, 0), done.peak_bytes)
            rate = f"{float(took):6.2f} s, {size / float(took):4.0f} MiB/s"
            cost = f"{calls} calls, {most} at once, peak {done.peak_bytes // MIB} MiB"
            print(f"  {name:8} {distance * 1000:3.0f} ms: {rate}, {cost}", flush=True)

        job("init", 0)  # Through the door: the server alone lets two writers win, and is refused.
        environment |= objectstores.environment(server)  # From here on without it, for speed.
        for distance in (0.0, LATENCY):
            shutil.rmtree(folder / "state", ignore_errors=True)
            job("backup", distance)
        for _ in range(rounds):
            for distance in (0.0, LATENCY):
                for name in ("restore", "verify"):
                    job(name, distance)
                if not _same(folder):
                    raise measure.Failed("what was restored is not what was backed up")
                (folder / "restored.img").unlink()
    kept = {
        name: measure.Spread(tuple(seconds[name, 0.0])).median
        / measure.Spread(tuple(seconds[name, LATENCY])).median
        for name in ("restore", "verify")
    }
    fit = kept["restore"] >= TARGET and max(peaks["backup"], peaks["restore"]) <= MEMORY
    print(
        f"restore keeps {kept['restore']:.0%} of its rate with {LATENCY * 1000:.0f} ms on each call", end=""
    )
    print(f" (target {TARGET:.0%}), verify {kept['verify']:.0%}")
    print(f"peak memory: backup {peaks['backup'] // MIB} MiB, restore {peaks['restore'] // MIB} MiB (300)")
    return 0 if fit else 1


def _same(folder: Path) -> bool:
    import filecmp

    return filecmp.cmp(folder / "disk.img", folder / "restored.img", shallow=False)


if __name__ == "__main__":
    sys.exit(main())
