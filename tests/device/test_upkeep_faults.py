"""Sync and repair on disks that are full, and healing from a live device. Real ones."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from imager.device.loop import attach
from tests.damage.workshop import MIB, Place, flipped, restored, write
from tests.device.test_faults import cut_off, memory, place, undo

__all__ = ["place", "undo"]

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="needs loop devices"),
]


def larger(folder: Path) -> None:
    """Space returns."""
    subprocess.run(["mount", "-o", "remount,size=200m", folder], check=True)


def backed_up(place: Place) -> dict[str, Path]:
    """Three sets, the second one larger than the small filesystems here: set id -> its disk."""
    sets = {}
    for name, size in (("small", 3), ("large", 70), ("other", 2)):
        source = place.folder / name
        source.write_bytes(os.urandom(size * MIB))
        ended = place.imager("backup", source, "--name", name, "--compression", "none")
        assert ended.code == 0, ended
        sets[ended.summary["set"]] = source
    return sets


def comes_back(place: Place, sets: dict[str, Path]) -> None:
    check = place.imager("check", "--read-data")
    assert (check.code, check.summary["problems"], check.summary["sets"]) == (0, [], len(sets)), check
    for set_id, source in sets.items():
        ended, out = restored(place, (set_id, source.name), place.folder / "out")
        assert ended.code == 0 and out == source.read_bytes()


def at(place: Place, root: Path) -> Place:
    """The repository at another root, with the same key and memory."""
    other = Place(place.folder / f"at-{root.parent.name}")
    other.folder.mkdir()
    os.symlink(root, other.folder / "r")
    return other


def test_a_copy_on_a_full_disk(place: Place, undo: ExitStack) -> None:
    sets = backed_up(place)
    folder = memory(place.folder / "full", undo, "24m")
    root = folder / "r"
    copied = at(place, root)
    for turn in range(3):
        ended = place.imager("sync", place.root, root)
        assert ended.code == 1 and "No space left" in ended.err and "free some space" in ended.err, ended
        assert not list((root / "tmp").iterdir()) and not list((root / "sets").iterdir()), turn
        assert not list((root / "sessions").iterdir()), "nobody is left who could hold up a prune"
    # What fits is copied, and is whole; the source is none the worse.
    (small, other) = (one for one, source in sets.items() if source.name != "large")
    for path in [*(root / "packs").rglob("*"), *(root / "maps").rglob("*"), *(root / "index").rglob("*")]:
        if path.is_file():
            path.unlink()
    assert place.imager("sync", place.root, root, "--set", small, "--set", other).code == 0
    comes_back(copied, {one: sets[one] for one in (small, other)})
    comes_back(place, sets)
    assert place.imager("sync", place.root, root).code == 1
    comes_back(copied, {one: sets[one] for one in (small, other)})
    larger(folder)
    ended = place.imager("sync", place.root, root, "--verify-after")
    assert ended.code == 0 and ended.summary["present"] == 2, ended
    comes_back(copied, sets)


def test_a_repair_on_a_full_disk(place: Place, undo: ExitStack) -> None:
    sets = backed_up(place)
    folder = memory(place.folder / "full", undo, "200m")
    root = folder / "r"
    hurt = at(place, root)
    assert place.imager("sync", place.root, root).code == 0
    pack = max((path for path in (root / "packs").rglob("*") if path.is_file()), key=os.path.getsize)
    write(pack, flipped(pack.read_bytes(), 5 * MIB))
    missing = min((path for path in (root / "packs").rglob("*") if path.is_file()), key=os.path.getsize)
    missing.unlink()
    for segment in (root / "index").iterdir():
        segment.write_bytes(b"")  # so that a repair has something to write
    with (folder / "ballast").open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass
    manifests = {path.name: path.read_bytes() for path in (root / "sets").iterdir()}
    for _ in range(3):
        ended = hurt.imager("check", "--read-data", "--repair", "--heal-from", place.root)
        assert ended.code == 1 and "No space left" in ended.err and "free some space" in ended.err, ended
        aside = root / "damaged" / pack.relative_to(root)
        assert pack.exists() or aside.exists(), "its healthy records are still there"
        assert {path.name: path.read_bytes() for path in (root / "sets").iterdir()} == manifests
        assert not list((root / "tmp").iterdir())
    (folder / "ballast").unlink()
    ended = hurt.imager("check", "--read-data", "--repair", "--heal-from", place.root)
    assert ended.code == 0, ended
    comes_back(hurt, sets)
    assert pack.exists() and missing.exists() and not aside.exists()


def test_healing_from_the_live_device(place: Place, undo: ExitStack) -> None:
    backing = place.folder / "backing"
    backing.write_bytes(os.urandom(12 * MIB))
    device = undo.enter_context(attach(backing))
    assert place.imager("backup", device.path, "--name", "disk").code == 0
    set_id = place.files("sets")[0].name
    pack = max(place.files("packs"), key=os.path.getsize)
    write(pack, flipped(pack.read_bytes(), 5 * MIB))
    before = backing.read_bytes()
    ended = place.imager("check", "--read-data", "--repair", "--heal-from", device.path)
    assert ended.code == 0 and any(device.path in line for line in ended.summary["repaired"]), ended
    assert backing.read_bytes() == before
    os.symlink(backing, place.folder / device.name)
    comes_back(place, {set_id: place.folder / device.name})


def test_healing_from_a_device_with_bad_sectors(place: Place, undo: ExitStack) -> None:
    """What can still be read there is taken; the rest stays named."""
    device, data = cut_off(place, undo, 4 * MIB, 4 * MIB)
    copy = place.folder / "whole"
    copy.write_bytes(data)
    (place.folder / "failing").write_bytes(data)
    ended = place.imager("backup", copy, "--name", "disk")
    assert ended.code == 0
    for pack in place.files("packs"):
        pack.unlink()
    os.truncate(place.folder / "failing", 3 * MIB)
    ended = place.imager("check", "--read-data", "--repair", "--heal-from", device.path)
    assert ended.code == 30, ended
    (hurt,) = (one for problem in ended.summary["problems"] for one in problem["hurt"])
    assert hurt["extents"] == [[3 * MIB, MIB]]
    ended = place.imager("check", "--repair", "--heal-from", copy)
    assert ended.code == 0, ended
    comes_back(place, {hurt["set"]: copy})
