"""kill -9 at random points of sync, repair and heal: what was whole stays so, the next run ends the work."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from tests.damage.test_kill import change, place, run, span
from tests.damage.workshop import Place, flipped, restored, write

__all__ = ["place"]

KILLS = int(os.environ.get("IMAGER_KILLS", "200")) // 10


@pytest.fixture
def sets(place: Place) -> dict[str, bytes]:
    """Three sets of a disk that changes: set id -> what it holds."""
    source, chance = place.folder / "disk", random.Random(5)
    out = {place.files("sets")[0].name: source.read_bytes()}
    for _ in range(2):
        change(source, chance)
        ended = place.imager("backup", source, "--name", "disk")
        assert ended.code == 0
        out[ended.summary["set"]] = source.read_bytes()
    return out


def at(place: Place, name: str) -> Place:
    """Another place for the same repository."""
    other = Place(place.folder / name)
    other.folder.mkdir(exist_ok=True)
    return other


def are_whole(place: Place, sets: dict[str, bytes]) -> None:
    for set_id, data in sets.items():
        ended, out = restored(place, (set_id, "disk"), place.folder / "out")
        assert ended.code == 0 and out == data, ended


def test_a_killed_sync_goes_on(place: Place, sets: dict[str, bytes]) -> None:
    chance = random.Random(6)
    number, other = 0, at(place, "copy0")

    def arguments() -> list[str]:
        return ["-q", "sync", str(place.root), str(other.root)]

    def fresh() -> list[str]:
        shutil.rmtree(other.root, ignore_errors=True)
        return arguments()

    longest = span(fresh, place.environment()) * 1.1
    shutil.rmtree(other.root)
    killed = finished = 0
    for _ in range(KILLS):
        ended = run(arguments(), place.environment(), chance.uniform(0, longest), signal.SIGKILL)
        assert ended in (0, -signal.SIGKILL), ended
        killed += ended != 0
        there = {path.name for path in other.files("sets")} if (other.root / "config").exists() else set()
        assert there <= set(sets)
        if there:
            check = other.imager("check", "--read-data")
            kinds = {problem["kind"] for problem in check.summary["problems"]}
            # A chain begins with its first set; announcements come after their sets.
            assert check.summary["sets"] == len(there) and kinds <= {"session"}, check
        if len(there) == len(sets):
            finished += 1
            are_whole(other, sets)
            shutil.rmtree(other.root)
            # Another place: at the old one this machine would miss the sets that it has seen.
            number += 1
            other = at(place, f"copy{number}")
    assert killed > KILLS // 8, (killed, finished)
    ended = place.imager("sync", place.root, other.root, "--verify-after")
    assert ended.code == 0, ended
    are_whole(other, sets)
    check = other.imager("check", "--read-data")
    assert (check.code, check.summary["problems"]) == (0, []), check
    assert not other.files("tmp")


def test_a_killed_repair_goes_on(place: Place, sets: dict[str, bytes], quick: Path) -> None:
    """Damage, repair with healing, killed, again: in the end all is whole, and meanwhile nothing is worse."""
    chance = random.Random(7)
    whole = at(place, "whole")
    shutil.copytree(place.root, whole.root)
    images = []
    for number, data in enumerate(sets.values()):
        images.append(quick / f"image{number}")
        images[-1].write_bytes(data)
    sources = [whole.root] if place.files("slots") else images
    healing = [str(item) for source in sources for item in ("--heal-from", source)]
    hurt = at(place, "hurt")

    def damage() -> None:
        shutil.rmtree(hurt.root, ignore_errors=True)
        shutil.copytree(whole.root, hurt.root)
        packs = hurt.files("packs")
        write(packs[0], flipped(packs[0].read_bytes(), packs[0].stat().st_size // 2))
        packs[1].unlink()
        for segment in hurt.files("index")[:1]:
            segment.unlink()

    def arguments() -> list[str]:
        return ["-q", "-r", str(hurt.root), "check", "--read-data", "--repair", *healing]

    def fresh() -> list[str]:
        damage()
        return arguments()

    longest = span(fresh, place.environment()) * 1.1
    damage()
    manifests = {path.name: path.read_bytes() for path in hurt.files("sets")}
    killed = healed = 0
    for _ in range(KILLS):
        ended = run(arguments(), place.environment(), chance.uniform(0, longest), signal.SIGKILL)
        assert ended in (0, -signal.SIGKILL), ended
        killed += ended != 0
        assert {path.name: path.read_bytes() for path in hurt.files("sets")} == manifests
        if ended == 0:
            healed += 1
            are_whole(hurt, sets)
            damage()
    assert killed > KILLS // 8, (killed, healed)
    ended = hurt.imager("check", "--read-data", "--repair", *healing)
    assert ended.code == 0, ended
    are_whole(hurt, sets)
    ended = hurt.imager("check", "--read-data")
    assert (ended.code, ended.summary["problems"]) == (0, []), ended
