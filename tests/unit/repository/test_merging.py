"""Merging index segments: nothing of use is lost and few segments stay, whoever does what meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager import _native
from imager.engine import backup, imaging
from imager.engine.backup import BackupOptions
from imager.errors import StorageError
from imager.events import Silent
from imager.repository import index, merging, missing
from imager.repository.credentials import Credentials
from imager.repository.format import INDEX
from imager.repository.merging import MAX_INPUTS, Merged, Policy, choose
from imager.repository.repository import Repository
from imager.repository.segments import segment_name, segment_names
from imager.storage.folder import FolderStaged, FolderStorage
from tests.unit.repository.building import Lab, noise
from tests.unit.repository.segment_making import Place, blocks, digest, found, put, segment_of

TINY = Policy(base=32 << 10, fan=4)
ROOT = Path(__file__).parents[3]


@pytest.fixture
def lab(make_lab: Callable[[str], Lab]) -> Lab:
    return make_lab("none")


def load(lab: Lab, packs: set[str] | None = None) -> tuple[Repository, _native.Known]:
    """The repository as another process sees it, and all its index; `packs`: those that are there."""
    repository = lab.reopen()
    known = index.load(repository)
    repository.names.set_present([digest(pack) for pack in packs or {"pack"}])
    return repository, known


def merge_all(repository: Repository, known: _native.Known) -> Merged:
    return merging.merge(repository, known, [name for name, _, _ in known.loaded])


# --- which segments ---------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(
    sizes=st.lists(st.integers(8 << 10, 64 << 10) | st.integers(1 << 10, 4 << 30), max_size=300),
    budget=st.integers(0, 8 << 30),
)
def test_what_is_chosen_fits_into_one_segment(sizes: list[int], budget: int) -> None:
    segments = [(digest(str(number)), size) for number, size in enumerate(sizes)]
    chosen = choose(segments, budget)
    policy = merging.POLICY
    assert len(set(chosen)) == len(chosen) <= MAX_INPUTS and set(chosen) <= set(segments)
    assert len(chosen) != 1 and sum(size for _, size in chosen) <= policy.cap
    tiers = [policy.tier(size) for _, size in segments if size <= policy.cap // 2]
    most = max((tiers.count(tier) for tier in set(tiers)), default=0)
    if not chosen and budget >= policy.cap:
        assert most < policy.fan, "a size has its number full, and there is budget"
    if sum(size for _, size in chosen) > budget:
        assert most >= 2 * policy.fan
    if most >= 2 * policy.fan:
        assert chosen, "their number is bounded, whatever the budget"


@pytest.mark.parametrize("stored_each", [0, 1 << 20, 1 << 40])
def test_thousands_of_backups_leave_few_segments_and_each_entry_is_written_seldom(stored_each: int) -> None:
    chance = random.Random(3)
    segments: list[tuple[bytes, int]] = []
    added = written = 0
    for number in range(6000):
        size = chance.choice([12 << 10, 16 << 10, 200 << 10, chance.randrange(12 << 10, 9 << 20)])
        segments.append((digest(str(number)), size))
        added += size
        budget = max(merging.BUDGET * stored_each, merging.MIN_BUDGET)
        while chosen := choose(segments, budget):
            total = sum(size for _, size in chosen)
            budget -= total
            written += total
            segments = [segment for segment in segments if segment not in chosen]
            segments.append((digest(f"merged {number} {budget}"), total))
        assert len(segments) < 2 * merging.POLICY.fan * 5
    tiers = merging.POLICY.tier(merging.POLICY.cap) + 1
    assert added > 2 * merging.POLICY.cap and tiers == 5 and written <= tiers * added


# --- what is merged ---------------------------------------------------------------------------


def test_the_result_is_the_union(lab: Lab) -> None:
    chance = random.Random(5)
    packs = [f"pack {number}" for number in range(8)]
    present = set(packs[:5])
    truth: dict[bytes, set[Place]] = {}
    for _ in range(9):
        places = {}
        for _ in range(chance.choice([1, 50, 127, 128, 700])):
            pack = chance.choice(packs)
            places |= blocks([chance.randrange(2000)], pack)
        put(lab.repository, places)
        for identity, place in places.items():
            truth.setdefault(identity, set())
            if place[0] in {digest(pack) for pack in present}:
                truth[identity].add(place)
    repository, known = load(lab, present)
    done = merge_all(repository, known)
    assert (done.read, done.written, done.damaged) == (9, 1, 0) and done.dropped > 0
    assert lab.paths("index")[0].stat().st_size == done.bytes_written
    assert len(lab.paths("index")) == len(known.loaded) == 1
    there = found(repository, known, truth)
    assert set(there) == {identity for identity, places in truth.items() if places}
    assert all(there[identity] in truth[identity] for identity in there)
    assert known.count(b"".join(truth)) == len(there)
    assert found(*load(lab, present), truth) == there


def test_a_lost_pack_stays_known_of_until_it_is_forgotten(lab: Lab) -> None:
    for number in range(3):
        put(lab.repository, blocks(range(number * 10, number * 10 + 10), f"pack {number}"))
    repository, known = load(lab, {"pack 0"})
    lost = sorted([digest("pack 1"), digest("pack 2")])
    assert missing.packs(repository) == lost
    merge_all(repository, known)
    repository, known = load(lab, {"pack 0"})
    assert missing.packs(repository) == lost and known.loaded[0][1] == 10
    assert merging.forget(repository, known, [digest("pack 3")]) == Merged()
    assert merging.forget(repository, known, [digest("pack 1")]).written == 1
    repository, known = load(lab, {"pack 0"})
    assert missing.packs(repository) == [digest("pack 2")]
    assert found(repository, known, blocks(range(30))) == blocks(range(10), "pack 0")
    merging.forget(repository, known, [digest("pack 0"), digest("pack 2")])
    assert lab.paths("index") == [], "nothing is left to say"


def test_an_index_is_thinned_of_packs_that_are_gone(lab: Lab) -> None:
    lab.backup(sda=noise(300), pack_blocks=100)
    lab.backup(name="other", sda=noise(30, seed=1))
    gone = next(path for path in lab.paths("packs") if path.stat().st_size > 50 * 4096)
    gone.unlink()
    before = {path.name for path in lab.paths("index")}
    done = index.thin(lab.reopen(), Silent())
    assert (done.read, done.written, done.dropped) == (1, 1, 100)
    assert len(before & {path.name for path in lab.paths("index")}) == 1
    repository = lab.reopen()
    index.load(repository)
    repository.packs_present()
    assert missing.packs(repository) == []
    assert index.thin(repository, Silent()) == Merged()


def test_a_damaged_page_costs_its_entries_and_is_told(lab: Lab) -> None:
    for number in range(4):
        put(lab.repository, blocks(range(number * 100, number * 100 + 100)))
    path = lab.paths("index")[0]
    data = bytearray(path.read_bytes())
    data[8192 + 50] ^= 1
    path.write_bytes(data)
    repository, known = load(lab)
    reporter = Silent()
    done = merging.tend(repository, known, reporter, stored=0, policy=TINY)
    assert done.damaged == 1 and len(reporter.warnings) == 1
    assert len(found(repository, known, blocks(range(400)))) == 300
    assert [path.name for path in lab.paths("index")] == [name.hex() for name, _, _ in known.loaded]


def test_merging_by_size_as_backups_go_on(lab: Lab) -> None:
    reporter = Silent()
    for number in range(40):
        put(lab.repository, blocks(range(number * 5, number * 5 + 5)))
        repository, known = load(lab)
        done = merging.tend(repository, known, reporter, stored=0, policy=TINY)
        assert len(lab.paths("index")) == len(known.loaded) < 8
        assert done.read == 0 or done.written == 1
    assert found(repository, known, blocks(range(200))) == blocks(range(200)) and not reporter.warnings


def test_a_storage_that_keeps_all_is_left_alone(lab: Lab) -> None:
    for number in range(20):
        put(lab.repository, blocks([number]))
    repository, known = load(lab)
    repository.storage.append_only = True  # type: ignore[attr-defined]
    assert merging.tend(repository, known, Silent(), stored=0) == Merged()
    assert len(lab.paths("index")) == 20


def test_threads_of_one_process_do_not_merge_the_same(lab: Lab) -> None:
    for number in range(60):
        put(lab.repository, blocks(range(number * 5, number * 5 + 5)))
    repository, known = load(lab)
    reporter = Silent()

    def work() -> None:
        for _ in range(20):
            merging.tend(repository, known, reporter, stored=0, policy=TINY)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not reporter.warnings and len(lab.paths("index")) == len(known.loaded) < 8
    assert len(found(repository, known, blocks(range(300)))) == 300


def test_what_goes_wrong_leaves_the_index_as_it_was(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(8):
        put(lab.repository, blocks(range(number * 9, number * 9 + 9)))
    before = {path: path.read_bytes() for path in lab.paths("index")}
    repository, known = load(lab)

    def fails(self: FolderStaged, name: str) -> None:
        self.discard()
        raise StorageError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(FolderStaged, "publish", fails)
        reporter = Silent()
        assert merging.tend(repository, known, reporter, stored=0) == Merged()
        assert reporter.warnings == ["the index was not merged: no space left"]
    with monkeypatch.context() as patch:
        full = os.open("/dev/full", os.O_RDWR)
        patch.setattr(FolderStorage, "stage", lambda self: FolderStaged(self, full, None))
        reporter = Silent()
        assert merging.tend(repository, known, reporter, stored=0) == Merged()
        assert "No space left" in reporter.warnings[0]
    assert {path: path.read_bytes() for path in lab.paths("index")} == before
    assert len(found(repository, known, blocks(range(72)))) == 72
    assert merging.tend(repository, known, Silent(), stored=0).written == 1


def test_a_long_run_merges_what_it_writes(lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(index, "SEGMENT_ENTRIES", 40)
    monkeypatch.setattr(imaging, "SEGMENT", 64 << 10)
    monkeypatch.setattr(imaging, "PACK_TARGET", 1)
    image = tmp_path / "image"
    image.write_bytes(noise(2000))
    most = 0
    merge = merging.merge

    def counted(*arguments: object) -> Merged:
        nonlocal most
        most = max(most, len(lab.paths("index")))
        return merge(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(merging, "merge", counted)
    repository = lab.reopen()
    options = BackupOptions(block_size=4096, name="d")
    summary = backup.execute(repository, backup.plan(repository, [str(image)], options, Silent()), Silent())
    assert summary.images[0].blocks_new == 2000 and most == 8 and len(lab.paths("index")) < 16
    repository = lab.reopen()
    repository.packs_present()
    known = index.load(repository)
    content = image.read_bytes()
    ids = b"".join(repository.vault.block_id(content[at : at + 4096]) for at in range(0, len(content), 4096))
    assert known.count(ids) == 2000


# --- beside others ----------------------------------------------------------------------------


class Racing(FolderStorage):
    """Another process merges all segments between a listing and the first opening of one."""

    rounds = 1
    credentials: Credentials

    def open(self, name: str) -> int:
        if name.startswith(INDEX) and self.rounds:
            self.rounds -= 1
            other = FolderStorage(self.root)
            with Repository.open(other, self.credentials, writing=True) as repository:
                put(repository, blocks([10_000 + self.rounds]))
                merge_all(repository, index.load(repository))
        return super().open(name)


@pytest.mark.parametrize("rounds", [1, 3])
def test_who_finds_a_segment_gone_lists_them_anew(lab: Lab, rounds: int) -> None:
    for number in range(5):
        put(lab.repository, blocks(range(number * 10, number * 10 + 10)))
    storage = Racing(str(lab.root))
    storage.credentials = lab.credentials()
    storage.rounds = rounds
    repository = Repository.open(storage, lab.credentials(), writing=True)
    reporter = Silent()
    known = index.load(repository, reporter)
    assert known.count(b"".join(blocks(range(50)))) == 50 and storage.rounds == 0 and not reporter.warnings
    repository.close()


def test_two_who_merge_the_same_make_the_same(lab: Lab) -> None:
    for number in range(5):
        put(lab.repository, blocks(range(number * 10, number * 10 + 10)))
    first = Repository.open(FolderStorage(str(lab.root)), lab.credentials(), writing=True)
    second = Repository.open(FolderStorage(str(lab.root)), lab.credentials(), writing=True)
    mine, theirs = index.load(first), index.load(second)
    put(first, blocks(range(500, 510)))
    merge_all(first, mine)
    assert merge_all(second, theirs).read == 5, "the name is taken, by the same bytes"
    assert len(lab.paths("index")) == 2
    # One of them goes on while the other has only begun: all is still there.
    third = index.load(first)
    merge_all(first, third)
    merge_all(second, theirs)
    repository, known = load(lab)
    ids = [*blocks(range(50)), *blocks(range(500, 510))]
    assert len(found(repository, known, ids)) == 60
    for one in (first, second):
        one.close()


def test_a_taken_name_that_lies_costs_nothing(lab: Lab) -> None:
    """Where a torn object stands under the name of the merged segment, what was to be merged stays."""
    for number in range(8):
        put(lab.repository, blocks(range(number * 20, number * 20 + 20)))
    before = lab.paths("index")
    whole = segment_of(lab.repository, blocks(range(160)))
    torn = bytearray(whole)
    torn[8192 + 60] ^= 1
    (lab.root / segment_name(whole)).write_bytes(torn)
    repository, known = load(lab)
    known.unload([bytes.fromhex(segment_name(whole).removeprefix(INDEX))])
    reporter = Silent()
    merging.tend(repository, known, reporter, stored=0)
    assert len(reporter.warnings) == 1 and "damaged or swapped" in reporter.warnings[0]
    assert set(before) < set(lab.paths("index"))


WORKER = """
import sys, random
from imager.events import Silent
from imager.repository import index, merging
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.storage.folder import FolderStorage
from tests.unit.repository.segment_making import blocks, digest, put

root, key, number, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
repository = Repository.open(FolderStorage(root), Credentials(keyfile=key, interactive=False), writing=True)
policy = merging.Policy(base=32 << 10, fan=4)
for turn in range(rounds):
    mine = range(number * 100_000 + turn * 7, number * 100_000 + turn * 7 + 7)
    put(repository, blocks(mine))
    print(mine.start, flush=True)
    reporter = Silent()
    known = index.load(repository, reporter)
    merging.tend(repository, known, reporter, stored=0, policy=policy)
    assert not reporter.warnings, reporter.warnings
    everything = b"".join(b"".join(blocks(range(number * 100_000 + t * 7, number * 100_000 + t * 7 + 7)))
                          for t in range(turn + 1))
    lost = (turn + 1) * 7 - index.load(repository).count(everything)
    assert not lost, f"{lost} entries are lost after {turn} rounds"
"""


def worker(lab: Lab, number: int, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(lab.root), str(lab.keyfile), str(number), str(rounds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_several_write_and_merge_at_once(lab: Lab) -> None:
    workers = [worker(lab, number, 40) for number in range(3)]
    ended = [(one.communicate(), one.returncode) for one in workers]
    assert [code for _, code in ended] == [0, 0, 0], ended
    _, known = load(lab)
    told = [int(line) for (out, _), _ in ended for line in out.splitlines()]
    assert len(told) == 120
    assert known.count(b"".join(b"".join(blocks(range(at, at + 7))) for at in told)) == 840
    assert len(lab.paths("index")) < 24


def test_killed_at_any_moment_nothing_is_lost(lab: Lab) -> None:
    chance = random.Random(11)
    told: list[int] = []
    for number in range(12):
        one = worker(lab, number, 1000)
        assert one.stdout is not None
        told.append(int(one.stdout.readline()))
        time.sleep(chance.random() / 8)
        one.send_signal(signal.SIGKILL)
        rest, _ = one.communicate()
        told += [int(line) for line in rest.splitlines()]
    repository, known = load(lab)
    assert known.count(b"".join(b"".join(blocks(range(at, at + 7))) for at in told)) == 7 * len(told)
    assert len(told) > 24
    reporter = Silent()
    merging.tend(repository, known, reporter, stored=0, policy=TINY)
    assert not reporter.warnings and len(segment_names(repository)) < 24
    assert repository.storage.sweep() == [] and lab.paths("tmp") == []
