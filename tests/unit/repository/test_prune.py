"""Prune: what dies goes, what lives stays readable, and the storage ends with nothing else."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager import _native, reference
from imager.errors import IntegrityError, Locked, NotConfirmed, StorageError, UsageError, WrongKey
from imager.events import Silent
from imager.repository import forgetting, imageset, index, sessions, tombstones
from imager.repository.blockmap import MapReader
from imager.repository.check import check
from imager.repository.format import KIND_DATA, KIND_MAP, now, pack_object
from imager.repository.keyless import open_keyless
from imager.repository.prune import Prune, PruneOptions, PrunePlan, PruneSummary
from imager.repository.repository import Repository
from imager.repository.retention import Rules
from imager.repository.session import Session
from imager.storage.folder import FolderStorage
from tests.unit.repository.building import BLOCK, Lab, noise


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def prune(lab: Lab, reporter: Silent | None = None, **options: object) -> tuple[PrunePlan, PruneSummary]:
    """One run, as a machine without any key does it."""
    with (
        open_keyless(FolderStorage(str(lab.root)), writing=True) as repository,
        Prune(repository, PruneOptions(**options), reporter or Silent()) as work,  # type: ignore[arg-type]
    ):
        plan = work.plan()
        return plan, work.execute(plan)


def forget(lab: Lab, *ids: str) -> None:
    plan = forgetting.plan_sets(lab.repository, ids, Silent())
    forgetting.execute(lab.repository, plan, Silent())


def whole(lab: Lab) -> None:
    """Every set is there for both readers, and nothing is wrong."""
    found = check(lab.reopen(), Silent(), read_data="all")
    assert found.ok, found.problems
    listing = imageset.list_sets(lab.repository)
    keyfile = lab.keyfile.read_bytes() if lab.keyfile.exists() else None
    reader = reference.Repository(str(lab.root), keyfile=keyfile)
    for manifest in listing.sets:
        for image in reader.images(reader.resolve(manifest.id)):
            content = lab.images[manifest.id][image.disk]
            out = bytearray(len(content))
            for offset, block in reader.blocks(image):
                out[offset : offset + len(block)] = block
            assert bytes(out) == content


def records(lab: Lab) -> Iterator[tuple[str, bytes, int]]:
    """(folder, id, length) of every record that is stored."""
    for folder in ("packs", "maps"):
        for path in lab.paths(folder):
            fd = os.open(path, os.O_RDONLY)
            try:
                for _, identity, _, length in _native.pack_records(
                    fd, bytes.fromhex(path.name), lab.repository.id
                ):
                    yield folder, identity, length
            finally:
                os.close(fd)


def changed(content: bytes, blocks: Iterator[int] | range | list[int], seed: int) -> bytes:
    out = bytearray(content)
    for block in blocks:
        out[block * BLOCK : (block + 1) * BLOCK] = noise(1, seed * 10_000 + block)
    return bytes(out)


def three_sets(lab: Lab) -> list[str]:
    """The second changes every other block of the first, the third every fourth."""
    first = noise(600, seed=1)
    second = changed(first, range(0, 600, 2), 2)
    third = changed(second, range(0, 600, 4), 3)
    return [lab.backup(sda=content).id for content in (first, second, third)]


def test_nothing_to_do(lab: Lab) -> None:
    three_sets(lab)
    before = {path: path.read_bytes() for path in lab.root.rglob("*") if path.is_file()}
    plan, summary = prune(lab)
    assert (plan.unused, plan.drop, plan.rewrite, plan.busy) == (0, (), (), 0)
    assert (summary.packs_deleted, summary.packs_written, summary.condemned) == (0, 0, 0)
    assert before == {path: path.read_bytes() for path in lab.root.rglob("*") if path.is_file()}


def test_what_nobody_needs_goes_and_the_rest_moves_together(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0], ids[1])
    plan, summary = prune(lab, max_unused="0%")
    assert plan.drop or plan.rewrite
    assert summary.packs_deleted == len(plan.drop) + len(plan.rewrite) and summary.condemned == 0
    whole(lab)
    # 600 blocks of one set, and the pages of its map; each record once, nothing else.
    found = list(records(lab))
    assert len({identity for _, identity, _ in found}) == len(found)
    assert sum(folder == "packs" for folder, _, _ in found) == 600
    assert lab.paths("condemned") == [] and len(lab.paths("sessions")) == 1
    again, summary = prune(lab, max_unused="0%")
    assert (again.unused, summary.packs_deleted, summary.packs_written) == (0, 0, 0)


def test_backups_go_on_after_a_prune(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0], ids[1])
    prune(lab, max_unused="0%")
    lab.reopen()
    content = changed(lab.images[ids[2]]["sda"], [5, 300], 4)
    before = len(lab.paths("packs"))
    lab.backup(sda=content)
    whole(lab)
    # What was moved is known where it is now: two blocks are new, no more.
    new = sum(folder == "packs" for folder, _, _ in records(lab)) - 600
    assert (new, len(lab.paths("packs")) - before) == (2, 2)


def test_the_limit_says_how_much_stays_unused(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0])
    plan, summary = prune(lab, max_unused="100%")
    assert plan.rewrite == () and plan.unused > 0
    plan, summary = prune(lab, max_unused="20%")
    assert plan.left <= 0.2 * (plan.live + plan.left)
    assert plan.rewrite
    most = max(pack.unused for pack in plan.rewrite)
    # One pack less would have left too much.
    assert plan.left + most > 0.2 * plan.live
    whole(lab)


def test_a_budget_is_kept(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0], ids[1])
    options = PruneOptions(max_unused="0")
    with (
        open_keyless(FolderStorage(str(lab.root))) as repository,
        Prune(repository, options, Silent(), dry_run=True) as work,
    ):
        full = work.plan()
    assert full.copied > 0 and lab.paths("condemned") == []
    plan, summary = prune(lab, max_unused="0", max_rewrite=full.copied // 2)
    assert 0 < plan.copied <= full.copied // 2 and summary.bytes_written < full.copied
    _, summary = prune(lab, max_unused="0", max_minutes=0.0)
    assert summary.packs_rewritten == 0
    whole(lab)
    _, summary = prune(lab, max_unused="0")
    assert summary.packs_rewritten > 0
    whole(lab)


class Far(FolderStorage):
    """A storage that counts what is fetched, and from which no data pack is ever fetched whole."""

    local = False

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.near = FolderStorage(root)
        self.fetched = 0
        self.busy = threading.Semaphore(16)

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        assert self.busy.acquire(blocking=False), "more at once than was agreed"
        try:
            data = self.near.read(name, offset, length)
        finally:
            self.busy.release()
        if name.startswith("packs/"):
            self.fetched += len(data)
        return data

    def open(self, name: str) -> int:
        assert not name.startswith("packs/")
        return super().open(name)


def test_of_a_far_storage_only_what_lives_is_fetched(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0], ids[1])
    storage = Far(str(lab.root))
    options = PruneOptions(max_unused="0%")
    with (
        open_keyless(storage, writing=True) as repository,
        Prune(repository, options, Silent()) as work,
    ):
        plan = work.plan()
        work.execute(plan)
    data = sum(pack.live for pack in plan.rewrite if pack.kind == KIND_DATA)
    assert data and storage.fetched <= 1.2 * data + 10_000
    for path in lab.paths("index"):
        path.unlink()
    storage = Far(str(lab.root))
    with open_keyless(storage, writing=True) as repository:
        with Prune(repository, options, Silent()) as work:
            assert work.plan().unused == 0
        assert storage.fetched < sum(path.stat().st_size for path in lab.paths("packs")) / 10
    check(lab.reopen(), Silent(), repair=True)
    whole(lab)


# --- beside a writer ------------------------------------------------------------------------


def dead_session(lab: Lab, **kept: object) -> Session:
    """A session that has announced itself and looked around, and whose process seems to live."""
    session = Session.begin(lab.repository, host="host")
    index.look_around(session)
    return session


def test_packs_that_a_running_backup_may_count_on_stay_until_it_has_ended(lab: Lab) -> None:
    ids = three_sets(lab)
    session = dead_session(lab)
    forget(lab, ids[0], ids[1])
    before = len(lab.paths("packs"))
    plan, summary = prune(lab, max_unused="0%")
    assert summary.packs_deleted == 0 and summary.condemned == len(plan.drop) + len(plan.rewrite) > 0
    assert len(summary.waiting) == 1 and session.id[:8] in summary.waiting[0]
    assert len(lab.paths("packs")) >= before
    whole(lab)
    # A backup that starts now refers to none of the condemned packs, and nobody waits for it.
    doomed = sessions.condemned_packs(lab.storage, lab.repository.config.repository)
    lab.reopen()
    later = Session.begin(lab.repository)
    index.look_around(later)
    names = lab.repository.names
    assert doomed and not any(names.is_present(names.intern(name)) for name in doomed)
    session.abandon()
    _, summary = prune(lab, max_unused="0%")
    assert summary.packs_deleted == len(doomed) and summary.condemned == 0
    later.abandon()
    whole(lab)


def test_what_an_older_backup_refers_to_is_moved_out_of_condemned_packs(lab: Lab) -> None:
    """It found blocks in the index that nobody needed any more, and commits after they were condemned."""
    first, second = noise(300, seed=1), noise(300, seed=2)
    one = lab.backup(sda=first).id
    lab.backup(sda=second)
    writer = Lab(lab.root, lab.keyfile, lab.encryption, lab.reopen())
    lab.repository = Repository.open(lab.storage, lab.credentials(), writing=True)
    looked = index.look_around
    done: list[PruneSummary] = []

    def slow(session: Session, reporter: object = None) -> _native.Known:
        known = looked(session)
        forget(lab, one)
        done.append(prune(lab, max_unused="0%")[1])
        return known

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "look_around", slow)
        late = writer.backup("other", sda=first)  # all of it is known, and nothing is stored again
    assert done[0].packs_deleted == 0 and done[0].condemned > 0
    lab.images[late.id] = {"sda": first}
    _, summary = prune(lab, max_unused="0%")
    assert summary.condemned == 0 and summary.packs_deleted > 0 and summary.packs_written > 0
    whole(lab)
    assert lab.paths("condemned") == []
    writer.repository.close()


def test_a_fenced_writer_cannot_commit_and_leaves_nothing(lab: Lab) -> None:
    ids = three_sets(lab)
    session = dead_session(lab)
    pack = session.new_data_pack()
    content = noise(4, seed=77)
    _native.scan(
        lab.repository.vault,
        content,
        [(0, 4)],
        image_size=len(content),
        block_size=BLOCK,
        base=None,
        pack=pack,
        known=session.known,
    )
    session.seal(pack)
    session.drain()
    plan, _ = prune(lab)
    assert plan.busy == 1 and plan.drop == ()
    _, summary = prune(lab, fence=(session.id[:10],))
    assert len(summary.fenced) == 1 and summary.packs_deleted == 1
    with pytest.raises(Locked, match="a person said so"):
        session.commit(b"a manifest")
    session.abandon()
    whole(lab)
    assert {path.name for path in lab.paths("sessions")} == set(ids)
    with pytest.raises(UsageError, match="no session"):
        prune(lab, fence=(session.id,))


def test_sessions_whose_process_is_gone_are_fenced_without_being_asked(lab: Lab) -> None:
    three_sets(lab)
    pid = os.fork()
    if not pid:
        dead_session(lab)
        os._exit(0)
    os.waitpid(pid, 0)
    living = dead_session(lab)
    _, summary = prune(lab)
    assert len(summary.fenced) == 1 and "gone" in summary.fenced[0]
    left = {path.name for path in lab.paths("sessions")}
    assert living.id in left and len(left) == 4
    living.abandon()


def test_age_is_a_hint_that_a_person_may_take(lab: Lab) -> None:
    session = dead_session(lab)
    assert prune(lab, fence_idle=3600 * 10**6)[1].fenced == ()
    assert len(prune(lab, fence_idle=0)[1].fenced) == 1
    session.abandon()


def test_a_damaged_condemnation_stops_writers_and_prunes(lab: Lab) -> None:
    three_sets(lab)
    (one,) = sessions.condemn(lab.storage, lab.repository.config.repository, [bytes(32)], [])
    path = lab.root / "condemned" / one.id
    path.write_bytes(path.read_bytes()[:-1])
    for use in (lambda: prune(lab), lambda: lab.backup(sda=noise(3))):
        with pytest.raises(IntegrityError, match="condemned"):
            use()
    found = check(lab.reopen(), Silent())
    assert [problem.kind for problem in found.problems] == ["condemned"]


# --- damage ---------------------------------------------------------------------------------------


def test_nothing_is_deleted_while_it_cannot_be_told_what_lives(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0])
    roots = [one.images[0].root for one in imageset.list_sets(lab.repository).sets]
    needed = [lab.root / pack_object(KIND_MAP, bytes.fromhex(root.pack)) for root in roots if root]
    for paths, ask in ((lab.paths("sets"), "image set"), (needed, "page")):
        for path in paths:
            kept = path.read_bytes()
            flip(path, len(kept) // 2)
            before = sorted(path for path in lab.root.rglob("*") if path.is_file())
            with pytest.raises(IntegrityError, match=ask):
                prune(lab, max_unused="0%")
            assert before == sorted(path for path in lab.root.rglob("*") if path.is_file())
            path.write_bytes(kept)
    prune(lab, max_unused="0%")
    whole(lab)


def test_what_hangs_on_damage_is_given_up_only_when_asked(lab: Lab) -> None:
    ids = three_sets(lab)
    flip(lab.root / "sets" / ids[0], 200)
    reporter = Silent()
    _, summary = prune(lab, reporter, max_unused="0%", despite_damage=True)
    assert summary.packs_deleted > 0 and any("given up" in text for text in reporter.warnings)
    (lab.root / "sets" / ids[0]).unlink()
    listing = imageset.list_sets(lab.reopen())
    assert [one.id for one in listing.sets] == ids[1:]
    found = check(lab.repository, Silent(), read_data="all")
    assert {problem.kind for problem in found.problems} <= {"chain", "session"}


def test_a_damaged_record_is_neither_copied_nor_deleted(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0], ids[1])
    options = PruneOptions(max_unused="0")
    with (
        open_keyless(FolderStorage(str(lab.root))) as repository,
        Prune(repository, options, Silent(), dry_run=True) as work,
    ):
        pack = next(pack for pack in work.plan().rewrite if pack.kind == KIND_DATA)
        offset = work._marked.marks.offsets(pack.number, True)[3]
    flip(lab.root / pack.object, offset + 80)
    reporter = Silent()
    _, summary = prune(lab, reporter, max_unused="0%")
    assert len(summary.damaged) == 1 and pack.name.hex() in summary.damaged[0]
    assert (lab.root / pack.object).exists()
    hurt = [problem for problem in check(lab.reopen(), Silent(), read_data="all").problems if problem.hurt]
    assert len(hurt) == 1 and hurt[0].hurt[0].bytes == BLOCK


def test_without_its_index_a_pruned_repository_is_still_read(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0], ids[1])
    prune(lab, max_unused="0%")
    for path in lab.paths("index"):
        path.unlink()
    lab.reopen()
    (manifest,) = imageset.list_sets(lab.repository).sets
    reader = MapReader(lab.repository, manifest.images[0])
    slots = [part for _, _, part in reader.walk()]
    places = lab.repository.locator.find_all([slots[0].get(at)[1] for at in range(10)], KIND_DATA)  # type: ignore[union-attr]
    assert len(places) == 10
    # And a prune that finds no index makes no mistake, and mends it.
    _, summary = prune(lab, max_unused="0%")
    assert summary.packs_deleted == 0
    check(lab.reopen(), Silent(), repair=True)
    whole(lab)


# --- tombstones and the memory of machines ---------------------------------------------------------


def test_a_gap_that_was_made_on_purpose_is_no_break(lab: Lab) -> None:
    ids = three_sets(lab)
    assert check(lab.reopen(), Silent()).ok  # this machine has seen them all
    forget(lab, ids[1])
    assert check(lab.reopen(), Silent()).ok
    forget(lab, ids[2])  # the newest that this machine saw
    assert check(lab.reopen(), Silent()).ok
    lab.backup(sda=noise(5, seed=9))
    whole(lab)
    (lab.root / "sets" / ids[0]).unlink()
    kinds = {problem.kind for problem in check(lab.reopen(), Silent()).problems}
    assert "chain" in kinds, "a set that somebody deleted is told of as before"


def test_a_forged_tombstone_explains_nothing(lab: Lab) -> None:
    ids = three_sets(lab)
    assert check(lab.reopen(), Silent()).ok
    forget(lab, ids[2])
    stone = lab.root / "forgotten" / ids[2]
    genuine = stone.read_bytes()
    for forged in (
        genuine.replace(b'"by name"', b'"by fiend"'),
        genuine[:-1],
        b"{}",
        genuine.replace(b'"', b"'"),
    ):
        stone.write_bytes(forged)
        kinds = {problem.kind for problem in check(lab.reopen(), Silent()).problems}
        assert kinds == {"history", "tombstone"}
    stone.write_bytes(genuine)
    # Nor does one make a set go away: a prune looks at manifests alone.
    (lab.root / "forgotten" / ids[1]).write_bytes(genuine)
    _, summary = prune(lab, max_unused="0%")
    listing = imageset.list_sets(lab.reopen())
    assert [one.id for one in listing.sets] == ids[:2]
    (lab.root / "forgotten" / ids[1]).unlink()
    whole(lab)


def test_nothing_is_forgotten_under_a_forged_tombstone(lab: Lab) -> None:
    """Or its gap would never be explained: every check would call the chain broken."""
    ids = three_sets(lab)
    stone = lab.root / "forgotten" / ids[1]
    stone.parent.mkdir()
    for junk in (b"{}", b""):
        stone.write_bytes(junk)
        with pytest.raises(IntegrityError, match="the tombstone of image set"):
            forget(lab, ids[1])
        assert [one.id for one in imageset.list_sets(lab.reopen()).sets] == ids
    stone.unlink()
    forget(lab, ids[1])
    whole(lab)


def test_forgetting_can_be_interrupted_anywhere(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = three_sets(lab)
    for stop_at in range(3):
        calls = iter(range(100))
        with monkeypatch.context() as patch:
            for name in ("create", "delete"):
                real = getattr(FolderStorage, name)

                def call(self, *arguments, real=real, at=stop_at, calls=calls):  # type: ignore[no-untyped-def]
                    if next(calls) == at:
                        raise StorageError("the plug is pulled")
                    return real(self, *arguments)

                patch.setattr(FolderStorage, name, call)
            with pytest.raises(StorageError, match="plug"):
                forget(lab, ids[0])
        assert len(imageset.list_sets(lab.repository).sets) == 3
        prune(lab, max_unused="0%")
        found = check(lab.reopen(), Silent(), read_data="all")
        assert found.ok, found.problems
    forget(lab, ids[0])
    prune(lab, max_unused="0%")
    whole(lab)


def test_who_may_forget(lab: Lab) -> None:
    ids = three_sets(lab)
    with open_keyless(FolderStorage(str(lab.root)), writing=True) as repository:
        if lab.encryption == "none":
            return
        with pytest.raises(WrongKey, match="cannot forget"):
            forgetting.plan_sets(repository, ids[:1], Silent())
        with pytest.raises(WrongKey, match="cannot forget"):
            forgetting.plan_rules(repository, Rules(last=1), Silent())


def test_rules_leave_a_lineage_alone_that_has_sets_from_the_future(lab: Lab) -> None:
    """Forged times, or a wrong clock: nothing goes until a person has looked, and then all is as ever."""
    day = 24 * 3600 * 1_000_000
    ids = three_sets(lab)
    others = [lab.backup("other", sda=noise(n)).id for n in (3, 4)]
    forged = [lab.backup(sda=noise(5), created=now() + (n + 2) * day).id for n in range(3)]
    told = Silent()
    plan = forgetting.plan_rules(lab.repository, Rules(last=1, daily=3), told)
    by_name = {one.name: one for one in plan.lineages}
    assert {one.set for one in by_name["d"].choices} == {*ids, *forged}
    assert all("in the future" in one.reasons[0] for one in by_name["d"].choices)
    # Only that lineage: the others are thinned.
    assert [one.id for one in plan.doomed] == others[:1]
    [warning] = told.warnings
    assert "no set of d of host is forgotten" in warning and "and 2 more" in warning
    assert forgetting.execute(lab.repository, plan, Silent()).forgotten == tuple(others[:1])
    # A person has looked, and lets the forged ones go by name.
    forget(lab, *forged)
    plan = forgetting.plan_rules(lab.reopen(), Rules(last=1), Silent(), names=["d"])
    assert {one.id for one in plan.doomed} == set(ids[:-1])


def test_a_clock_that_is_a_little_ahead_stops_no_rules(lab: Lab) -> None:
    ids = three_sets(lab)
    late = lab.backup(sda=noise(5), created=now() + 3600 * 1_000_000).id
    told = Silent()
    plan = forgetting.plan_rules(lab.repository, Rules(last=1), told)
    assert {one.id for one in plan.doomed} == set(ids[:-1])
    [choice] = [one for one in plan.lineages[0].choices if one.set == late]
    assert choice.doubt is not None and len(told.warnings) == 1


def test_a_lineage_keeps_its_last_set(lab: Lab) -> None:
    ids = three_sets(lab)
    other = lab.backup("other", sda=noise(3)).id
    with pytest.raises(NotConfirmed, match="no image set of other"):
        forget(lab, other, ids[0])
    with pytest.raises(UsageError, match="keep no image set of d "):
        forgetting.plan_rules(lab.repository, Rules(tags=("gold",)), Silent())
    with pytest.raises(UsageError, match="no rule"):
        forgetting.plan_rules(lab.repository, Rules(), Silent())
    plan = forgetting.plan_sets(lab.repository, [other], Silent(), last_of=["other"])
    assert [one.id for one in plan.doomed] == [other]
    tombstones.pin(lab.repository, ids[0], host="host")
    with pytest.raises(UsageError, match="pinned"):
        forget(lab, ids[0])
    plan = forgetting.plan_rules(lab.repository, Rules(last=1), Silent(), names=["d"])
    assert [one.id for one in plan.doomed] == [ids[1]]
    assert tombstones.unpin(lab.repository, ids[0]) and not tombstones.unpin(lab.repository, ids[0])
