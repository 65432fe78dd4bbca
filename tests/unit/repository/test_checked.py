"""What was not read for the longest time is read first, and nothing waits for ever."""

from __future__ import annotations

import os
import random
import tempfile
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager.events import Silent
from imager.repository import checked
from imager.repository.check import Summary, check
from imager.repository.checked import WHOLE, Wish, as_share, parse_wish
from imager.repository.credentials import Credentials
from imager.repository.format import canonical, now
from imager.repository.keyless import open_keyless
from imager.repository.repository import Repository
from imager.storage.errors import StorageError
from imager.storage.folder import FolderStorage
from tests.unit.repository.building import Lab, noise
from tests.workbench import MEMORY, state_in

Sizes = dict[str, int]


def packs(number: int, chance: random.Random) -> Sizes:
    names = [chance.randbytes(32).hex() for _ in range(number)]
    return {f"packs/{name[:2]}/{name}": chance.randrange(1, 1 << 26) for name in names}


def run(repository: Repository, sizes: Sizes, wish: str) -> list[str]:
    """One run of a check, as far as the record goes: what it chose."""
    record = checked.load(repository)
    chosen = record.choose(sizes, parse_wish(wish))
    assert len(chosen) == len(set(chosen)) and set(chosen) <= set(sizes)
    record.keep(record.share_of(parse_wish(wish), sizes), chosen, sizes)
    assert not record.notes
    return chosen


def repository_in(folder: str) -> Repository:
    storage = FolderStorage(os.path.join(folder, "repo"))
    return Repository.init(storage, Credentials(interactive=False), encryption="none")


def test_wishes() -> None:
    assert parse_wish("all") == parse_wish("100%") == parse_wish("7/7") == Wish(Fraction(1))
    assert parse_wish("1/30") == Wish(Fraction(1, 30)) and parse_wish("2.5%") == Wish(Fraction(1, 40))
    assert parse_wish("5G") == Wish(None, 5 << 30)
    for parts in (1, 3, 7, 30, 1000):
        assert parts * as_share(Fraction(1, parts)) >= WHOLE


@settings(max_examples=40, deadline=None)
@given(parts=st.integers(2, 9), number=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_m_runs_of_one_mth_read_every_pack_that_stays(parts: int, number: int, seed: int) -> None:
    """However many others come and go, and whichever part of the data they are."""
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, state_in(Path(folder)):
        repository = repository_in(folder)
        sizes = packs(number, chance)
        history: list[tuple[set[str], set[str]]] = []
        for _ in range(3 * parts):
            chosen = run(repository, sizes, f"1/{parts}")
            history.append((set(sizes), set(chosen)))
            for _ in range(chance.choice((0, 0, 1, 5))):
                sizes |= packs(chance.randrange(1, 12), chance)
            for name in chance.sample(sorted(sizes), len(sizes) // chance.choice((2, 5, 100))):
                if len(sizes) > 1:
                    del sizes[name]
        for at in range(len(history) - parts + 1):
            window = history[at : at + parts]
            stayed = set.intersection(*(there for there, _ in window))
            read = set.union(*(chosen for _, chosen in window))
            assert stayed <= read, (at, len(stayed - read))


def test_a_share_is_no_more_than_it_says(tmp_path: Path) -> None:
    """Where nothing comes and goes, a run reads its share and an eighth, give or take a pack."""
    repository = repository_in(str(tmp_path))
    sizes = packs(400, random.Random(1))
    total, largest = sum(sizes.values()), max(sizes.values())
    read: list[int] = []
    for _ in range(40):
        read.append(sum(sizes[name] for name in run(repository, sizes, "1/20")))
        assert total / 20 * 0.9 <= read[-1] <= total / 20 * 1.35 + 3 * largest
    assert sum(read) <= 40 * (total / 20 * 1.125 + 2 * largest)
    for wish, most in (("50M", 50 << 20), ("5G", 5 << 30)):
        assert sum(sizes[name] for name in run(repository, sizes, wish)) <= most + 2 * largest


def test_amounts_begin_with_the_oldest(tmp_path: Path) -> None:
    repository = repository_in(str(tmp_path))
    sizes = packs(64, random.Random(2))
    sizes = dict.fromkeys(sizes, 1 << 20)
    seen: set[str] = set()
    for turn in range(1, 9):
        chosen = run(repository, sizes, "8M")
        assert len(chosen) == 8
        seen |= set(chosen)
        assert len(seen) >= 7 * turn
    for _ in range(2):
        seen |= set(run(repository, sizes, "8M"))
    assert seen == set(sizes)


def test_who_tampers_cannot_keep_a_pack_from_being_read(tmp_path: Path) -> None:
    """A record that says again and again that one pack was read a moment ago."""
    repository = repository_in(str(tmp_path))
    sizes = dict.fromkeys(packs(30, random.Random(3)), 1)
    victim = min(sizes)
    for turn in range(400):
        lie = {"time": now(), "share": 0, "read": victim[-64:][:16], "seen": ""}
        raw = canonical({"repository": repository.config.repository, "runs": [lie], "version": 1})
        repository.storage.create(f"checked/{turn:032x}", raw)
        if victim in run(repository, sizes, "1/10"):
            break
    else:
        raise AssertionError("it was never read")


def test_the_future_counts_for_nothing(tmp_path: Path) -> None:
    repository = repository_in(str(tmp_path))
    sizes = dict.fromkeys(packs(20, random.Random(4)), 1)
    all_of_them = "".join(name[-64:][:16] for name in sizes)
    lie = {"time": now() + 10**15, "share": WHOLE, "read": all_of_them, "seen": ""}
    raw = canonical({"repository": repository.config.repository, "runs": [lie], "version": 1})
    repository.storage.create("checked/" + "ab" * 16, raw)
    record = checked.load(repository)
    assert not record.read and not record.shares


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff" * 99, b'{"repository":"x","runs":[],"version":1}'])
def test_damaged_records_are_passed_over(tmp_path: Path, raw: bytes) -> None:
    repository = repository_in(str(tmp_path))
    sizes = packs(10, random.Random(5))
    run(repository, sizes, "1/2")
    repository.storage.create("checked/" + "cd" * 16, raw)
    repository.storage.create("checked/not-ours", b"?")
    record = checked.load(repository)
    assert len(record.read) >= 1
    assert bool(record.notes) == (b"repository" not in raw)


def test_many_records_become_one(tmp_path: Path) -> None:
    repository = repository_in(str(tmp_path))
    sizes = packs(50, random.Random(6))
    most = 0
    for _ in range(100):
        run(repository, sizes, "1/25")
        most = max(most, len(repository.storage.list_names("checked/")))
    assert most <= 16
    assert all(checked.load(repository).last_read(name) for name in sizes)


def test_parallel_checkers_add_up(tmp_path: Path) -> None:
    repository = repository_in(str(tmp_path))
    sizes = packs(40, random.Random(7))
    one, two = checked.load(repository), checked.load(repository)
    for record in (one, two):
        chosen = record.choose(sizes, parse_wish("1/4"))
        record.keep(as_share(Fraction(1, 4)), chosen, sizes)
    together = checked.load(repository)
    assert together.read.keys() == one.read.keys() | two.read.keys()
    assert sum(together.shares.values()) >= WHOLE // 2


class ReadOnly(FolderStorage):
    def create(self, name: str, data: bytes) -> None:
        raise StorageError(f"writing {name} failed: this repository is served read-only")


class AppendOnly(FolderStorage):
    def delete(self, name: str) -> None:
        raise StorageError(f"deleting {name} is refused")


def test_a_repository_that_cannot_be_written_is_remembered_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "here"))
    repository_in(str(tmp_path))
    sizes = packs(30, random.Random(8))
    root = str(tmp_path / "repo")
    for _ in range(5):
        run(open_keyless(ReadOnly(root)), sizes, "1/5")
    record = checked.load(open_keyless(ReadOnly(root)))
    assert all(record.last_read(name) for name in sizes)
    assert not (tmp_path / "repo" / "checked").exists()
    # Of another place, or on another machine, nothing is known of that.
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "elsewhere"))
    assert not checked.load(open_keyless(ReadOnly(root))).read
    # Where not even that works it is said, and the check itself is none the worse.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "file"))
    record = checked.load(open_keyless(ReadOnly(root)))
    record.keep(1, list(sizes), sizes)
    assert "cannot begin with the oldest" in record.notes[0]


def test_an_append_only_repository_keeps_few_large_records(tmp_path: Path) -> None:
    repository_in(str(tmp_path))
    repository = open_keyless(AppendOnly(str(tmp_path / "repo")))
    sizes = packs(200, random.Random(9))
    for _ in range(100):
        run(repository, sizes, "1/100")
    objects = [entry.size for entry in repository.storage.list("checked/")]
    assert len(objects) <= 104 and sum(size > 3000 for size in objects) <= 4


# --- in a check ------------------------------------------------------------------------------------


def checks(lab: Lab, wish: str | None, *, keyless: bool = False, ages: bool = False) -> Summary:
    repository = open_keyless(lab.storage) if keyless else lab.reopen()
    return check(repository, Silent(), read_data=wish, ages=ages)


@pytest.mark.parametrize("keyless", [False, True])
def test_a_check_tells_when_each_pack_was_read(lab: Lab, keyless: bool) -> None:
    for seed in range(9):
        lab.backup(sda=noise(40, seed=seed))
    before = now()
    summary = checks(lab, None, keyless=keyless, ages=True)
    assert (summary.packs_unread, summary.oldest_read) == (summary.packs, None)
    assert summary.ages is not None and all(age.read is None for age in summary.ages)
    read = 0
    for _ in range(5):
        summary = checks(lab, "1/5", keyless=keyless)
        read += summary.packs_read
        assert summary.packs_read < summary.packs and summary.packs_unread < summary.packs
    assert summary.packs_unread == 0 and read >= summary.packs
    summary = checks(lab, None, keyless=keyless, ages=True)
    assert summary.packs_read == 0 and summary.ages is not None
    assert {age.pack for age in summary.ages} == {
        str(path.relative_to(lab.root)) for kind in ("packs", "maps") for path in lab.paths(kind)
    }
    assert summary.oldest_read is not None and before < summary.oldest_read < now()


def test_a_damaged_pack_is_read_again_by_the_next_run(lab: Lab) -> None:
    """It is no news that it is damaged, but it must not fall silent."""
    for seed in range(9):
        lab.backup(sda=noise(40, seed=seed))
    path = lab.paths("packs")[4]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    name = str(path.relative_to(lab.root))
    told = [any(problem.object == name for problem in checks(lab, "1/6").problems) for _ in range(12)]
    assert any(told[:6])
    first = told.index(True)
    assert any(told[first + 1 :]), "and again"
    assert checked.load(lab.reopen()).last_read(name) is None


def test_a_check_that_is_stopped_was_not_in_vain(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(6):
        lab.backup(sda=noise(10, seed=seed))

    class Stopping(Silent):
        left = 5

        def advance(self, done: int, *, stored: int = 0) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(lab.reopen(), Stopping(), read_data="all")
    record = checked.load(lab.reopen())
    assert len(record.read) == 5 and sum(record.shares.values()) == 0
