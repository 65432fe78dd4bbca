"""A copy has the same sets, bit for bit; nothing damaged gets there; and whatever stops it, it goes on."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager import _native
from imager.errors import IntegrityError, UsageError, WrongKey
from imager.events import Silent
from imager.repository import check as checking
from imager.repository import index, sessions, sync
from imager.repository.blockmap import MapReader
from imager.repository.credentials import Credentials
from imager.repository.format import now
from imager.repository.imageset import Image, list_sets, parse_time, read_set
from imager.repository.keyless import Keyless, open_keyless
from imager.repository.public import Place, parse_page
from imager.repository.repository import Repository
from imager.repository.sync import SyncSummary, Wishes
from imager.repository.transfer import copy_packs
from imager.storage.errors import StorageError
from imager.storage.folder import FolderStorage
from tests.unit.repository.building import BLOCK, Lab, noise


def copy(lab: Lab, target: Path, **wishes: object) -> SyncSummary:
    """One sync without a key."""
    with open_keyless(FolderStorage(str(lab.root))) as source:
        return sync.sync(source, FolderStorage(str(target)), Wishes(**wishes), Silent())  # type: ignore[arg-type]


def as_lab(lab: Lab, root: Path) -> Lab:
    """The copy, opened with the keys of the original."""
    credentials = Credentials(keyfile=str(lab.keyfile), interactive=False)
    repository = Repository.open(FolderStorage(str(root)), credentials, writing=True)
    return Lab(root, lab.keyfile, lab.encryption, repository, lab.images)


def is_whole(lab: Lab, root: Path, sets: list[str], *, dying: bool = False) -> None:
    """The copy has these sets, and `check` and every block say that they are whole."""
    from tests.unit.repository.test_check import restored

    other = as_lab(lab, root)
    try:
        summary = checking.check(other.repository, Silent(), read_data="all")
        # Killed between a set and its announcement, which decides nothing: the next sync copies it.
        problems = [one for one in summary.problems if one.kind != "session" or not dying]
        assert not problems and summary.sets == len(sets), summary
        for set_id in sets:
            assert restored(other, set_id) == []
    finally:
        other.repository.close()


def three(lab: Lab) -> list[str]:
    """Three sets of one lineage, and one of another."""
    data = bytearray(noise(600))
    data[100 * BLOCK : 200 * BLOCK] = bytes(100 * BLOCK)
    ids = [lab.backup(sda=bytes(data)).id]
    for seed in (1, 2):
        data[300 * BLOCK : 320 * BLOCK] = noise(20, seed=seed)
        ids.append(lab.backup(sda=bytes(data)).id)
    ids.append(lab.backup("other", sdb=noise(40, seed=9) + bytes(data[: 30 * BLOCK])).id)
    return ids


def objects(root: Path, *kinds: str) -> dict[str, bytes]:
    paths = (path for kind in kinds for path in (root / kind).rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in paths}


SAME = ("slots", "epochs", "sets", "sessions", "packs", "maps")


def test_a_copy_is_the_same_repository(lab: Lab, tmp_path: Path) -> None:
    ids = three(lab)
    done = copy(lab, tmp_path / "copy")
    assert (done.created, list(done.sets), done.present, done.ok) == (True, ids, 0, True)
    assert objects(lab.root, *SAME) == objects(tmp_path / "copy", *SAME)
    assert (lab.root / "config").read_bytes() == (tmp_path / "copy" / "config").read_bytes()
    is_whole(lab, tmp_path / "copy", ids)
    # Every block is in the index of the copy: a backup into it stores nothing twice.
    other = as_lab(lab, tmp_path / "copy")
    known = index.load(other.repository)
    for name in other.repository.pack_names(1):
        fd = other.repository.open_object(other.repository.names.intern(name))
        assert all(known.find(one[1]) for one in _native.pack_records(fd, name, other.repository.id))
        os.close(fd)


def test_a_second_sync_copies_what_is_new_and_nothing_else(lab: Lab, tmp_path: Path) -> None:
    three(lab)
    copy(lab, tmp_path / "copy")
    again = copy(lab, tmp_path / "copy")
    assert (again.packs, again.maps, again.objects, again.bytes, again.sets) == (0, 0, 0, 0, ())
    before = {path.name for kind in ("packs", "maps") for path in lab.paths(kind)}
    data = bytearray(next(iter(lab.images.values()))["sda"])
    data[:BLOCK] = noise(1, seed=77)
    new = lab.backup(sda=bytes(data)).id
    after = {path.name for kind in ("packs", "maps") for path in lab.paths(kind)}
    done = copy(lab, tmp_path / "copy")
    assert list(done.sets) == [new] and done.packs + done.maps == len(after - before)
    is_whole(lab, tmp_path / "copy", list(lab.images))


def test_choices_of_sets(lab: Lab, tmp_path: Path) -> None:
    ids = three(lab)
    cases: dict[str, tuple[dict[str, object], list[str]]] = {
        "set": ({"sets": (ids[1],)}, [ids[1]]),
        "prefix": ({"sets": (ids[1][:8], ids[3][:12])}, [ids[1], ids[3]]),
        "latest": ({"latest": 1}, [ids[2], ids[3]]),
        "latest 2": ({"latest": 2}, [ids[1], ids[2], ids[3]]),
        "since": ({"since": read_set(lab.repository, ids[2]).created}, [ids[2], ids[3]]),
        "since the future": ({"since": now() + 10**9}, []),
        "both": ({"latest": 1, "sets": (ids[0], ids[1])}, [ids[1]]),
    }
    for name, (wishes, wanted) in cases.items():
        done = copy(lab, tmp_path / name, **wishes)
        assert list(done.sets) == wanted, name
        is_whole(lab, tmp_path / name, wanted)
    # Only what the chosen set needs came along, and the rest comes when it is asked for.
    assert len(objects(tmp_path / "set", "packs")) < len(lab.paths("packs"))
    assert set(copy(lab, tmp_path / "set").sets) == {ids[0], ids[2], ids[3]}
    is_whole(lab, tmp_path / "set", ids)
    for wrong in ("abcd" * 8, "12", "zz"):
        with pytest.raises(UsageError):
            copy(lab, tmp_path / "never", sets=(wrong,))
    assert not (tmp_path / "never").exists()


def test_names_and_tags_need_a_key(make_lab: Callable[[str], Lab], tmp_path: Path) -> None:
    lab = make_lab("keyfile")
    ids = three(lab)
    with pytest.raises(WrongKey):
        copy(lab, tmp_path / "copy", names=("other",))
    target = FolderStorage(str(tmp_path / "copy"))
    assert sync.sync(lab.reopen(), target, Wishes(names=("other",)), Silent()).sets == (ids[3],)
    assert sync.sync(lab.reopen(), target, Wishes(tags=("none",)), Silent()).sets == ()


def test_without_a_key_nothing_can_be_read(make_lab: Callable[[str], Lab]) -> None:
    lab = make_lab("keyfile")
    three(lab)
    with open_keyless(FolderStorage(str(lab.root))) as repository:
        assert isinstance(repository, Keyless)
        assert all(one.body is None for one in list_sets(repository).sets)
        with pytest.raises(WrongKey):
            repository.session_key(bytes(104))


def test_another_repository_is_no_target(lab: Lab, make_lab: Callable[[str], Lab], tmp_path: Path) -> None:
    three(lab)
    other = make_lab("none")
    with pytest.raises(UsageError, match="another repository"):
        copy(lab, other.root)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        copy(lab, tmp_path / "full")
    copy(lab, tmp_path / "copy")
    config = tmp_path / "copy" / "config"
    raw = config.read_bytes()
    config.write_bytes(raw.replace(b'"block_size":0', b'"block_size":4096'))
    with pytest.raises(IntegrityError):
        copy(lab, tmp_path / "copy")


def test_aborted_sessions_stay_aborted(lab: Lab, tmp_path: Path) -> None:
    from imager.repository.format import canonical

    three(lab)
    dead = os.urandom(16).hex()
    mark = b"IMGRABRT" + canonical({"created": 1, "reason": "test", "session": dead})
    lab.storage.create(f"sets/{dead}", mark)
    copy(lab, tmp_path / "copy")
    assert (tmp_path / "copy" / "sets" / dead).read_bytes() == mark


def test_what_the_copy_has_more_stays(lab: Lab, tmp_path: Path) -> None:
    ids = three(lab)
    copy(lab, tmp_path / "copy")
    for kind in ("sets", "sessions"):
        (lab.root / kind / ids[0]).unlink()
    done = copy(lab, tmp_path / "copy")
    assert done.ok and any("gone in the source" in note for note in done.notes)
    assert (tmp_path / "copy" / "sets" / ids[0]).exists()


# --- damage ------------------------------------------------------------------------------------


def flip(path: Path, share: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(share * (len(data) - 1))] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.8, 0.99])
def test_a_damaged_epoch_is_not_copied(make_lab: Callable[[str], Lab], tmp_path: Path, share: float) -> None:
    lab = make_lab("keyfile")
    three(lab)
    (path,) = lab.paths("epochs")
    good = path.read_bytes()
    flip(path, share)
    done = copy(lab, tmp_path / "copy")
    assert not done.ok and not (tmp_path / "copy" / "epochs" / path.name).exists()
    path.write_bytes(good)
    assert copy(lab, tmp_path / "copy").ok and (tmp_path / "copy" / "epochs" / path.name).exists()


@pytest.mark.parametrize("kind", ["packs", "maps", "sets"])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.8, 0.99])
def test_damage_is_not_copied(lab: Lab, tmp_path: Path, kind: str, share: float) -> None:
    from tests.unit.repository.test_check import restored

    ids = three(lab)
    paths = lab.paths(kind)
    path = paths[len(paths) // 2]
    good = path.read_bytes()
    flip(path, share)
    done = copy(lab, tmp_path / "copy")
    name = str(path.relative_to(lab.root))
    assert not done.ok and not (tmp_path / "copy" / name).exists()
    assert all(name in item.object or name.rpartition("/")[2] in item.reason for item in done.refused), done
    # What was copied is whole, and what was not is exactly what the damage hurts.
    hurt = {item.object.removeprefix("sets/") for item in done.refused if item.object.startswith("sets/")}
    assert hurt and hurt | set(done.sets) == set(ids)
    other = as_lab(lab, tmp_path / "copy")
    for set_id in done.sets:
        assert restored(other, set_id) == []
    path.write_bytes(good)
    assert copy(lab, tmp_path / "copy").ok
    is_whole(lab, tmp_path / "copy", ids)


def test_a_missing_pack_is_named_before_anything_is_copied(lab: Lab, tmp_path: Path) -> None:
    ids = three(lab)
    hit = lab.paths("packs")[0]
    hit.unlink()
    with open_keyless(FolderStorage(str(lab.root))) as source:
        plan = sync.plan(source, FolderStorage(str(tmp_path / "copy")), Wishes())
    assert plan.refused and {item.object for item in plan.refused} <= {f"sets/{one}" for one in ids}
    assert all(hit.name in item.reason for item in plan.refused)
    assert not (tmp_path / "copy").exists()
    done = copy(lab, tmp_path / "copy")
    assert set(done.sets) | {item.object[5:] for item in done.refused} == set(ids)


def test_blocks_that_a_prune_moved_are_found_through_the_index(lab: Lab, tmp_path: Path) -> None:
    """The pack that maps name is gone; another one of the same blocks is there."""
    data = noise(60)
    first = lab.backup(sda=data).id
    old = lab.paths("packs")[0]
    other = lab.root / "aside"
    shutil.move(old, other)
    for segment in lab.paths("index"):
        segment.unlink()
    second = lab.backup("again", sda=data).id
    done = copy(lab, tmp_path / "copy")
    assert set(done.sets) == {first, second}, done
    assert not (tmp_path / "copy" / old.relative_to(lab.root)).exists()


def test_a_plan_that_is_made_anew_looks_at_the_index_anew(lab: Lab, tmp_path: Path) -> None:
    """Prunes of the source move blocks on and on; what one plan found there is not where the next looks."""
    from tests.unit.repository.test_prune import forget, prune

    data = bytearray(noise(600))
    ids = []
    for number in range(4):
        data[number * 40 * BLOCK : (number * 40 + 40) * BLOCK] = noise(40, seed=number + 1)
        ids.append(lab.backup(sda=bytes(data)).id)
    target = FolderStorage(str(tmp_path / "copy"))
    with open_keyless(FolderStorage(str(lab.root))) as source:
        for set_id in ids[:3]:
            forget(lab, set_id)
            _, done = prune(lab, max_unused="0%")
            assert done.packs_rewritten
            made = sync.plan(source, target, Wishes())
            assert not made.refused and ids[3] in made.sets
        assert sync.sync(source, target, Wishes(), Silent()).ok
    other = as_lab(lab, tmp_path / "copy")
    found = checking.check(other.repository, Silent(), read_data="all")
    assert found.ok and found.sets == 1, found.problems
    other.repository.close()


def test_a_prune_of_the_copy_that_ends_while_a_sync_looks(lab: Lab, tmp_path: Path) -> None:
    """It condemns before the session is announced, which so knows of it; and once the packs are listed,
    it deletes them, and then the condemnation."""
    ids = three(lab)
    root = tmp_path / "copy"
    copy(lab, root)
    forget_everything(root)

    class Racing(FolderStorage):
        looks = 0

        def list_names(self, prefix: str) -> list[str]:
            self.looks += prefix == "condemned/"
            if prefix == "condemned/" and self.looks == 2:  # The first one was for the plan.
                doomed = [[bytes.fromhex(name[-64:]) for name in super(Racing, self).list_names(kind)]
                          for kind in ("packs/", "maps/")]  # fmt: skip
                sessions.condemn(self, lab.repository.config.repository, *doomed)
            names = super().list_names(prefix)
            if prefix == "maps/":
                for name in super().list_names("condemned/"):
                    for pack in [*super().list_names("packs/"), *super().list_names("maps/")]:
                        self.delete(pack)
                    self.delete(name)
            return names

    with open_keyless(FolderStorage(str(lab.root))) as source:
        done = sync.sync(source, Racing(str(root)), Wishes(), Silent())
    assert done.ok and list(done.sets) == ids and not list((root / "condemned").iterdir())
    other = as_lab(lab, root)
    found = checking.check(other.repository, Silent(), read_data="all")
    assert found.ok and found.sets == len(ids), found.problems
    other.repository.close()


def test_a_set_that_is_forgotten_between_others_while_they_are_copied(lab: Lab, tmp_path: Path) -> None:
    """The copy tells why its chain has a gap, though the tombstone came too late to be copied."""
    from tests.unit.repository.test_prune import forget

    ids = three(lab)
    root = tmp_path / "copy"
    with open_keyless(FolderStorage(str(lab.root))) as source:
        made = sync.plan(source, FolderStorage(str(root)), Wishes())
        forget(lab, ids[1])
        done = sync.execute(source, FolderStorage(str(root)), Wishes(), made, Silent())
    assert done.ok and list(done.sets) == [ids[0], *ids[2:]]
    assert any(ids[1] in note for note in done.notes)
    is_whole(lab, root, [ids[0], *ids[2:]])


def test_what_was_nearly_forgotten_in_the_source_is_not_forgotten_in_the_copy(
    lab: Lab, tmp_path: Path
) -> None:
    """A forget that was killed has left a tombstone and the set: the set counts."""
    from tests.unit.repository.test_prune import forget

    ids = three(lab)
    kept = {path: path.read_bytes() for path in (lab.root / "sets" / ids[0], lab.root / "sessions" / ids[0])}
    forget(lab, ids[0])
    for path, data in kept.items():
        path.write_bytes(data)
    root = tmp_path / "copy"
    assert copy(lab, root, latest=1).ok
    is_whole(lab, root, ids[2:])
    assert copy(lab, root).ok
    is_whole(lab, root, ids)


def test_another_sync_makes_the_copy_meanwhile(lab: Lab, tmp_path: Path) -> None:
    """Between plan and execution, or while the first object is made: it goes on with that copy."""
    ids = three(lab)
    root = tmp_path / "copy"
    target = FolderStorage(str(root))
    with open_keyless(FolderStorage(str(lab.root))) as source:
        made = sync.plan(source, target, Wishes())
        assert made.creates
        assert sync.sync(source, target, Wishes(latest=1), Silent()).ok
        done = sync.execute(source, target, Wishes(), made, Silent())
    assert done.ok and sorted(ids) == sorted(path.name for path in (root / "sets").iterdir())
    is_whole(lab, root, ids)


def test_a_set_that_is_forgotten_as_soon_as_it_is_listed(lab: Lab, tmp_path: Path) -> None:
    class Racing(FolderStorage):
        def list_names(self, prefix: str) -> list[str]:
            return super().list_names(prefix) + (["sets/" + "ab" * 16] if prefix == "sets/" else [])

    ids = three(lab)
    with open_keyless(Racing(str(lab.root))) as source:
        done = sync.sync(source, FolderStorage(str(tmp_path / "copy")), Wishes(), Silent())
    assert done.ok and list(done.sets) == ids


def test_a_pack_that_vanishes_is_planned_anew(lab: Lab, tmp_path: Path) -> None:
    """The source is pruned while it is copied: the block comes from where it is now."""
    data = noise(60)
    lab.backup(sda=data)
    old = lab.paths("packs")[0]
    shutil.copy(old, tmp_path / "kept")
    old.unlink()
    for segment in lab.paths("index"):
        segment.unlink()
    lab.backup("again", sda=data)
    shutil.copy(tmp_path / "kept", old)
    target = FolderStorage(str(tmp_path / "copy"))
    with open_keyless(FolderStorage(str(lab.root))) as source:
        plan = sync.plan(source, target, Wishes())
        assert str(old.relative_to(lab.root)) in plan.packs
        old.unlink()
        done = sync.execute(source, target, Wishes(), plan, Silent())
    assert done.ok and set(done.sets) == set(lab.images)


# --- interruptions ------------------------------------------------------------------------------


class Interrupting(FolderStorage):
    """A folder that refuses the call after `calls` writing ones, as a full disk does."""

    def __init__(self, root: str, calls: int) -> None:
        super().__init__(root)
        self.left = calls
        self._count = threading.Lock()

    def _spend(self) -> None:
        with self._count:
            self.left -= 1
            if self.left < 0:
                raise StorageError("the disk is full")

    def create(self, name: str, data: bytes) -> None:
        self._spend()
        super().create(name, data)

    def stage(self):  # type: ignore[no-untyped-def]
        self._spend()
        return super().stage()


def test_it_goes_on_after_every_single_call(make_lab: Callable[[str], Lab], tmp_path: Path) -> None:
    lab = make_lab("keyfile")
    ids = three(lab)
    for calls in range(1000):
        root = tmp_path / f"copy{calls}"
        try:
            with open_keyless(FolderStorage(str(lab.root))) as source:
                sync.sync(source, Interrupting(str(root), calls), Wishes(), Silent())
        except StorageError:
            sets = sorted(path.name for path in (root / "sets").iterdir()) if root.exists() else []
            if (root / "config").exists():
                is_whole(lab, root, [one for one in ids if one in sets], dying=True)
            else:
                assert not sets
            done = copy(lab, root)
            assert done.ok and set(done.sets) == set(ids) - set(sets)
            is_whole(lab, root, ids)
            assert objects(lab.root, *SAME) == objects(root, *SAME), "nothing more and nothing less"
            known = _indexed(lab, root)
            assert known == {path.name for path in lab.paths("packs")}, "the index names every pack"
            shutil.rmtree(root)
            continue
        break
    assert calls > 20


def _indexed(lab: Lab, root: Path) -> set[str]:
    with open_keyless(FolderStorage(str(root))) as repository:
        return {name.hex() for name in index.packs_named(repository)}


def test_a_fenced_sync_does_not_trust_what_it_stored(lab: Lab, tmp_path: Path) -> None:
    """A prune of the copy declares the sync dead and deletes what no set names; it is copied again."""
    ids = three(lab)

    class Pruned(FolderStorage):
        """Fences the first session that has made sets, and deletes the packs as if it had not seen them."""

        pruned = False

        def exists(self, name: str) -> bool:
            if name.startswith("sets/") and not self.pruned and len(self.list_names("sets/")) == len(ids):
                self.pruned = True
                super().create(name, b"IMGRABRT{}")
                for pack in self.list_names("packs/")[:2]:
                    self.delete(pack)
            return super().exists(name)

    target = Pruned(str(tmp_path / "copy"))
    with open_keyless(FolderStorage(str(lab.root))) as source:
        done = sync.sync(source, target, Wishes(), Silent())
    assert target.pruned and done.ok and list(done.sets) == ids
    is_whole(lab, tmp_path / "copy", ids)


def test_while_backups_write_to_both_ends(lab: Lab, tmp_path: Path) -> None:
    three(lab)
    copy(lab, tmp_path / "copy")
    target = as_lab(lab, tmp_path / "copy")
    stop = threading.Event()
    errors: list[BaseException] = []

    def work(one: Lab, name: str) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            try:
                one.backup(name, sda=noise(30, seed=hash(name) % 1000 + turn))
            except BaseException as error:
                errors.append(error)
                return

    threads = [
        threading.Thread(target=work, args=(one, name)) for one, name in ((lab, "here"), (target, "there"))
    ]
    for thread in threads:
        thread.start()
    for _ in range(8):
        assert copy(lab, tmp_path / "copy").ok
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert copy(lab, tmp_path / "copy").ok
    target.images.update(lab.images)
    is_whole(target, tmp_path / "copy", [path.name for path in (tmp_path / "copy" / "sets").iterdir()])


def test_what_is_in_flight_is_bounded(lab: Lab, tmp_path: Path) -> None:
    for seed in range(30):
        lab.backup(f"n{seed}", sda=noise(3, seed=seed))

    class Counting(FolderStorage):
        open_now = most = 0
        _own = threading.Lock()

        def stage(self):  # type: ignore[no-untyped-def]
            staged = super().stage()
            discard = staged.discard
            with self._own:
                Counting.open_now += 1
                Counting.most = max(Counting.most, Counting.open_now)

            class Once:
                fd = staged.fd

                def publish(self, name: str) -> None:
                    staged.publish(name)

                def discard(self) -> None:
                    with Counting._own:
                        Counting.open_now -= 1
                    discard()

            return Once()

    target = Counting(str(tmp_path / "copy"))
    with target.initializing():
        target.create("config", (lab.root / "config").read_bytes())
    Counting.open_now = Counting.most = 0
    names = [str(path.relative_to(lab.root)) for path in lab.paths("packs")]
    copied = list(copy_packs(lab.storage, target, names, lab.repository.id, workers=4))
    assert {one.name for one in copied} == set(names) and all(one.problem is None for one in copied)
    assert Counting.open_now == 0 and 1 <= Counting.most <= 4


def test_verify_after_reads_back_what_was_copied(lab: Lab, tmp_path: Path) -> None:
    three(lab)
    with open_keyless(FolderStorage(str(lab.root))) as source:
        target = FolderStorage(str(tmp_path / "copy"))
        done = sync.sync(source, target, Wishes(), Silent(), verify=True)
    assert done.verified == len(lab.paths("packs") + lab.paths("maps"))

    class Lying(FolderStorage):
        """A disk that gives back another bit than it was given."""

        def move_bits(self) -> None:
            path = next(path for path in Path(self.root, "packs").rglob("*") if path.is_file())
            flip(path)

        def create(self, name: str, data: bytes) -> None:
            super().create(name, data)
            if name.startswith("sets/") and len(self.list_names("sets/")) == 1:
                self.move_bits()

    with (
        open_keyless(FolderStorage(str(lab.root))) as source,
        pytest.raises(IntegrityError, match="not what was written"),
    ):
        sync.sync(source, Lying(str(tmp_path / "bad")), Wishes(latest=1), Silent(), verify=True)


def test_since_means_the_beginning_of_what_is_named() -> None:
    assert parse_time("2026-11-22T10:00:00Z", begin=True) + 999_999 == parse_time("2026-11-22T10:00:00Z")
    assert parse_time("2026-11-22", begin=True) + 86400 * 10**6 - 1 == parse_time("2026-11-22")


# --- a copy that is pruned ---------------------------------------------------------------------


def forget_everything(root: Path) -> None:
    """As if every set of the copy had been forgotten; its packs are still there."""
    for kind in ("sets", "sessions"):
        for path in (root / kind).iterdir():
            path.unlink()


def test_condemned_packs_are_stored_again_under_another_name(lab: Lab, tmp_path: Path) -> None:
    """A prune is going to delete them, however late: a copy must not rely on them."""
    ids = three(lab)
    root = tmp_path / "copy"
    copy(lab, root)
    forget_everything(root)
    target = FolderStorage(str(root))
    doomed = [[bytes.fromhex(name[-64:]) for name in target.list_names(kind)] for kind in ("packs/", "maps/")]
    sessions.condemn(target, lab.repository.config.repository, *doomed)
    done = copy(lab, root)
    assert done.ok and list(done.sets) == ids
    for kind in ("packs", "maps"):
        for name in objects(lab.root, kind):
            (root / name).unlink()  # the late deleter
    (condemnation,) = (root / "condemned").iterdir()
    condemnation.unlink()
    for path in (root / "index").iterdir():
        path.unlink()
    other = as_lab(lab, root)
    for set_id in ids:
        manifest = read_set(other.repository, set_id)
        for image in manifest.images:
            content = lab.images[set_id][image.disk]
            assert read_through_ids(other.repository, image) == content


def read_through_ids(repository: Repository, image: Image) -> bytes:
    """The whole image, its records found by their ids where they are not in their places."""
    out = bytearray(image.size)
    reader = MapReader(repository, image)
    for first, count, slots in reader.walk():
        if isinstance(slots, int):
            continue
        for at in range(count):
            kind, identity, _, _, _ = slots.get(at)
            if kind != _native.DATA:
                continue
            place = repository.locator.find(identity, 1)
            assert place is not None
            slot = _native.Slots(1)
            slot.set_data(0, identity, *place)
            gather = _native.Gather()
            gather.add(first + at, slot)
            gather.sort()
            packs = {place[0]: repository.pack_reader(place[0])}
            ((block, data),) = _native.read_blocks(
                repository.vault, packs, gather, image_size=image.size, block_size=image.block_size
            )
            out[block * BLOCK : block * BLOCK + len(data)] = data
    return bytes(out)


def test_where_a_prune_may_sleep_packs_get_other_names(lab: Lab, tmp_path: Path) -> None:
    """It may wake up and delete what it condemned once; by that name nothing must be there again."""
    ids = three(lab)
    root = tmp_path / "copy"
    copy(lab, root, sets=(ids[3],))
    target = FolderStorage(str(root))
    sessions.announce(target, lab.repository.config.repository, "ab" * 16, host="far", kind="prune")
    before = set(objects(root, "packs", "maps"))
    assert copy(lab, root).ok
    assert set(objects(root, "packs", "maps")) & set(objects(lab.root, "packs", "maps")) == before
    other = as_lab(lab, root)
    for set_id in ids:
        for image in read_set(other.repository, set_id).images:
            assert read_through_ids(other.repository, image) == lab.images[set_id][image.disk]
    summary = checking.check(other.repository, Silent(), read_data="all")
    assert summary.ok and not summary.problems, summary
    # And it is no less a source: a copy of the copy is whole.
    again = as_lab(lab, root)
    done = copy(again, tmp_path / "third")
    assert done.ok and list(done.sets) == ids
    third = as_lab(lab, tmp_path / "third")
    for set_id in ids:
        for image in read_set(third.repository, set_id).images:
            assert read_through_ids(third.repository, image) == lab.images[set_id][image.disk]
    assert checking.check(third.repository, Silent(), read_data="all").ok


def test_what_was_forgotten_in_the_copy_stays_so(lab: Lab, tmp_path: Path) -> None:
    ids = three(lab)
    copy(lab, tmp_path / "copy")
    target = FolderStorage(str(tmp_path / "copy"))
    forget_everything(tmp_path / "copy")
    target.create(f"forgotten/{ids[0]}", b"{}")
    done = copy(lab, tmp_path / "copy")
    assert list(done.sets) == ids[1:] and any("forgotten in the copy" in note for note in done.notes)
    assert copy(lab, tmp_path / "copy", sets=(ids[0],)).sets == (ids[0],)


def test_a_prune_between_plan_and_session_is_noticed(lab: Lab, tmp_path: Path) -> None:
    """What the plan counted on is gone when the session is announced."""
    ids = three(lab)
    root = tmp_path / "copy"
    copy(lab, root, sets=tuple(ids[:2]))
    with open_keyless(FolderStorage(str(lab.root))) as source:
        target = FolderStorage(str(root))
        plan = sync.plan(source, target, Wishes())
        assert plan.relies and plan.sets == tuple(ids[2:])
        forget_everything(root)
        for kind in ("packs", "maps"):
            for path in (root / kind).rglob("*"):
                if path.is_file():
                    path.unlink()
        done = sync.execute(source, target, Wishes(), plan, Silent())
    assert done.ok and set(done.sets) == set(ids)
    is_whole(lab, root, ids)


# --- hostile pages -------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_page_is_too_hostile_to_parse(data: st.DataObject) -> None:
    """Whatever stands in a record: a page, or one clear error; lengths are bounded before they are used."""
    public = data.draw(st.binary(min_size=8, max_size=200))
    record = bytearray(b"IREC" + bytes([2, 0]) + b"\0\0" + bytes(4))
    payload = len(public).to_bytes(4, "little") + public + b"sealed"
    if data.draw(st.booleans()):
        payload = data.draw(st.binary(max_size=80))
    record += len(payload).to_bytes(4, "little") + bytes(32) + bytes(12)
    record += (_native.xxh3(bytes(record)) & 0xFFFFFFFF).to_bytes(4, "little")
    record += payload
    if data.draw(st.booleans()):
        record[data.draw(st.integers(0, len(record) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        page = parse_page(bytes(record), Place(b"p" * 32, 72, len(record), bytes(32)), public[0])
    except IntegrityError:
        return
    assert len(page.targets) <= 512 and len(page.packs) <= 512
    assert all(target.pack in page.packs for target in page.targets)


def test_what_an_interrupted_init_left_is_no_part_of_the_copy(
    make_lab: Callable[[str], Lab], tmp_path: Path
) -> None:
    """Its epoch would be in the place of the copy's own."""
    lab, other = make_lab("keyfile"), make_lab("keyfile")
    made = lab.backup(sda=noise(20))
    shutil.copytree(other.root, tmp_path / "copy")
    (tmp_path / "copy/config").unlink()
    assert copy(lab, tmp_path / "copy").ok
    for kind in ("slots", "epochs"):
        names = sorted(path.name for path in (tmp_path / "copy" / kind).iterdir())
        assert names == [path.name for path in lab.paths(kind)]
    is_whole(lab, tmp_path / "copy", [made.id])
