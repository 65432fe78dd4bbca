"""Object locks: set at upload by the bucket, extended by another process, and what they are good for.

The server is moto, which implements versions, locks, and the refusal to delete what is locked. It keeps no
accounts apart, so what a key may do is not tried here.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from imager.cli.main import run
from imager.engine import heal
from imager.errors import EXIT_INTEGRITY, EXIT_USAGE, NoRepository, StorageError, UsageError
from imager.events import Silent
from imager.repository import forgetting, retain, sessions, sync
from imager.repository.check import check
from imager.repository.keyless import open_keyless
from imager.repository.prune import Prune, PruneOptions, PruneSummary
from imager.storage import probe
from imager.storage.errors import AlreadyExists
from imager.storage.location import bare, open_storage
from imager.storage.object_store import ObjectStorage
from imager.storage.object_versions import Lock, ObjectVersions, Version, versions_of
from imager.storage.past import PastStorage
from tests.objectstores import Door, Store, locking_door, locking_s3  # noqa: F401
from tests.remote.conftest import Far

DAY = 24 * 3600 * 1_000_000
NEVER_LOCKED_BY_RETAIN = ("sessions/", "condemned/", "checked/", "probe/", "init.lock")


@pytest.fixture
def locked(locking_s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Far:  # noqa: F811
    """A repository in a bucket that locks each new object for three days."""
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("IMAGER_CACHE_DIR", str(tmp_path / "cache"))
    made = Far(locking_s3.url, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        # What init tries out is not what these tests are about, and takes a second.
        patch.setattr(probe, "refuse_unfit", lambda _: None)
        made.init(block_size=4096)
    return made


def changed(image: Path) -> Path:
    with image.open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"a change" * 512)
    return image


def noise(image: Path) -> Path:
    """Nothing in it is as it was."""
    image.write_bytes(os.urandom(1 << 20))
    return image


def versions(far: Far) -> ObjectVersions:
    return versions_of(open_storage(far.url))


def all_versions(far: Far, name: str = "") -> list[Version]:
    return [*versions(far).versions(name)]


def locks(far: Far) -> dict[str, Lock | None]:
    """The lock of each object that is there."""
    found = versions(far)
    return {one.name: found.lock_of(one) for one in found.versions() if one.latest and not one.deleted}


def retained(far: Far, **wish: int) -> retain.RetainSummary:
    storage = far.connect()
    return retain.execute(storage, retain.plan(storage, Silent(), **wish), Silent())


def pruned(far: Far) -> PruneSummary:
    with (
        open_keyless(far.connect(), writing=True) as repository,
        Prune(repository, PruneOptions(max_unused="0%"), Silent()) as work,
    ):
        return work.execute(work.plan())


def forget(far: Far, *ids: str) -> None:
    with far.open() as repository:
        forgetting.execute(repository, forgetting.plan_sets(repository, ids, Silent()), Silent())


def past(far: Far) -> str:
    """The address of the repository as it is now. The server's times are of whole seconds."""
    time.sleep(1.1)
    moment = datetime.now(UTC)
    time.sleep(1.1)
    return f"{far.url}?as-of={moment.isoformat()}"


def destroy(far: Far) -> None:
    """What a thief of the host's key to the bucket does."""
    storage = open_storage(far.url)
    for name in storage.list_names(""):
        storage.delete(name)


# --- at upload ------------------------------------------------------------------------------------


def test_every_object_is_locked_from_its_upload_on(locked: Far, image: Path) -> None:
    locked.backup(image)
    found = locks(locked)
    assert {name.split("/")[0] for name in found} >= {
        "config",
        "slots",
        "epochs",
        "sets",
        "packs",
        "maps",
        "index",
    }
    for name, lock in found.items():
        assert lock is not None and lock.mode == "GOVERNANCE", name
        assert 2 * DAY < lock.until - time.time() * 1e6 <= 3 * DAY, name
    for one in all_versions(locked):
        assert one.deleted or versions(locked).try_delete(one) is not None, one.name
    locked.is_whole()
    locked.gives("d", image)


def test_checksums_are_sent_only_where_they_are_wanted(
    locked: Far,
    image: Path,
    locking_door: Door,  # noqa: F811
) -> None:
    storage = open_storage(locked.url)
    asked: list[str] = []
    locking_door.rule = lambda _, method, key: asked.append(method) if method == "PUT" else None  # type: ignore[func-returns-value]
    for number in range(3):
        storage.create(f"sets/{number}", b"x")
    locking_door.rule = None
    assert len(asked) == 4, "the first one is refused and sent again with a checksum, and then all have one"
    inner = bare(storage)
    assert isinstance(inner, ObjectStorage) and inner._checks
    with pytest.raises(AlreadyExists):
        storage.create("sets/1", b"y")


# --- extended -------------------------------------------------------------------------------------


def test_what_sets_need_is_locked_for_longer_and_the_rest_is_not(locked: Far, image: Path) -> None:
    locked.backup(image)
    dead = locked.backup(noise(image)).set
    locked.backup(noise(image))
    forget(locked, dead)
    before = locks(locked)
    storage = locked.connect()
    plan = retain.plan(storage, Silent(), span=30 * DAY)
    assert (plan.unlocked, plan.suspicions) == (0, ()) and plan.soonest is not None
    assert plan.soonest - time.time() * 1e6 <= 3 * DAY
    done = retain.execute(storage, plan, Silent())
    assert done.ok and done.extended == done.objects == len(plan.targets)
    after = locks(locked)
    assert before.keys() == after.keys()
    unneeded = {name for name in after if after[name] == before[name]}
    assert unneeded, "the packs of the forgotten set"
    assert {name.split("/")[0] for name in unneeded} <= {"packs", "maps", "sessions", "checked"}
    for name in after.keys() - unneeded:
        lock = after[name]
        assert lock is not None and lock.until == done.until and lock.mode == "GOVERNANCE"
        assert not name.startswith(NEVER_LOCKED_BY_RETAIN)
    # A prune takes away what is not needed, and all that is left has its lock.
    assert pruned(locked).packs_deleted == len({n for n in unneeded if n.startswith(("packs/", "maps/"))})
    assert retained(locked, span=40 * DAY).ok, "what a prune deletes is no suspicion"
    locked.is_whole()


def test_a_lock_is_never_made_shorter(locked: Far, image: Path) -> None:
    locked.backup(image)
    long = retained(locked, span=30 * DAY)
    assert long.extended > 0
    again = retained(locked, span=20 * DAY)
    assert (again.extended, again.objects) == (0, long.objects)
    assert {lock.until for lock in locks(locked).values() if lock} >= {long.until}
    with pytest.raises(UsageError, match="over"):
        retain.plan(locked.connect(), Silent(), until=int(time.time() * 1e6) - DAY)


def test_a_lock_that_is_there_keeps_its_mode(locked: Far, image: Path) -> None:
    locked.backup(image)
    [config] = all_versions(locked, "config")
    soon = (int(time.time()) + 3600) * 1_000_000
    versions(locked).lock(config, Lock("COMPLIANCE", soon))
    done = retained(locked, span=30 * DAY)
    assert versions(locked).lock_of(config) == Lock("COMPLIANCE", done.until)


# --- what it is good for --------------------------------------------------------------------------------


def test_what_a_thief_deleted_is_read_from_the_past_and_copied(
    locked: Far, image: Path, tmp_path: Path
) -> None:
    locked.backup(image)
    locked.backup(changed(image))
    ids = locked.sets()
    before = past(locked)
    destroy(locked)
    assert open_storage(locked.url).list_names("") == []
    locked.gives("d", image, open_storage(before))
    # Into the bucket itself: the names are free again.
    with open_keyless(open_storage(before)) as source:
        target = open_storage(locked.url)
        wishes = sync.Wishes()
        done = sync.execute(source, target, wishes, sync.plan(source, target, wishes), Silent(), verify=True)
    assert done.ok and sorted(done.sets) == sorted(ids)
    locked.is_whole()
    locked.gives("d", image)


def test_what_a_thief_overwrote_is_healed_from_the_past(
    locked: Far, image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locked.backup(image)
    before = past(locked)
    storage = open_storage(locked.url)
    for name in [*storage.list_names("packs/"), *storage.list_names("sets/")]:
        storage.delete(name)
        storage.create(name, b"pay me")
    assert run(["-q", "-r", locked.url, "check", "--keyless"]) == EXIT_INTEGRITY
    assert f"--repair --heal-from '{locked.url}?as-of=TIME'" in capsys.readouterr().out
    with locked.open() as repository:
        found = check(repository, Silent(), repair=True)
        assert not found.ok
        found = heal.repaired(repository, found, [before], locked.credentials, Silent())
        assert found.ok, found.problems
    locked.is_whole()
    locked.gives("d", image)


def test_the_past_is_as_it_was_and_cannot_be_changed(locked: Far, image: Path) -> None:
    locked.backup(image)
    names = open_storage(locked.url).list_names("")
    before = open_storage(past(locked))
    locked.backup(changed(image))
    forget(locked, locked.sets()[0])
    assert sorted(before.list_names("")) == sorted(names)
    assert {one.name: one.size for one in before.list("packs/")}.keys() == {
        name for name in names if name.startswith("packs/")
    }
    config = before.read("config")
    assert before.read("config", 3, 5) == config[3:8] and before.read("config", len(config), 9) == b""
    assert before.size("config") == len(config) and not before.exists("sets/0")
    for call in (
        lambda: before.create("sets/0", b"x"),
        lambda: before.delete("config"),
        lambda: before.move("config", "other"),
        before.stage,
        lambda: before.initializing().__enter__(),
    ):
        with pytest.raises(StorageError, match="is the past"):
            call()
    with pytest.raises(StorageError, match="is the past"):
        locked.backup(image, before)


@pytest.mark.parametrize(
    "wrong", ["s3://b/x?as-of=soon", "gs://b/x?as-of=2026-11-22", "s3://?as-of=2026-11-22"]
)
def test_pasts_that_are_none(wrong: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_storage(wrong)
    assert caught.value.hint


def test_a_bucket_without_versions_has_no_past(far: Far, image: Path) -> None:
    far.backup(image)
    with pytest.raises((UsageError, StorageError)):
        PastStorage.connect(f"{far.url}?as-of=2100-01-01T00:00Z").list_names("")


def a_second_later() -> None:
    """Stores tell the time in whole seconds, and what is as old as the repository may be of its beginning."""
    time.sleep(1.01 - time.time() % 1)


def test_locks_do_not_run_out_behind_a_thief(locked: Far, image: Path) -> None:
    """Sets that vanished, objects that were overwritten: then everything stays locked, what is hidden too."""
    locked.backup(image)
    locked.backup(changed(image))
    gone, kept = locked.sets()
    a_second_later()
    storage = open_storage(locked.url)
    (manifest,) = (one for one in all_versions(locked, f"sets/{gone}"))
    storage.delete(f"sets/{gone}")
    pack = next(name for name in storage.list_names("packs/"))
    [true] = all_versions(locked, pack)
    storage.delete(pack)
    storage.create(pack, b"pay me")
    done = retained(locked, span=30 * DAY)
    assert not done.ok
    assert any(gone in line and "never forgotten" in line for line in done.suspicions)
    assert any(line == f"{pack} was overwritten" for line in done.suspicions)
    found = versions(locked)
    for one in (manifest, true):
        lock = found.lock_of(one)
        assert lock is not None and lock.until == done.until, one.name
    for one in all_versions(locked, "maps/"):
        lock = found.lock_of(one)
        assert one.deleted or (lock is not None and lock.until == done.until)


@pytest.mark.parametrize("how", ["deleted", "overwritten"])
def test_a_repository_that_cannot_be_read_stays_locked(locked: Far, image: Path, how: str) -> None:
    locked.backup(image)
    storage = open_storage(locked.url)
    for name in storage.list_names("") if how == "deleted" else ["config"]:
        storage.delete(name)
    if how == "overwritten":
        storage.create("config", b"{}")
    done = retained(locked, span=30 * DAY)
    assert any(line.startswith("it cannot be read: ") for line in done.suspicions)
    found = versions(locked)
    for one in all_versions(locked):
        if not one.deleted and not one.name.startswith(NEVER_LOCKED_BY_RETAIN):
            lock = found.lock_of(one)
            assert lock is not None and lock.until == done.until, one.name


def test_without_a_key_slot_nobody_could_read_it(locked: Far, image: Path) -> None:
    locked.backup(image)
    storage = open_storage(locked.url)
    [slot] = storage.list_names("slots/")
    storage.delete(slot)
    done = retained(locked, span=30 * DAY)
    assert any("every key slot" in line for line in done.suspicions)
    lock = versions(locked).lock_of(next(one for one in all_versions(locked, slot) if not one.deleted))
    assert lock is not None and lock.until == done.until


def test_an_init_that_was_interrupted_is_no_suspicion(
    locking_s3: Store,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    image: Path,
) -> None:
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setattr(probe, "refuse_unfit", lambda _: None)
    far = Far(locking_s3.url, tmp_path)
    storage = open_storage(far.url)
    storage.create("epochs/00000001", b"of another attempt")
    storage.create("slots/" + "ab" * 16, b"the same")
    far.init(block_size=4096)
    far.backup(image)
    assert len([one for one in all_versions(far, "epochs/00000001") if not one.deleted]) == 2
    done = retained(far, span=30 * DAY)
    assert done.ok, done.suspicions


def test_a_place_without_a_repository(locked: Far) -> None:
    with pytest.raises(NoRepository):
        retain.plan(open_storage(locked.url + "/nothing"), Silent(), span=DAY)


def test_what_was_forgotten_is_no_suspicion_and_a_forged_tombstone_is_one(locked: Far, image: Path) -> None:
    locked.backup(image)
    locked.backup(changed(image))
    first, second = locked.sets()
    forget(locked, first)
    assert retained(locked, span=30 * DAY).ok
    a_second_later()
    storage = open_storage(locked.url)
    storage.create(
        f"forgotten/{second}", storage.read(f"forgotten/{first}").replace(first.encode(), second.encode())
    )
    storage.delete(f"sets/{second}")
    done = retained(locked, span=30 * DAY)
    assert [line for line in done.suspicions if second in line]


def test_a_session_that_was_declared_dead_is_no_suspicion(locked: Far, image: Path) -> None:
    locked.backup(image)
    storage = open_storage(locked.url)
    with locked.open() as repository:
        name = repository.config.repository
        sessions.announce(repository.storage, name, "ab" * 16, host="elsewhere", kind="backup")
        sessions.fence(storage, "ab" * 16, "test")
    storage.delete("sets/" + "ab" * 16)
    assert retained(locked, span=30 * DAY).ok


# --- prune ------------------------------------------------------------------------------------------------


def test_a_prune_leaves_what_the_store_refuses_to_delete(
    locked: Far,
    image: Path,
    locking_door: Door,  # noqa: F811
) -> None:
    """Stores that keep no versions refuse the delete itself: the packs stay condemned, and go later."""
    locked.backup(image)
    dead = locked.backup(noise(image)).set
    locked.backup(noise(image))
    forget(locked, dead)

    def rule(number: int, method: str, key: str) -> tuple[str, int] | None:
        return ("locked", 403) if method == "DELETE" and "/packs/" in f"/{key}" else None

    locking_door.rule = rule
    first = pruned(locked)
    assert first.retained > 0 and first.condemned == first.retained
    again = pruned(locked)
    assert again.condemned == again.retained == first.retained, "none is lost count of"
    locking_door.rule = None
    last = pruned(locked)
    assert (last.retained, last.condemned) == (0, 0) and last.packs_deleted >= first.retained
    locked.is_whole()


# --- doctor and the command ---------------------------------------------------------------------


def lock_finding(url: str) -> probe.Finding:
    found = probe.probe(open_storage(url))
    assert found.ok
    return next(one for one in found.findings if one.promise == "object lock")


def test_doctor_tells_of_locks(locked: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    found = lock_finding(locked.url)
    assert found.state == "kept" and "governance, 3 days" in found.detail and "refused" in found.detail
    monkeypatch.setattr(ObjectVersions, "try_delete", lambda *_: None)
    assert lock_finding(locked.url).state == "BROKEN"


def test_all_but_locks_works_without_botocore(
    locked: Far, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("botocore", "botocore.config", "botocore.exceptions", "botocore.session"):
        monkeypatch.setitem(sys.modules, name, None)
    locked.backup(image)
    locked.gives("d", image)
    found = lock_finding(locked.url)
    assert found.state == "unknown" and "package botocore" in found.detail
    with pytest.raises(UsageError, match="package botocore") as caught:
        retain.plan(locked.connect(), Silent(), span=DAY)
    assert caught.value.hint == "pip install botocore"
    with pytest.raises(UsageError, match="package botocore"):
        open_storage(f"{locked.url}?as-of=2026-11-22")


def test_doctor_tells_where_there_are_none(far: Far) -> None:
    found = lock_finding(far.url)
    assert found.state == "note" and found.detail.startswith("none")
    with pytest.raises(StorageError, match="has no object lock"):
        retain.plan(far.connect(), Silent(), span=DAY)


def test_the_command(locked: Far, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked.backup(image)
    place = ["-q", "-r", locked.url]
    assert run([*place, "retain", "--for", "30d", "--dry-run"]) == 0
    assert "0 without a lock" in capsys.readouterr().out
    assert run([*place, "retain", "--until", "2100-01-01", "--json"]) == 0
    assert '"ok":true' in capsys.readouterr().out
    storage = open_storage(locked.url)
    a_second_later()
    storage.delete(f"sets/{locked.sets()[0]}")
    assert run([*place, "retain", "--for", "30d"]) == EXIT_INTEGRITY
    shown = capsys.readouterr().out
    assert "NOTICED: image set" in shown and f"{locked.url}?as-of=TIME" in shown
    for wrong in ([], ["--for", "1d", "--until", "2100-01-01"], ["--at-upload", "1h"], ["--until", "soon"]):
        assert run([*place, "retain", *wrong]) == EXIT_USAGE
    assert run(["-q", "-r", str(image.parent / "none"), "retain", "--for", "1d"]) == EXIT_USAGE


def test_locks_are_for_s3(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keeps no locks"):
        versions_of(open_storage(str(tmp_path)))
