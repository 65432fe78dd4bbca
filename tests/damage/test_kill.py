"""kill -9 at random points, hundreds of times: every earlier set stays whole, the next run is fine.

A server process imports everything once and forks a child for each run, so that the time of a
kill falls into the work and not into the start of Python. IMAGER_KILLS=N sets the number of
kills of a backup.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from imager.cli import main
from imager.storage.folder import FolderStorage
from tests.damage.workshop import MIB, Place, restored

KILLS = int(os.environ.get("IMAGER_KILLS", "200"))


def name_staged_files() -> None:
    """Take the way of filesystems that have no files without names."""
    make = FolderStorage.__init__

    def init(self: FolderStorage, root: str) -> None:
        make(self, root)
        self._nameless = False

    FolderStorage.__init__ = init  # type: ignore[method-assign]


def child(arguments: list[str], environment: dict[str, str], named: bool) -> int:
    """Run the command in a forked child, as the console script does: its process id, once it begins."""
    begun, begin = os.pipe()
    pid = os.fork()
    if pid:
        # On a busy machine the child may come to run late: what is sent before says nothing of the program.
        os.close(begin)
        os.read(begun, 1)
        os.close(begun)
        return pid
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(quiet, fd)
        os.environ.update(environment)
        if named:
            name_staged_files()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["imager", *arguments]
        os.write(begin, b".")
        main.main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 99)
    except BaseException:
        os._exit(98)
    os._exit(97)


def run(
    arguments: list[str],
    environment: dict[str, str],
    after: float | None,
    number: int,
    *,
    named: bool = False,
) -> int:
    """Run the command, send it a signal after so many seconds; how it ended (negative: by a signal)."""
    pid = child(arguments, environment, named)
    if after is not None:
        time.sleep(after)
        os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(params=["keyfile", "none"])
def place(request: pytest.FixtureRequest, quick: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A repository with one set of a disk of 24 MiB."""
    place = Place(quick)
    (quick / "key").write_bytes(os.urandom(64))
    for key, value in place.environment().items():
        monkeypatch.setenv(key, value)
    encryption = request.param
    assert place.imager("init", place.root, "--encryption", encryption, "--block-size", "4KiB").code == 0
    source = quick / "disk"
    with source.open("wb") as file:
        for _ in range(4):
            file.write(os.urandom(3 * MIB) + b"words " * 175_000)
            file.seek(-(-file.tell() // MIB) * MIB + MIB)
        file.truncate(24 * MIB)
    assert place.imager("backup", source, "--name", "disk").code == 0
    return place


def change(source: Path, chance: random.Random) -> None:
    """Something new everywhere, so that a run has packs, maps and an index to write."""
    with source.open("r+b") as file:
        for _ in range(300):
            file.seek(chance.randrange(24 * 256) * 4096)
            file.write(chance.randbytes(4096))


def span(arguments: Callable[[], list[str]], environment: dict[str, str]) -> float:
    """How long an undisturbed run takes, in seconds."""
    times = []
    for _ in range(3):
        pid = child(arguments(), environment, named=False)
        begun = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        times.append(time.monotonic() - begun)
    return sorted(times)[1]


def litter(place: Place) -> int:
    """Files that no set has and no check would remove by itself: those of the staging area."""
    return len(place.files("tmp"))


def test_a_killed_backup_harms_nothing(place: Place) -> None:
    chance = random.Random(1)
    source = place.folder / "disk"

    def arguments() -> list[str]:
        change(source, chance)
        return ["-q", "-r", str(place.root), "backup", str(source), "--name", "disk"]

    killed = finished = 0
    sets: set[str] = set()
    for turn in range(KILLS // 2):
        if turn % 20 == 0:  # Other tests beside this one come and go, and with them what a run takes.
            longest = span(arguments, place.environment()) * 1.1
            assert sets <= (sets := {path.name for path in place.files("sets")})
        before = {path.name for path in place.files("sets")}
        ended = run(arguments(), place.environment(), chance.uniform(0, longest), signal.SIGKILL)
        assert ended in (0, -signal.SIGKILL)
        new = {path.name for path in place.files("sets")} - before
        assert len(new) == 1 if ended == 0 else len(new) <= 1
        killed += ended != 0
        finished += len(new)
        sets |= new
        assert sets == {path.name for path in place.files("sets")}
        assert litter(place) == 0, "the staging area has no named files on this filesystem"
        if turn % 10 == 9:
            check = place.imager("check")
            assert (check.code, check.summary["problems"]) == (0, []), check
    assert killed > KILLS // 8 and killed - finished > KILLS // 16, (killed, finished)

    # What is left of the killed ones is told, and is no problem.
    check = place.imager("check", "--read-data")
    assert (check.code, check.summary["problems"], check.summary["sets"]) == (0, [], len(sets))
    for set_id in sets:
        assert place.imager("verify", set_id).code == 0, set_id
    ended = place.imager("backup", source, "--name", "disk")
    assert ended.code == 0
    assert restored(place, ("disk", "disk"), place.folder / "out")[1] == source.read_bytes()


def test_staged_files_with_names_do_not_pile_up(place: Place) -> None:
    """A killed writer's file stays; the next writer removes it, for nobody holds its lock any more."""
    chance = random.Random(4)
    source = place.folder / "disk"

    def arguments() -> list[str]:
        change(source, chance)
        return ["-q", "-r", str(place.root), "backup", str(source), "--name", "disk"]

    longest = span(arguments, place.environment())
    killed, most = 0, 0
    for _ in range(40):
        after = chance.uniform(0.2, 1) * longest
        killed += run(arguments(), place.environment(), after, signal.SIGKILL, named=True) != 0
        most = max(most, litter(place))
    assert killed > 5 and 0 < most <= 4, (killed, most)
    check = place.imager("check", "--read-data")
    assert (check.code, check.summary["problems"]) == (0, [])
    assert place.imager("backup", source, "--name", "disk").code == 0
    assert litter(place) == 0
    assert restored(place, ("disk", "disk"), place.folder / "out")[1] == source.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_backup_that_is_asked_to_stop(place: Place, number: signal.Signals) -> None:
    chance = random.Random(2)
    source = place.folder / "disk"

    def arguments() -> list[str]:
        change(source, chance)
        return ["-q", "-r", str(place.root), "backup", str(source), "--name", "disk"]

    longest = span(arguments, place.environment())
    stopped = 0
    for _ in range(25):
        before = {path.name for path in place.files("sets")}
        ended = run(arguments(), place.environment(), chance.uniform(0.02, longest), number)
        new = {path.name for path in place.files("sets")} - before
        assert ended in (0, 130), ended
        # It may be asked in the moment after the commit; then the set is whole, and is told below.
        assert len(new) == 1 if ended == 0 else len(new) <= 1
        stopped += ended == 130 and not new
        assert litter(place) == 0
    assert stopped > 5
    check = place.imager("check", "--read-data")
    assert (check.code, check.summary["problems"]) == (0, [])
    assert place.imager("backup", source, "--name", "disk").code == 0
    assert place.imager("verify", "disk").code == 0


def test_ctrl_c_at_the_terminal(place: Place) -> None:
    """The real program, with its own start and its message."""
    source = place.folder / "disk"
    with source.open("r+b") as file:
        file.truncate(2 << 30)
        file.write(os.urandom(200 * MIB))
    announced = len(place.files("sessions"))
    process = subprocess.Popen(
        [sys.executable, "-m", "imager", "-r", str(place.root), "backup", str(source), "--name", "disk"],
        env={**os.environ, **place.environment()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while len(place.files("sessions")) == announced and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)  # It has announced itself, and most of its work is before it.
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err and b"interrupted" in err, err
    assert len(place.files("sets")) == 1


def test_a_killed_restore_goes_on(place: Place) -> None:
    chance = random.Random(3)
    data = (place.folder / "disk").read_bytes()
    out = place.folder / "out"

    def arguments() -> list[str]:
        out.unlink(missing_ok=True)
        return ["-q", "-r", str(place.root), "restore", "disk", str(out)]

    longest = span(arguments, place.environment())
    interrupted = 0
    for _ in range(40):
        number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        ended = run(arguments(), place.environment(), chance.uniform(0, longest), number)
        assert ended in (0, -number, 130), ended
        if ended != 0 and out.exists() and out.read_bytes() != data:
            interrupted += 1
            # It does not look whole: the part that a partition table or filesystem begins with is empty.
            # (A kill within the few writes of the head itself can leave a part of the head.)
            content = out.read_bytes()
            if content[MIB:] != data[MIB:]:
                assert not any(content[:MIB])
        ended = run(
            ["-r", str(place.root), "restore", "disk", str(out), "--resume"], place.environment(), None, 0
        )
        if (
            ended == 20
        ):  # it was whole already, or killed before the journal knew of it: content is not ours to replace
            assert out.stat().st_size
            ended = run(
                ["-r", str(place.root), "restore", "disk", str(out), "--overwrite"],
                place.environment(),
                None,
                0,
            )
        assert ended == 0 and out.read_bytes() == data
    assert interrupted > 3
