"""Backups: strategies, maps believed and not, bases that lost something, two at once, and the cost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from imager.engine.backup import BackupSummary
from imager.errors import UsageError
from imager.events import Silent
from imager.repository import pages
from imager.repository.blockmap import Page
from imager.repository.check import check
from imager.repository.format import KIND_MAP, pack_object
from tests.workbench import Workbench, imager, json_map

from .conftest import Writer

BLOCK = 4096


@pytest.fixture
def place(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path, block_size=BLOCK)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """4 MiB: 1024 blocks, each another."""
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(4 << 20))
    return path


def overwrite(image: Path, blocks: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """New content for some blocks; their extents."""
    chance = random.Random(seed)
    with image.open("r+b") as file:
        for block in blocks:
            file.seek(block * BLOCK)
            file.write(chance.randbytes(BLOCK))
    return [(block * BLOCK, BLOCK) for block in blocks]


# --- strategies ------------------------------------------------------------------------------------------


def test_strategies_are_recorded(place: Workbench, image: Path) -> None:
    sets: list[BackupSummary] = []
    for number, strategy in enumerate(
        ("auto", "auto", "differential", "incremental", "differential", "full", "auto")
    ):
        if number:
            overwrite(image, [number * 10, number * 10 + 1], 100 + number)
        sets.append(place.backup(image, name="d", strategy=strategy, tags=(f"n{number}",)))
    full, second, third, fourth, fifth, again, last = sets
    assert [(one.strategy, one.base) for one in sets] == [
        ("full", None),
        ("incremental", full.set),
        ("differential", full.set),
        ("incremental", third.set),
        ("differential", full.set),
        ("full", None),
        ("incremental", again.set),
    ]
    assert [one.images[0].blocks_changed for one in sets] == [1024, 2, 4, 2, 8, 1024, 2]
    assert [one.images[0].blocks_new for one in sets] == [1024, 2, 2, 2, 2, 2, 2]
    assert third.images[0].blocks_shared == 2 and again.images[0].blocks_shared == 1022
    for number, one in enumerate(sets):
        manifest = place.manifest(one.set)
        body = manifest.content
        assert (body.strategy, body.base) == (one.strategy, one.base)
        [how] = body.changes
        [part] = how["parts"]
        assert (how["source"], how["unused"], part["every_block"]) == (
            "holes", 0, "no filesystem that is known here",
        )  # fmt: skip
        assert (manifest.sequence, body.tags) == (number + 1, (f"n{number}",))
        assert body.stats["blocks_changed"] == one.images[0].blocks_changed
        assert body.stats["blocks_read"] == 1024 and body.stats["bytes_read"] == 4 << 20
        assert body.stats["size"] == 4 << 20 and body.stats["bytes_stored"] < one.bytes_stored
        before = manifest.public.previous
        assert (before.set if before else None) == (sets[number - 1].set if number else None)
        assert body.images[0].source["key"] == f"file:{image}"
    assert second.bytes_stored < 64 << 10
    place.is_whole(one.set for one in sets)


@pytest.mark.parametrize("strategy", ["incremental", "differential"])
def test_the_first_set_is_full_and_says_so(place: Workbench, image: Path, strategy: str) -> None:
    reporter = Silent()
    assert place.backup(image, name="d", strategy=strategy, reporter=reporter).strategy == "full"
    assert reporter.notes == [f"there is no earlier set to build on: this is a full backup, not {strategy}"]


def test_another_block_size_is_a_full_backup(tmp_path: Path, image: Path) -> None:
    place = Workbench(tmp_path)
    place.backup(image, name="d", block_size=BLOCK)
    assert place.backup(image, name="d").images[0].block_size == BLOCK, "a lineage keeps its block size"
    reporter = Silent()
    other = place.backup(image, name="d", block_size=2 * BLOCK, reporter=reporter)
    assert (other.strategy, other.base, other.sequence) == ("full", None, 3)
    assert "another block size" in reporter.notes[0]
    place.gives(other.set, {"image": image.read_bytes()})


def test_what_makes_no_sense_is_refused(place: Workbench, image: Path) -> None:
    for options, words in (
        ({"strategy": "sometimes"}, "unknown strategy"),
        ({"compression": "zip"}, "unknown compression"),
        ({"compression": "lz4:3"}, "unknown compression"),
        ({"compression": "zstd:40"}, "unknown compression"),
        ({"block_size": 5000}, "no block size"),
        ({"block_size": 65536}, "this repository has blocks of"),
    ):
        with pytest.raises(UsageError, match=words):
            place.backup(image, name="d", **options)
    with pytest.raises(UsageError, match="the same source"):
        place.backup(image, image, name="d")
    with pytest.raises(UsageError, match="part of the repository itself"):
        place.backup(place.root / "config", name="d")
    with pytest.raises(UsageError, match="no name of its own"):
        place.backup("-")
    assert not place.objects()


# --- given maps ------------------------------------------------------------------------------------------


def test_a_map_that_fits_is_used(place: Workbench, image: Path, tmp_path: Path) -> None:
    first = place.backup(image, name="d")
    extents = overwrite(image, range(100, 200, 3), 2)
    digest = place.manifest(first.set).digest.hex()
    path = json_map(tmp_path / "map", extents, size=4 << 20, source={"key": f"file:{image}"}, base=digest)
    reporter = Silent()
    found = place.backup(image, name="d", changed=str(path), reporter=reporter).images[0]
    assert not reporter.warnings and found.change_source == "given:json"
    assert (found.blocks_changed, found.blocks_sampled) == (34, 16)
    assert found.blocks_read == 34 + 16 and found.bytes_read == 50 * BLOCK
    place.gives("d", {"image": image.read_bytes()})


def test_a_map_costs_little_more_than_what_it_names(place: Workbench, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(random.Random(1).randbytes(32 << 20))
    place.backup(image, name="d")
    named = sorted(random.Random(2).sample(range(8192), 400))
    path = json_map(tmp_path / "map", overwrite(image, named, 3))
    found = place.backup(image, name="d", changed=str(path)).images[0]
    assert found.blocks_changed == 400
    assert 400 < found.blocks_read <= 1.1 * 400
    place.gives("d", {"image": image.read_bytes()}, reference=False)


def test_why_a_map_is_not_used(place: Workbench, image: Path, tmp_path: Path) -> None:
    def told(path: Path, source: Path = image, strategy: str = "auto") -> str:
        reporter = Silent()
        one = place.backup(source, name="d", changed=str(path), reporter=reporter, strategy=strategy)
        assert one.images[0].change_source == "holes" and one.images[0].blocks_read == 1024
        (warning,) = reporter.warnings
        assert warning.startswith(f"the map {path} is not used for {source}: ")
        return warning.partition(": ")[2]

    empty = json_map(tmp_path / "empty", [])
    assert told(empty) == "there is no earlier set that it could be counted from"
    first = place.backup(image, name="d")
    assert "image of 4096 bytes" in told(json_map(tmp_path / "size", [], size=4096))
    assert "past the end" in told(json_map(tmp_path / "end", [(4 << 20, 1)]))
    assert "it is of another source: key file:/other" in told(
        json_map(tmp_path / "source", [], source={"key": "file:/other"})
    )
    # The base is the newest set, and the map was made on an older one.
    assert f"it starts at set {first.set}, the base is" in told(
        json_map(tmp_path / "base", [], base=first.set)
    )
    assert told(empty, strategy="full") == "there is no earlier set that it could be counted from"
    # Another file of the same name, in the same lineage.
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "image"
    other.write_bytes(random.Random(9).randbytes(4 << 20))
    assert "the base set is of another source" in told(empty, other)
    place.gives("d", {"image": other.read_bytes()})
    other.write_bytes(other.read_bytes() + b"more")
    reporter = Silent()
    place.backup(other, name="d", changed=str(empty), reporter=reporter)
    assert "the base set's image has 4194304 bytes" in reporter.warnings[0]


def test_a_wrong_map_is_told_of_loudly(place: Workbench, image: Path, tmp_path: Path) -> None:
    place.backup(image, name="d")
    overwrite(image, range(1024), 5)
    reporter = Silent()
    path = json_map(tmp_path / "map", [(0, BLOCK)])
    found = place.backup(image, name="d", changed=str(path), reporter=reporter).images[0]
    said = "is wrong and is not used: 16 of 16 sampled blocks that it calls unchanged have changed"
    assert reporter.warnings[0].startswith(f"the map {path} {said}")
    assert (found.change_source, found.blocks_changed, found.blocks_sampled) == ("holes", 1024, 16)
    assert found.blocks_read == 1024 + 16
    place.gives("d", {"image": image.read_bytes()})


def test_what_the_base_could_not_read_is_read_in_spite_of_a_map(plain_writer: Writer, tmp_path: Path) -> None:
    """Zeroes stand in for it: to take them for unchanged would lose what can be read now."""
    data = random.Random(1).randbytes(600 * BLOCK)

    def lose(slots: object) -> None:
        slots.fill(300, 302, 2)  # type: ignore[attr-defined]

    plain_writer.store({"image": data}, name="d", unreadable=lose, lost=((300 * BLOCK, 2 * BLOCK),))
    image = tmp_path / "image"
    image.write_bytes(data)
    place = Workbench(tmp_path, create=False)
    found = place.backup(image, name="d", changed=str(json_map(tmp_path / "map", [(0, 1)]))).images[0]
    assert found.change_source == "given:json"
    assert (found.blocks_changed, found.unreadable) == (2, ())
    place.gives("d", {"image": data})


# --- a base that has lost something ----------------------------------------------------------------------


def maps_of(tmp_path: Path, how: str, extents: Sequence[tuple[int, int]] = ()) -> dict[str, object]:
    """Options of a backup that reads all, or what a map names."""
    return {"changed": str(json_map(tmp_path / "map", extents))} if how == "map" else {}


@pytest.mark.parametrize("how", ["scan", "map"])
@pytest.mark.parametrize("loss", ["deleted", "deleted and repaired", "set aside"])
def test_blocks_of_a_lost_pack_are_stored_again(
    place: Workbench, image: Path, tmp_path: Path, how: str, loss: str
) -> None:
    place.backup(image, name="d")
    extents = overwrite(image, [7], 2)
    second = place.backup(image, name="d")
    before = image.read_bytes()
    pack = max(
        (place.root / "packs").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    if loss.startswith("deleted"):
        pack.unlink()
    else:
        with pack.open("r+b") as file:
            file.seek(1 << 20)
            file.write(b"damage")
    if loss != "deleted":
        for _ in range(2):
            with place.open() as repository:
                assert check(repository, Silent(), read_data="all", repair=True).problems
        assert not pack.exists()
    extents = overwrite(image, [900], 3)
    reporter = Silent()
    third = place.backup(image, name="d", reporter=reporter, **maps_of(tmp_path, how, extents))
    assert third.base == second.set
    assert any("damaged or missing" in warning for warning in reporter.warnings)
    assert third.images[0].blocks_new == 1023  # all but the one that the second set had stored
    if loss == "set aside":
        # What was damaged in it is stored anew, and the rest of it is as good as ever.
        whole_but_for(place, third, None)
        place.gives(second.set, {"image": before})
    else:
        whole_but_for(place, third, pack)
    place.gives(third.set, {"image": image.read_bytes()})
    # It is known now, and costs the next one nothing.
    fourth = place.backup(image, name="d", **maps_of(tmp_path, how, overwrite(image, [3], 4)))
    assert (fourth.images[0].blocks_new, fourth.images[0].blocks_changed) == (1, 1)
    if how == "map":
        assert fourth.images[0].blocks_read == 1 + 16
    place.gives(fourth.set, {"image": image.read_bytes()})


def whole_but_for(place: Workbench, one: BackupSummary, pack: Path | None) -> None:
    """`check` names the lost pack and the sets that it hurts, not `one`; without `pack`, nothing."""
    with place.open() as repository:
        found = check(repository, Silent(), read_data="all")
    if pack is None:
        assert not found.problems
        return
    (problem,) = found.problems
    assert problem.object.endswith(pack.name)
    assert problem.hurt and one.set not in {hurt.set for hurt in problem.hurt}


def harm_page(place: Workbench, text: str, level: int, index: int) -> None:
    """Flip a bit in a page of a set's block map."""
    with place.reading(text) as (repository, _, reader):
        page = reader.find(level, index)
        assert isinstance(page, Page)
        name = repository.names.name(page.pack)
        assert name is not None
        path = place.root / pack_object(KIND_MAP, name)
    with path.open("r+b") as file:
        file.seek(page.offset + page.length - 1)
        byte = file.read(1)[0]
        file.seek(page.offset + page.length - 1)
        file.write(bytes([byte ^ 1]))


# A damaged leaf below which nothing changed is found by check, not by a backup with a map.
@pytest.mark.parametrize(
    ("how", "level", "index"),
    [(how, *page) for how in ("scan", "map") for page in ((1, 0), (0, 0), (0, 3))] + [("empty map", 1, 0)],
)
def test_a_damaged_page_of_the_base(
    place: Workbench, image: Path, tmp_path: Path, how: str, level: int, index: int
) -> None:
    first = place.backup(image, name="d")
    harm_page(place, first.set, level, index)
    extents = overwrite(image, [index * 256 + 1], 3) if how != "empty map" else []
    reporter = Silent()
    options = maps_of(tmp_path, how.split()[-1], extents)
    second = place.backup(image, name="d", reporter=reporter, **options)
    assert any("damaged" in warning for warning in reporter.warnings)
    assert second.images[0].blocks_new == (1 if extents else 0), "blocks are found by the index"
    with place.open() as repository:
        problems = check(repository, Silent()).problems
    if how == "empty map":
        # The very same page was written again: the first set finds it by its id.
        assert not problems
        place.gives(first.set, {"image": image.read_bytes()})
    else:
        (problem,) = problems
        assert {hurt.set for hurt in problem.hurt} == {first.set}
    place.gives(second.set, {"image": image.read_bytes()})


# --- several at once -------------------------------------------------------------------------------------


def test_two_sources_at_once_share_what_is_equal(place: Workbench, tmp_path: Path) -> None:
    """Both lanes store the same 24 MiB at the same time: each block is stored by one of them."""
    data = random.Random(1).randbytes(24 << 20)
    images = [tmp_path / "a.img", tmp_path / "b.img"]
    images[0].write_bytes(data)
    images[1].write_bytes(data[8 << 20 :] + data[: 8 << 20] + b"tail")
    one = place.backup(*images, name="both")
    blocks = (24 << 20) // BLOCK
    assert sum(found.blocks_new for found in one.images) == blocks + 1
    assert sum(found.blocks_shared for found in one.images) == blocks
    assert [found.disk for found in one.images] == ["a.img", "b.img"]
    again = place.backup(*images, name="both")
    assert sum(found.blocks_changed for found in again.images) == 0
    for set_ in (one.set, again.set):
        place.gives(set_, {path.name: path.read_bytes() for path in images}, reference=False)
    place.is_whole([one.set, again.set])


@pytest.mark.parametrize("lineages", [("d", "d"), ("d", "e")])
@pytest.mark.parametrize("encryption", ["none", "keyfile"])
def test_two_backups_at_once(tmp_path: Path, lineages: tuple[str, str], encryption: str) -> None:
    """Two processes, one repository: both sets are whole, whoever was first."""
    place = Workbench(tmp_path, encryption=encryption, block_size=BLOCK)
    images = []
    common = random.Random(1).randbytes(8 << 20)
    for number in range(2):
        folder = tmp_path / f"machine-{number}"
        folder.mkdir()
        images.append(folder / "image")
        images[-1].write_bytes(common + random.Random(number).randbytes(1 << 20))
    wanted: dict[str, bytes] = {}
    for attempt in range(3):
        running = [
            subprocess.Popen(
                imager("-r", place.root, "--json", "backup", path, "--name", lineage),
                env={**os.environ, "IMAGER_KEYFILE": str(tmp_path / "key")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for path, lineage in zip(images, lineages, strict=True)
        ]
        for process, path in zip(running, images, strict=True):
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            wanted[json.loads(out.splitlines()[-1])["set"]] = path.read_bytes()
        for path in images:
            overwrite(path, [attempt, 500], attempt)
    assert len(wanted) == 6
    for set_, content in wanted.items():
        place.gives(set_, {"image": content}, reference=encryption == "none")
    place.is_whole(wanted)


def test_an_interrupted_backup_of_two_sources(tmp_path: Path) -> None:
    """Both lanes end before what they write to is closed; nothing is left that counts."""
    place = Workbench(tmp_path)
    images = [tmp_path / "a.img", tmp_path / "b.img"]
    for number, path in enumerate(images):
        path.write_bytes(b"".join(b"%d text %d\n" % (number, line) for line in range(1_000_000)))
    arguments = imager("-r", place.root, "backup", *images, "--name", "d", "--compression", "zstd:19")
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list((place.root / "sessions").iterdir()) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert not list((place.root / "sets").iterdir())
    one = place.backup(*images, name="d")
    place.gives(one.set, {path.name: path for path in images}, reference=False)
    place.is_whole([one.set])


# --- what it costs ---------------------------------------------------------------------------------------


def test_storage_calls(tmp_path: Path, image: Path) -> None:
    """An incremental that finds no change writes its announcement and its manifest, and nothing else."""
    place = Workbench(tmp_path, block_size=BLOCK, record=True)

    def calls(**options: object) -> Counter[str]:
        place.calls.clear()
        place.names.clear()
        place.backup(image, name="d", **options)
        return Counter(place.calls)

    def kinds(what: str) -> Counter[str]:
        return Counter(name.partition("/")[0] for call, name in place.names if call == what)

    full = calls()
    assert kinds("publish") == {"packs": 1, "maps": 1}
    assert kinds("create") == {"sessions": 1, "index": 1, "sets": 1}
    assert kinds("read") == {"config": 1}
    # A list for each kind of object that a writer must know, whatever the repository holds.
    assert full["list"] <= 8 and full["size"] + full["exists"] <= 2 and full["delete"] == full["move"] == 0
    before = place.objects()
    same = calls()
    assert kinds("publish") == {} and kinds("create") == {"sessions": 1, "sets": 1}
    assert kinds("read") == {"config": 1, "sets": 1}
    assert kinds("open") == {"maps": 1, "index": 1}
    assert same["list"] == full["list"] and same["delete"] == 0
    assert {name.partition("/")[0] for name in place.objects() - before} == {"sessions", "sets"}
    mapped = calls(changed=str(json_map(tmp_path / "map", [])))
    assert kinds("create") == {"sessions": 1, "sets": 1} and mapped["list"] == full["list"]
    overwrite(image, [5], 6)
    calls(changed=str(json_map(tmp_path / "map", [(5 * BLOCK, 1)])))
    assert kinds("publish") == {"packs": 1, "maps": 1}
    assert kinds("create") == {"sessions": 1, "index": 1, "sets": 1}


def test_a_sparse_terabyte(tmp_path: Path) -> None:
    """Its cost follows what it holds: 24 MiB in 24 places."""
    place = Workbench(tmp_path)
    image = tmp_path / "image"
    chance = random.Random(3)
    with image.open("wb") as file:
        for number in range(24):
            file.seek((number * 41 << 30) + (number << 16))
            file.write(chance.randbytes(1 << 20))
        file.truncate(1 << 40)
    one = place.backup(image, name="d")
    found = one.images[0]
    assert found.bytes_read == 24 << 20 and found.blocks_new == 24 * 16
    assert metadata(place) <= 256 << 10
    again = place.backup(image, name="d")
    assert again.images[0].blocks_changed == 0 and again.bytes_stored < 2048
    place.is_whole([one.set, again.set])
    with place.reading(one.set) as (repository, whole, _):
        found_pages = list(pages.pages(repository, whole))
    assert len(found_pages) <= 1 + 24 + 2 * 24, "nothing may walk sixteen million blocks"


def metadata(place: Workbench) -> int:
    return sum(
        path.stat().st_size
        for folder in ("maps", "index", "sets", "sessions")
        for path in (place.root / folder).rglob("*")
        if path.is_file()
    )
