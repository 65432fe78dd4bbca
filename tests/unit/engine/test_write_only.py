"""Backups with a key that reads nothing: whole, incremental, and nothing stored twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from imager.engine import backup
from imager.engine.backup import BackupOptions, BackupSummary
from imager.errors import WrongKey
from imager.events import Silent
from imager.repository import imageset, keyring, keys, knownpages
from imager.repository.blockmap import MapReader
from imager.repository.check import check
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from tests.unit.engine.conftest import content
from tests.workbench import Recording, Workbench, state_in

WRITER = keys.Secret("keyfile", b"w" * 40)
BLOCK = 4096


class Given(Credentials):
    """The writer's keyfile, whatever else there is."""

    def obtain(self, kinds: Any) -> keys.Secret:
        return WRITER


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    """A repository with a writer of this host, whose storage counts its calls."""
    with state_in(tmp_path / "state"):
        bench = Workbench(tmp_path, encryption="keyfile", record=True)
        with bench.open() as repository:
            keyring.add(repository, WRITER, role="write", host=imageset.this_host(), label="w")
        yield bench


def writing(bench: Workbench) -> Repository:
    return Repository.open(bench.storage(), Given(), writing=True)


def back_up(
    bench: Workbench, *sources: Path, reporter: Silent | None = None, **options: Any
) -> BackupSummary:
    reporter = reporter or Silent()
    with writing(bench) as repository:
        wanted = BackupOptions(**{"name": "d", **options})
        plan = backup.plan(repository, [str(source) for source in sources], wanted, reporter)
        return backup.execute(repository, plan, reporter)


def grown(bench: Workbench, before: set[str]) -> dict[str, int]:
    """How many objects of each kind were added."""
    added: dict[str, int] = {}
    for name in bench.objects() - before:
        kind = name.partition("/")[0]
        added[kind] = added.get(kind, 0) + 1
    return added


@pytest.mark.parametrize("blocks", [1, 200, 256, 700, 66_000])
def test_what_did_not_change_is_not_stored_again(bench: Workbench, tmp_path: Path, blocks: int) -> None:
    """Of maps of one to three levels; blocks, leaves and the pages above them."""
    source = tmp_path / "source"
    source.write_bytes(content(min(blocks, 2000) * BLOCK, density=0.5))
    os.truncate(source, blocks * BLOCK)
    with source.open("r+b") as file:  # and at the far end, so that the map is deep where the image is
        file.seek((blocks - 1) * BLOCK)
        file.write(b"end".ljust(BLOCK))
    start = source.read_bytes()[:BLOCK]
    first = back_up(bench, source, block_size=BLOCK)
    assert not first.by_content and first.strategy == "full"
    before = bench.objects()
    bench.calls.clear()
    again = back_up(bench, source, block_size=BLOCK)
    calls = bench.calls.copy()
    assert again.by_content and again.images[0].blocks_new == 0
    assert grown(bench, before) == {"sets": 1, "sessions": 1}
    # As many as with a full key, one listing of revocations, and each page above the leaves.
    bench.calls.clear()
    bench.backup(source, name="d", strategy="full", block_size=BLOCK)
    full = bench.calls.copy()
    above = {1: 1, 200: 1, 256: 1, 700: 1, 66_000: 3}[blocks]
    assert calls["read"] <= full["read"] + above and calls["list"] <= full["list"] + 1, (calls, full)
    before = bench.objects()
    # One block changes: one pack of data, one of pages, and of these no more than one for each level.
    with source.open("r+b") as file:
        file.write(b"changed".ljust(BLOCK))
    before = bench.objects()
    third = back_up(bench, source, block_size=BLOCK)
    assert third.images[0].blocks_new == 1
    assert grown(bench, before) == {"sets": 1, "sessions": 1, "packs": 1, "maps": 1, "index": 1}
    with bench.open(writing=False) as repository:
        maps = []
        for one in (again.set, third.set):
            image = imageset.read_set(repository, one).images[0]
            assert image.root is not None
            maps.append((image.root.level, list(MapReader(repository, image).walk())))
        levels = maps[1][0] + 1
        new = bench.objects() - before
        (pack,) = [bytes.fromhex(name[-64:]) for name in new if name.startswith("maps/")]
        assert _records(repository, pack) == levels
    bench.gives(third.set, {"source": source}, reference=blocks < 1000)
    bench.gives(again.set, {"source": _with(source, tmp_path, start)}, reference=False)
    bench.is_whole([first.set, again.set, third.set])


def _with(source: Path, folder: Path, start: bytes) -> Path:
    """A copy of the source as it began before."""
    other = folder / "earlier"
    other.write_bytes(source.read_bytes())
    with other.open("r+b") as file:
        file.write(start)
    return other


def _records(repository: Repository, pack: bytes) -> int:
    from imager import _native
    from imager.repository.format import KIND_MAP, pack_object

    fd = repository.storage.open(pack_object(KIND_MAP, pack))
    try:
        return len(_native.pack_records(fd, pack, repository.id))
    finally:
        os.close(fd)


def test_full_keys_and_write_keys_take_turns(bench: Workbench, tmp_path: Path) -> None:
    source = tmp_path / "source"
    data = bytearray(content(600 * BLOCK))
    sets = []
    for round_, writer in enumerate((False, True, False, True, True, False)):
        at = round_ * 40 * BLOCK
        data[at : at + 9] = b"round %03d" % round_
        source.write_bytes(data)
        options: dict[str, Any] = {"name": "d", "block_size": BLOCK}
        made = back_up(bench, source, **options) if writer else bench.backup(source, **options)
        assert made.images[0].blocks_new <= 1 or not round_
        assert made.by_content == writer
        bench.gives(made.set, {"source": bytes(data)})
        sets.append(made.set)
    bench.is_whole(sets)
    with bench.open(writing=False) as repository:
        assert [one.sequence for one in imageset.list_sets(repository).sets] == [1, 2, 3, 4, 5, 6]


def test_several_disks_and_a_stream(bench: Workbench, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(content(300 * BLOCK, seed=1))
    two.write_bytes(content(500 * BLOCK + 77, seed=2))
    back_up(bench, one, two, block_size=BLOCK)
    before = bench.objects()
    made = back_up(bench, one, two, block_size=BLOCK)
    assert grown(bench, before) == {"sets": 1, "sessions": 1}
    bench.gives(made.set, {"one": one, "two": two})
    # A disk that grew: its leaves are shared as far as they are the same.
    one.write_bytes(one.read_bytes() + content(300 * BLOCK, seed=3))
    made = back_up(bench, one, two, block_size=BLOCK)
    bench.gives(made.set, {"one": one, "two": two})
    bench.is_whole([made.set])


def test_the_block_size_of_the_lineage_is_kept(bench: Workbench, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(content(40 * 8192, block=8192, density=0.9))
    back_up(bench, source, block_size=8192)
    again = back_up(bench, source)  # 64 KiB otherwise, and all would be stored again
    assert (again.images[0].block_size, again.images[0].blocks_new) == (8192, 0)
    with writing(bench) as repository:
        manifest = imageset.read_set(repository, again.set)
        assert knownpages.block_size(repository, manifest.public) == 8192


def test_a_map_of_changes_is_not_believed_blindly(bench: Workbench, tmp_path: Path) -> None:
    """Nobody can tell it what the base was: all is read."""
    source, changed = tmp_path / "source", tmp_path / "map.json"
    data = bytearray(content(300 * BLOCK, density=0.9))
    source.write_bytes(data)
    back_up(bench, source, block_size=BLOCK)
    data[5 * BLOCK] ^= 1
    data[200 * BLOCK] ^= 1
    source.write_bytes(data)
    changed.write_text(f'{{"extents": [[{5 * BLOCK}, {BLOCK}]]}}')
    reporter = Silent()
    made = back_up(bench, source, changed=str(changed), reporter=reporter)
    assert made.images[0].blocks_new == 2
    assert any("map" in text for text in reporter.warnings), reporter.warnings
    bench.gives(made.set, {"source": bytes(data)})


def test_a_page_that_is_gone_is_written_anew(bench: Workbench, tmp_path: Path) -> None:
    """The pack with the earlier map is missing: the next set is whole all the same."""
    source = tmp_path / "source"
    source.write_bytes(content(600 * BLOCK))
    back_up(bench, source, block_size=BLOCK)
    bench.damage("maps").unlink()
    with writing(bench) as repository:
        found = check(repository, Silent())
        assert not found.ok and {problem.kind for problem in found.problems} == {"map"}
    made = back_up(bench, source, block_size=BLOCK)
    assert made.images[0].blocks_new == 0
    bench.gives(made.set, {"source": source})


def test_a_page_that_lies_about_its_children_stops_nothing(bench: Workbench, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(content(600 * BLOCK))
    back_up(bench, source, block_size=BLOCK)
    path = bench.damage("maps")
    raw = bytearray(path.read_bytes())
    for at in range(200, len(raw) - 200, 97):  # public parts, sealed parts and heads
        raw[at] ^= 0x55
    path.chmod(0o600)
    path.write_bytes(raw)
    made = back_up(bench, source, block_size=BLOCK)
    bench.gives(made.set, {"source": source})


def test_a_write_key_reads_no_set(bench: Workbench, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(content(20 * BLOCK))
    back_up(bench, source)
    with writing(bench) as repository:
        for text in ("latest", "d", "nothing"):
            with pytest.raises(WrongKey):
                imageset.resolve(repository, text).content.images[0]
        assert isinstance(repository.storage, Recording)
