"""The damage table, healed: from a copy of the repository, from live disks, from another repository.

And `check --keyless` finds in every row what can be found without a key.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.damage.conftest import Copy
from tests.damage.damages import TABLE, Row, lost_records, lost_sets
from tests.damage.test_table import hurt_by, restore_is_right_or_refused
from tests.damage.workshop import BLOCK, Losses, Place, World, read_back, restored

HEALABLE = [row for row in TABLE if row.kind in ("pack", "map", "index", "set", "session", "epoch")]


def everything_is_whole(place: Place, world: World) -> None:
    """`check` finds nothing, and each disk comes back exactly, by both readers."""
    ended = place.imager("check", "--read-data")
    assert (ended.code, ended.summary["problems"]) == (0, []), ended
    assert not any("set aside" in note for note in ended.summary["notes"])
    for set_id in world.sets.values():
        ended = place.imager("verify", set_id)
        assert ended.code == 0 and '"warning"' not in ended.out, ended
    for disk, data in world.contents.items():
        ended, out = restored(place, disk, place.folder / "out")
        assert ended.code == 0 and out == data, ended
        assert read_back(place, disk, place.folder / "reference") == data


def copy_of(place: Place, folder: Path) -> None:
    """What a sync of the place makes is whole, too: nothing hangs on what was set aside."""
    ended = place.imager("sync", place.root, folder)
    assert ended.code == 0 and ended.summary["refused"] == [], ended


@pytest.mark.parametrize("row", HEALABLE, ids=str)
def test_a_copy_heals_every_row(row: Row, worlds: dict[str, World], copy: Copy, quick: Path) -> None:
    world = worlds["none" if row.only == "none" else "sealed"]
    place = copy(world)
    row.do(place, world)
    ended = place.imager("check", "--read-data", "--repair", "--heal-from", world.place.root)
    assert ended.code == 0, ended
    everything_is_whole(place, world)
    copy_of(place, quick / "again")


@pytest.mark.parametrize("row", [row for row in HEALABLE if row.kind in ("pack", "map", "set")], ids=str)
def test_a_copy_heals_without_any_key(
    row: Row, worlds: dict[str, World], copy: Copy, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = worlds["sealed"]
    place = copy(world)
    row.do(place, world)
    with monkeypatch.context() as patch:
        patch.delenv("IMAGER_KEYFILE")
        arguments = ["--keyless", "--read-data", "--repair", "--heal-from", world.place.root]
        ended = place.imager("check", *arguments)
        assert ended.code == 0 and ended.summary["keyless"], ended
        ended = place.imager("check", "--keyless", "--read-data")
        assert (ended.code, ended.summary["problems"]) == (0, []), ended
    ended, out = restored(place, next(iter(world.contents)), place.folder / "out")
    assert ended.code == 0 and out == next(iter(world.contents.values()))


# --- disks and other repositories ----------------------------------------------------------------

DATA = [row for row in TABLE if row.kind == "pack"]


def images(place: Place, world: World, *names: str) -> list[Path]:
    """The disks of these sets as files, as if they were still there as they were."""
    paths = []
    for (set_id, disk), data in world.contents.items():
        if any(world.sets[name] == set_id for name in names):
            paths.append(place.folder / f"{set_id[:8]}-{disk}")
            paths[-1].write_bytes(data)
    return paths


def heal(place: Place, *sources: str | Path) -> Losses:
    """Repair from these sources: what is lost all the same."""
    arguments = [item for source in sources for item in ("--heal-from", source)]
    ended = place.imager("check", "--read-data", "--repair", *arguments)
    left = hurt_by(ended.summary)
    assert ended.code == (30 if left else 0), ended
    return left


@pytest.mark.parametrize("row", DATA, ids=str)
def test_disks_heal_all_that_they_still_have(
    row: Row, worlds: dict[str, World], copy: Copy, quick: Path
) -> None:
    world = worlds["none" if row.only == "none" else "sealed"]
    place = copy(world)
    row.do(place, world)
    assert heal(place, *images(place, world, "first", "second", "third", "other")) == {}
    everything_is_whole(place, world)
    copy_of(place, quick / "again")


@pytest.mark.parametrize("row", [row for row in DATA if row.cost in ("pack", "rest", "both")], ids=str)
def test_what_a_disk_has_no_more_is_named_exactly(
    row: Row, worlds: dict[str, World], copy: Copy, quick: Path
) -> None:
    """The disks have gone on since: blocks that were overwritten come back from nowhere."""
    world = worlds["sealed"]
    place = copy(world)
    row.do(place, world)
    losses = world.losses(lost_records(row, world))
    left = heal(place, *images(place, world, "third"))
    assert left != losses and set(left) <= set(losses)
    newest = {disk: world.contents[world.sets["third"], disk] for disk in ("alpha.img", "beta.img")}
    for (set_id, disk), data in world.contents.items():
        lost = {
            block
            for start, length in left.get((set_id, disk), ())
            for block in range(start // BLOCK, -(-(start + length) // BLOCK))
        }
        was = {
            block
            for start, length in losses.get((set_id, disk), ())
            for block in range(start // BLOCK, -(-(start + length) // BLOCK))
        }
        assert lost <= was
        for block in was - lost:
            # It came back because a disk had these very bytes, wherever the block first stood.
            part = data[block * BLOCK : (block + 1) * BLOCK]
            assert any(part in other for other in newest.values())
        for block in lost if disk in newest else ():
            at = slice(block * BLOCK, (block + 1) * BLOCK)
            assert data[at] != newest[disk][at], "the disk has it, in its place"
        restore_is_right_or_refused(place, world, (set_id, disk), left)
    # Nothing is forgotten: what a better source has comes back later.
    assert heal(place, *images(place, world, "first", "second", "other")) == {}
    everything_is_whole(place, world)


@pytest.mark.parametrize("kind", ["keyfile", "none", "wrong key"])
def test_another_repository_heals_what_has_the_same_hash(
    kind: str, worlds: dict[str, World], copy: Copy, quick: Path
) -> None:
    world = worlds["sealed"]
    place = copy(world)
    (row,) = [row for row in DATA if str(row) == "data-pack:-missing"]
    row.do(place, world)
    other = Place(quick / "other")
    other.folder.mkdir()
    key = other.folder / "key"
    key.write_bytes(os.urandom(64))
    encryption = "none" if kind == "none" else "keyfile"
    own = ["--keyfile", key]
    assert (
        other.imager("init", other.root, "--encryption", encryption, "--block-size", "4KiB", *own).code == 0
    )
    for path in images(place, world, "first", "second", "third", "other"):
        assert other.imager("backup", path, "--name", path.name, *own).code == 0
    arguments = ["check", "--read-data", "--repair", "--heal-from", other.root]
    if kind == "wrong key":
        ended = place.imager(*arguments)
        assert ended.code == 12, ended
        assert heal(place), "what was repaired stays so, and nothing is lost by the attempt"
        return
    ended = place.imager(*arguments, "--heal-keyfile", key)
    assert ended.code == 0, ended
    everything_is_whole(place, world)


def test_sources_that_cannot_help(world: World, copy: Copy, quick: Path) -> None:
    place = copy(world)
    ended = place.imager("check", "--heal-from", world.place.root)
    assert ended.code == 2 and "--repair" in ended.err
    ended = place.imager("check", "--repair", "--heal-from", quick / "nothing")
    assert ended.code == 10, ended
    (quick / "noise").write_bytes(os.urandom(100_000))
    assert place.imager("check", "--repair", "--heal-from", quick / "noise").code == 0
    if world.sealed:
        ended = place.imager("check", "--repair", "--keyless", "--heal-from", quick / "noise")
        assert ended.code == 2 and "without a key" in ended.err


def test_a_repair_that_was_killed_while_it_moved_a_pack(world: World, copy: Copy) -> None:
    """The pack has both names for a moment; the next repair ends what was begun."""
    place = copy(world)
    (row,) = [row for row in DATA if str(row) == "data-pack:-garbage"]
    row.do(place, world)
    path = place.root / "packs" / world.packs["first"][0].hex()[:2] / world.packs["first"][0].hex()
    aside = place.root / "damaged" / path.relative_to(place.root)
    aside.parent.mkdir(parents=True)
    os.link(path, aside)
    assert heal(place, world.place.root) == {}
    assert not aside.exists()
    everything_is_whole(place, world)


# --- without a key --------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in TABLE if row.only in ("", "sealed")], ids=str)
def test_a_check_without_a_key_finds_it(
    row: Row, worlds: dict[str, World], copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = worlds["sealed"]
    place = copy(world)
    row.do(place, world)
    monkeypatch.delenv("IMAGER_KEYFILE")
    ended = place.imager("check", "--keyless", "--read-data")
    if row.thing == "slot" and row.cost == "all 12":
        assert ended.code == 0, "only who has the secret can tell"
        return
    code = int(row.cost.split()[1]) if row.thing == "config" else 30
    assert ended.code == code, ended
    if code == 30 and row.thing != "config":
        hurt = {one["set"] for problem in ended.summary["problems"] for one in problem["hurt"]}
        losses = {set_id for set_id, _ in world.losses(lost_records(row, world))}
        assert losses - {world.sets[name] for name in lost_sets(row)} <= hurt


def test_slots_come_back_without_any_key(
    worlds: dict[str, World], copy: Copy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No slot is left, so nobody can open it; a copy has them still."""
    world = worlds["sealed"]
    place = copy(world)
    for kind in ("slots", "epochs"):
        for path in place.files(kind):
            path.unlink()
    with monkeypatch.context() as patch:
        patch.delenv("IMAGER_KEYFILE")
        ended = place.imager("check", "--keyless", "--repair", "--heal-from", world.place.root)
        assert ended.code == 0, ended
    everything_is_whole(place, world)
