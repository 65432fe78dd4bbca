"""Every row of the damage table: found, named exactly, never given out as good data.

For each row: `check --read-data` ends with 30 and names the object and, for data and maps, the
set, the disk and the bytes that it costs; `verify` of each set names the same bytes, or finds the
set whole; `restore` gives the right bytes or ends with 30; and the reference reader, which shares
no code with any of them, agrees about every disk.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.damage.conftest import Copy
from tests.damage.damages import TABLE, Row, lost_records, lost_sets
from tests.damage.workshop import (
    BLOCK,
    MIB,
    Losses,
    Place,
    World,
    read_back,
    restored,
    right_or_zero,
    united,
)

CELLS = [
    pytest.param(row, name, id=f"{name}-{row}")
    for row in TABLE
    for name in ("sealed", "none")
    if row.only in ("", name)
]


def test_nothing_is_wrong_before(world: World, copy: Copy, quick: Path) -> None:
    place = copy(world)
    ended = place.imager("check", "--read-data")
    assert (ended.code, ended.summary["problems"], ended.summary["notes"]) == (0, [], [])
    for disk, data in world.contents.items():
        ended, out = restored(place, disk, place.folder / "out")
        assert ended.code == 0 and out == data == read_back(place, disk, place.folder / "out")


@pytest.mark.parametrize(("row", "encryption"), CELLS)
def test_row(row: Row, encryption: str, worlds: dict[str, World], copy: Copy, quick: Path) -> None:
    world = worlds[encryption]
    place = copy(world)
    row.do(place, world)
    if row.cost.startswith("all"):
        nothing_opens(place, world, int(row.cost.split()[1]))
        return
    losses, gone = world.losses(lost_records(row, world)), lost_sets(row)
    check_tells(place, world, row, losses)
    check_alone_tells(place, row)
    for name, set_id in world.sets.items():
        if name in gone:
            the_set_is_gone(place, world, row, set_id)
            continue
        verify_tells(place, set_id, losses)
        for disk in world.contents:
            if disk[0] == set_id:
                restore_is_right_or_refused(place, world, disk, losses)


def nothing_opens(place: Place, world: World, code: int) -> None:
    for set_id, disk in world.contents:
        ended, out = restored(place, (set_id, disk), place.folder / "out")
        assert (ended.code, out) == (code, None)
        assert read_back(place, (set_id, disk), place.folder / "out") is None
    for verb in (
        ["check", "--read-data"],
        ["list"],
        ["verify", "latest"],
        ["backup", place.folder / "key", "--name", "x"],
    ):
        ended = place.imager(*verb)
        assert ended.code == code, (verb, ended)


def hurt_by(ended_summary: dict[str, object]) -> Losses:
    """What a check's problems say is lost of which disk."""
    found: Losses = {}
    problems = ended_summary["problems"]
    assert isinstance(problems, list)
    for problem in problems:
        for hurt in problem["hurt"]:
            found.setdefault((hurt["set"], hurt["disk"]), []).extend(map(tuple, hurt["extents"]))
    return {disk: united(extents) for disk, extents in found.items()}


def check_tells(place: Place, world: World, row: Row, losses: Losses) -> None:
    ended = place.imager("check", "--read-data")
    assert ended.code == 30, ended
    problems = ended.summary["problems"]
    assert row.kind in {problem["kind"] for problem in problems}, problems
    assert hurt_by(ended.summary) == losses
    if row.kind in ("pack", "map"):
        folder, packs = ("packs", world.packs) if row.kind == "pack" else ("maps", world.maps)
        hit = {pack.hex() for pack, _ in lost_records(row, world)} or {packs["first"][0].hex()}
        named = {problem["object"] for problem in problems if problem["kind"] == row.kind}
        assert named == {f"{folder}/{name[:2]}/{name}" for name in hit}, problems
    elif row.kind == "set":
        named = {problem["object"] for problem in problems if problem["kind"] == "set"}
        assert named == {f"sets/{world.sets[name]}" for name in lost_sets(row)}, problems


def check_alone_tells(place: Place, row: Row) -> None:
    """Without --read-data the structure is checked; the table says what that is enough for."""
    assert place.imager("check").code == (30 if row.quick else 0)


def verify_tells(place: Place, set_id: str, losses: Losses) -> None:
    ended = place.imager("verify", set_id)
    expected = {disk: extents for (of, disk), extents in losses.items() if of == set_id}
    assert ended.code == (30 if expected else 0), ended
    found: dict[str, list[tuple[int, int]]] = {}
    for damage in ended.summary["damage"]:
        found.setdefault(damage["disk"], []).append((damage["start"], damage["length"]))
    assert {disk: united(extents) for disk, extents in found.items()} == expected


def restore_is_right_or_refused(place: Place, world: World, disk: tuple[str, str], losses: Losses) -> None:
    data = world.contents[disk]
    ended, out = restored(place, disk, place.folder / "out")
    lost = losses.get(disk)
    if lost is None:
        assert ended.code == 0 and out == data, ended
        assert read_back(place, disk, place.folder / "reference") == data
        return
    assert ended.code == 30, ended
    assert read_back(place, disk, place.folder / "reference") is None
    named = [(int(start), int(length)) for length, start in re.findall(r"(\d+) bytes at (\d+)", ended.err)]
    named += [
        (int(start), int(end) - int(start)) for start, end in re.findall(r"bytes (\d+) to (\d+)", ended.err)
    ]
    assert named and united([*named, *lost]) == lost, ended.err
    if out is not None:
        assert right_or_zero(out, data) and not any(out[:MIB])


def the_set_is_gone(place: Place, world: World, row: Row, set_id: str) -> None:
    for disk in world.contents:
        if disk[0] == set_id:
            ended, out = restored(place, disk, place.folder / "out")
            assert ended.code == (1 if "gone" in row.cost else 30) and out is None, ended
            assert read_back(place, disk, place.folder / "out") is None
    assert place.imager("verify", set_id).code in (1, 30)
    if row.cost in ("set", "two sets"):
        # By its name, too: an older set must not pass for the newest one.
        disks = [disk for of, disk in world.contents if of == set_id]
        out = place.folder / "by-name"
        lineage = "other" if set_id == world.sets["other"] else "machine"
        ended = place.imager("restore", f"{lineage}:{disks[0]}", out)
        assert (ended.code, out.exists()) == (30, False), ended


# --- repair ------------------------------------------------------------------------------------

REPAIRABLE = [
    cell
    for cell in CELLS
    if (row := cell.values[0]).kind in ("pack", "map", "index", "set", "history", "chain", "session")
]


@pytest.mark.parametrize(("row", "encryption"), REPAIRABLE)
def test_after_a_repair_the_next_backup_is_whole(
    row: Row, encryption: str, worlds: dict[str, World], copy: Copy, quick: Path
) -> None:
    world = worlds[encryption]
    place = copy(world)
    row.do(place, world)
    before = {path: path.read_bytes() for path in (place.root / "sets").iterdir()}
    place.imager("check", "--read-data", "--repair")
    assert {path: path.read_bytes() for path in (place.root / "sets").iterdir()} == before

    set_id, _ = world.sets["third"], None
    sources = []
    for disk in ("alpha.img", "beta.img"):
        data = bytearray(world.contents[set_id, disk])
        data[BLOCK : BLOCK + 5] = b"newer"
        (place.folder / disk).write_bytes(data)
        sources.append(place.folder / disk)
    ended = place.imager("backup", *sources, "--name", "machine")
    assert ended.code == 0, ended
    new = ended.summary["set"]
    assert place.imager("verify", new).code == 0
    for source in sources:
        ended, out = restored(place, (new, source.name), place.folder / "out")
        assert ended.code == 0 and out == source.read_bytes() == read_back(
            place, (new, source.name), place.folder / "reference"
        )
    # What the damage did not touch stays as it was; what was stored anew heals the older sets, too.
    losses, gone = world.losses(lost_records(row, world)), lost_sets(row)
    for disk, data in world.contents.items():
        healed = read_back(place, disk, place.folder / "reference")
        ended, out = restored(place, disk, place.folder / "out")
        assert (ended.code == 0) == (healed is not None), ended
        assert healed in (None, data) and (ended.code != 0 or out == data)
        if disk not in losses and not any(world.sets[name] == disk[0] for name in gone):
            assert ended.code == 0
    if row.cost in ("record", "two records", "pack", "rest") and row.damage != "replayed":
        newest = (world.sets["third"], "alpha.img")
        assert place.imager("verify", ":".join(newest)).code == 0, "the next backup had all of it but a block"


def test_a_repaired_index_is_whole(world: World, copy: Copy) -> None:
    place = copy(world)
    for path in place.files("index"):
        path.unlink()
    ended = place.imager("check", "--read-data", "--repair")
    assert ended.code == 0 and ended.summary["repaired"]
    ended = place.imager("check", "--read-data")
    assert (ended.code, ended.summary["problems"]) == (0, [])
