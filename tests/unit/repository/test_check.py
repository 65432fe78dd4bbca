"""Every kind of object, damaged in every way, is found and named, with exactly the bytes that it costs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from imager.errors import ImagerError, UsageError
from imager.events import Silent
from imager.repository import check as checking
from imager.repository import imageset, sessions
from imager.repository.check import Summary, check
from imager.repository.session import Session
from tests.unit.repository.building import BLOCK, Lab, noise


def run(lab: Lab, read_data: str | None = "all", *, repair: bool = False) -> Summary:
    return check(lab.reopen(), Silent(), read_data=read_data, repair=repair)


def two_sets(lab: Lab) -> tuple[str, str]:
    """Two sets of one lineage: 600 blocks with zeroes between, then 20 of them changed."""
    first = bytearray(noise(600))
    first[100 * BLOCK : 200 * BLOCK] = bytes(100 * BLOCK)
    second = bytearray(first)
    second[300 * BLOCK : 320 * BLOCK] = noise(20, seed=1)
    return lab.backup(sda=bytes(first)).id, lab.backup(sda=bytes(second)).id


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    place = len(data) // 2 if at is None else at % len(data)
    data[place] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "truncated": truncate,
    "flipped": flip,
    "garbage": garbage,
    "empty": empty,
}


def restored(lab: Lab, set_id: str) -> list[tuple[int, int]]:
    """Extents of the set's first disk that cannot be read back, tried block by block."""
    from imager import _native
    from imager.repository.blockmap import MapReader
    from imager.storage.errors import StorageError

    repository = lab.reopen()
    image = imageset.read_set(repository, set_id).images[0]
    content = lab.images[set_id][image.disk]
    lost: list[int] = []
    bad: list[tuple[int, int]] = []
    reader = MapReader(repository, image)
    for first, count, slots in reader.walk(on_damage=lambda first, count, _: bad.append((first, count))):
        for at in range(count):
            block = first + at
            if isinstance(slots, int):
                continue
            gather = _native.Gather()
            gather.add(block, slots.slice(at, at + 1))
            gather.sort()
            if not len(gather):
                continue
            try:
                packs = {number: repository.pack_reader(number) for number in gather.packs(0, len(gather))}
                got = _native.read_blocks(
                    repository.vault, packs, gather, image_size=image.size, block_size=image.block_size
                )
                assert got == [(block, content[block * BLOCK : (block + 1) * BLOCK])]
            except (ImagerError, _native.DamagedError, StorageError, OSError):
                lost.append(block)
    lost += [block for first, count in bad for block in range(first, first + count)]
    ranges: list[tuple[int, int]] = []
    for block in sorted(set(lost)):
        if ranges and sum(ranges[-1]) == block * BLOCK:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + BLOCK)
        else:
            ranges.append((block * BLOCK, BLOCK))
    return ranges


def claimed(summary: Summary, set_id: str) -> list[tuple[int, int]]:
    from imager.extents import Extents

    extents = Extents.of(
        (start, start + length)
        for problem in summary.problems
        for hurt in problem.hurt
        if hurt.set == set_id
        for start, length in hurt.extents
    )
    return [(start, end - start) for start, end in extents]


def test_a_whole_repository_is_whole(lab: Lab) -> None:
    two_sets(lab)
    summary = run(lab)
    assert summary.ok and summary.problems == () and summary.notes == ()
    assert summary.sets == 2
    assert summary.packs == summary.packs_read == len(lab.paths("packs") + lab.paths("maps"))
    stored = sum(path.stat().st_size for kind in ("packs", "maps", "index") for path in lab.paths(kind))
    assert summary.bytes_read == stored
    assert run(lab, None).packs_read == 0


@pytest.mark.parametrize("kind", ["packs", "maps", "sets", "index", "sessions", "epochs"])
@pytest.mark.parametrize("way", DAMAGE)
def test_damage_is_found_named_and_traced(lab: Lab, kind: str, way: str) -> None:
    ids = two_sets(lab)
    assert run(lab).ok  # also lets the witness see the sets
    for path in lab.paths(kind):
        kept = path.read_bytes()
        DAMAGE[way](path)
        summary = run(lab)
        assert not summary.ok
        name = str(path.relative_to(lab.root))
        if kind == "index" and way == "missing":
            assert {problem.kind for problem in summary.problems} == {"index"}
        elif kind == "sets" and way == "missing":
            assert any(path.name in str(problem) for problem in summary.problems)
        else:
            assert name in {problem.object for problem in summary.problems}, summary
        hurts = {hurt.set for problem in summary.problems for hurt in problem.hurt}
        if kind not in ("packs", "maps"):
            assert hurts == set()
        for set_id in ids:
            if kind in ("packs", "maps"):
                assert claimed(summary, set_id) == restored(lab, set_id)
        if kind in ("packs", "maps") and way == "missing":
            assert hurts
        path.write_bytes(kept)
        assert run(lab).ok


@pytest.mark.parametrize("kind", ["packs", "maps", "sets", "index", "sessions"])
def test_swapped_objects_are_found(lab: Lab, kind: str) -> None:
    ids = two_sets(lab)
    assert run(lab).ok
    one, two, *_ = lab.paths(kind)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    summary = run(lab)
    assert {str(path.relative_to(lab.root)) for path in (one, two)} <= {p.object for p in summary.problems}
    if kind in ("packs", "maps"):
        for set_id in ids:
            assert claimed(summary, set_id) == restored(lab, set_id) != []


def test_one_bit_in_a_payload_costs_one_block(lab: Lab) -> None:
    ids = two_sets(lab)
    lab.repository.packs_present()
    path = lab.paths("packs")[0]
    flip(path, 5 * BLOCK)
    assert run(lab, None).ok  # the structure alone cannot tell
    summary = run(lab)
    (problem,) = summary.problems
    assert problem.object == str(path.relative_to(lab.root)) and "1 of its" in problem.detail
    assert all(hurt.bytes == BLOCK and hurt.disk == "sda" and hurt.name == "d" for hurt in problem.hurt)
    for set_id in ids:
        assert claimed(summary, set_id) == restored(lab, set_id)
    assert all(
        str(hurt).startswith(f"set {hurt.set[:8]} (d), disk sda: 4.00 KiB at ") for hurt in problem.hurt
    )


def test_every_byte_of_manifests_maps_and_epochs_counts(lab: Lab) -> None:
    lab.backup(sda=noise(3))
    assert run(lab).ok
    for path in [*lab.paths("sets"), *lab.paths("maps"), *lab.paths("epochs")]:
        kept = path.read_bytes()
        for at in range(0, len(kept), 7):
            flip(path, at)
            assert not run(lab).ok, (path, at)
            path.write_bytes(kept)


def test_an_older_state_put_back_is_noticed(lab: Lab, tmp_path: Path) -> None:
    lab.backup(sda=noise(3))
    shutil.copytree(lab.root, tmp_path / "older")
    newest = lab.backup(sda=noise(3, seed=1)).id
    assert run(lab).ok
    shutil.rmtree(lab.root)
    shutil.copytree(tmp_path / "older", lab.root)
    for _ in range(2):  # it does not fall silent by itself
        summary = run(lab)
        assert [problem.kind for problem in summary.problems] == ["history"]
        assert newest in summary.problems[0].detail
    lab.backup(sda=noise(3, seed=2))
    assert [problem.kind for problem in run(lab).problems] == ["history"]


def test_unfinished_sessions_and_their_packs_are_no_damage(lab: Lab) -> None:
    two_sets(lab)
    session = Session.begin(lab.repository, host="host")
    pack = session.new_data_pack()
    from imager import _native

    vault, content = lab.repository.vault, noise(2, seed=9)
    known = _native.Known(lab.repository.names)
    size = len(content)
    _native.scan(
        vault, content, [(0, 2)], image_size=size, block_size=BLOCK, base=None, pack=pack, known=known
    )
    session.seal(pack)
    session.drain()
    session._end()  # As if it were killed: nothing is taken back.
    summary = run(lab)
    assert summary.ok
    assert any(session.id in note for note in summary.notes)
    assert any("belongs to no image set" in note for note in summary.notes)


def test_repair_sets_damage_aside_and_the_next_backup_heals(lab: Lab) -> None:
    ids = two_sets(lab)
    latest = lab.images[ids[1]]["sda"]
    for path in lab.paths("packs"):
        good = path.read_bytes()
        flip(path, 3 * BLOCK)
        flip(path, 9 * BLOCK)
        if restored(lab, ids[0]) == restored(lab, ids[1]) != []:
            break  # The next backup, which is of the latest, can heal both.
        path.write_bytes(good)
    else:
        raise AssertionError("no pack has blocks there that both sets have")
    for segment in lab.paths("index"):
        garbage(segment)
    before = {set_id: restored(lab, set_id) for set_id in ids}
    summary = run(lab, repair=True)
    assert len(summary.repaired) == 2
    assert not path.exists()
    assert all(problem.repaired == (problem.kind == "index") for problem in summary.problems)
    for set_id in ids:  # the healthy neighbours can still be had
        assert restored(lab, set_id) == before[set_id] == claimed(summary, set_id)
    later = run(lab)
    assert {problem.kind for problem in later.problems} <= {"pack"}
    healed = lab.backup(sda=latest).id
    assert restored(lab, healed) == []
    after = run(lab)
    assert claimed(after, healed) == []
    assert any(before.values()) and after.ok, "what was stored again is found by its id"
    assert [claimed(after, set_id) for set_id in ids] == [[], []]


def test_repair_makes_a_missing_announcement_anew(lab: Lab) -> None:
    """It decides nothing: a sync that was killed leaves a set without one, too."""
    ids = two_sets(lab)
    (lab.root / "sessions" / ids[0]).unlink()
    assert [problem.kind for problem in run(lab).problems] == ["session"]
    summary = run(lab, repair=True)
    assert summary.ok and [one for one in summary.repaired if ids[0] in one]
    after = run(lab)
    assert after.ok and not after.problems
    assert sessions.open_sessions(lab.storage, lab.repository.config.repository) == []
    # A set that is forgotten just then: what nobody looks for must not look like a writer at work.
    assert not sessions.announce_again(lab.storage, lab.repository.config.repository, "ab" * 16)
    assert sessions.open_sessions(lab.storage, lab.repository.config.repository) == []


def test_repair_of_the_index_alone_leaves_a_whole_repository(lab: Lab) -> None:
    two_sets(lab)
    lab.paths("index")[0].unlink()
    flip(lab.paths("index")[0])
    summary = run(lab, repair=True)
    assert summary.ok and summary.repaired
    again = run(lab)
    assert again.ok and again.problems == ()
    assert not run(lab, repair=True).repaired  # nothing left to do


def test_repair_sweeps_what_dead_writers_left(lab: Lab) -> None:
    lab.backup(sda=noise(3))
    (lab.root / "tmp" / "123-dead").write_bytes(b"x")
    assert run(lab, None, repair=True).repaired == ("removed 1 files that dead writers left",)


def test_a_wrong_wish_is_told_before_the_work(lab: Lab) -> None:
    for wrong in ("a lot", "0/7", "8/7", "0%", "101%", "1/", "0", ""):
        with pytest.raises(UsageError):
            checking.check(lab.repository, Silent(), read_data=wrong)
