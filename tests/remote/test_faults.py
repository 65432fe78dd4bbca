"""Far repositories in bad weather: nothing is lost, nothing is made up, and what can go on goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from imager.errors import IntegrityError, NoRepository, StorageError
from imager.repository.repository import Repository
from imager.storage.base import Storage
from imager.storage.errors import AlreadyExists, NotFound, Unavailable
from imager.storage.folder import FolderStorage
from imager.storage.limit import Limited, Limits, Paces
from imager.storage.location import open_storage
from imager.storage.object_store import ObjectStorage
from imager.storage.rehearsal import Crash, Crashing, Eventual, Faulty, Recording
from imager.storage.retry import Retrying
from tests.objectstores import Store
from tests.remote.conftest import Far


def patient(inner: Storage) -> Retrying:
    """Repeats as in earnest, without the pauses."""
    return Retrying(inner, sleep=lambda _: None)


def calls_of(far: Far, image: Path) -> int:
    recording = Recording(ObjectStorage.connect(far.url))
    far.backup(image, recording)
    return recording.total


@pytest.mark.parametrize("when", ["before", "after"])
def test_every_call_fails_once_each_in_turn(far: Far, image: Path, when: str) -> None:
    """A call that did not arrive, or whose answer got lost, is repeated; the result is the same."""
    calls = calls_of(far, image)
    assert calls >= 12
    for wrong in range(calls + 2):
        image.write_bytes(os.urandom(1 << 20))
        faulty = Faulty(
            ObjectStorage.connect(far.url), lambda number, call, name, w=wrong: when if number == w else None
        )
        storage = patient(faulty)
        far.backup(image, storage)
        assert storage.repeated == (1 if faulty.made > wrong else 0)
    far.gives("d", image)
    assert len(far.sets()) == calls + 3
    far.is_whole()


def test_every_call_of_a_restore_fails_once(far: Far, image: Path) -> None:
    far.backup(image)
    recording = Recording(ObjectStorage.connect(far.url))
    far.gives("d", image, recording)
    for wrong in range(recording.total):
        plan = lambda number, call, name, w=wrong: "before" if number == w else None  # noqa: E731
        storage = patient(Faulty(ObjectStorage.connect(far.url), plan))
        far.gives("d", image, storage)
        assert storage.repeated == 1
    # All of them, all the time but each third.
    often = patient(
        Faulty(ObjectStorage.connect(far.url), lambda number, *_: "before" if number % 3 else None)
    )
    far.gives("d", image, often)
    assert often.repeated > 5


def test_a_read_that_fails_for_good_is_no_zero_and_no_damage(far: Far, image: Path) -> None:
    far.backup(image)
    target = far.folder / "restored"
    broken = Faulty(
        ObjectStorage.connect(far.url),
        lambda number, call, name: "before" if call == "read" and name.startswith("packs/") else None,
    )
    with pytest.raises(Unavailable, match="did not reach"):
        far.gives("d", image, Retrying(broken, patience=0))
    assert not any(target.read_bytes()[: 1 << 20])  # incomplete, and looks it
    target.unlink()
    far.gives("d", image)


def test_a_crash_after_each_call_leaves_the_earlier_sets_whole(far: Far, image: Path) -> None:
    kept = image.read_bytes()
    far.backup(image)
    (first,) = far.sets()
    calls = calls_of(far, image)
    made = len(far.sets())
    for left in range(calls):
        image.write_bytes(os.urandom(1 << 20) + kept[1 << 20 :])
        with pytest.raises(Crash):
            far.backup(image, Crashing(ObjectStorage.connect(far.url), left))
        assert len(far.sets()) == made
    far.backup(image)
    far.gives("d", image)
    image.write_bytes(kept)
    far.gives(first, image)
    far.is_whole()


def test_a_listing_that_lags_behind(far: Far, image: Path) -> None:
    """What is not listed yet is stored again at worst."""
    kept = image.read_bytes()
    storage = Eventual(open_storage(far.url), after=3)
    for number in range(5):
        image.write_bytes(kept[: 2 << 20] + bytes([number + 1]) * (1 << 20))
        far.backup(image, storage)
        far.gives("latest", image)
    far.is_whole()


# --- over a real connection -----------------------------------------------------------------


def test_connections_that_break_in_the_middle_of_a_backup(far: Far, image: Path, s3: Store) -> None:
    """Each second request of the first forty is cut off, before the server saw it or after."""
    ways = [("drop", 0), ("lose", 0), ("status", 503), ("status", 500), ("status", 409), ("truncate", 10)]
    cut: list[tuple[int, str]] = []

    def rule(number: int, method: str, key: str) -> tuple[str, int] | None:
        if number % 2 or number > 40 or (method != "PUT" and number % 12 == 8):
            return None
        cut.append((number, method))
        return ways[number // 2 % len(ways)]

    s3.door.forget()
    s3.door.rule = rule
    storage = patient(ObjectStorage.connect(far.url))
    far.backup(image, storage)
    assert len(cut) >= 8 and {"PUT", "GET"} <= {method for _, method in cut}
    s3.door.rule = None
    far.gives("d", image)
    far.is_whole()


def test_a_restore_over_answers_that_are_cut_short(far: Far, image: Path, s3: Store) -> None:
    far.backup(image)
    s3.door.forget()
    s3.door.rule = lambda number, method, key: ("truncate", 1000) if number % 3 == 1 else None
    storage = patient(ObjectStorage.connect(far.url))
    far.gives("d", image, storage)
    assert storage.repeated >= 3


def test_a_server_that_goes_away_for_a_while(far: Far, image: Path, s3: Store) -> None:
    """Ten requests in a row find nobody; the backup goes on where it was."""
    s3.door.rule = lambda number, method, key: ("drop", 0) if 12 <= number < 22 else None
    s3.door.counts.clear()
    storage = patient(ObjectStorage.connect(far.url))
    far.backup(image, storage)
    assert storage.repeated == 10
    far.gives("d", image)


def test_a_creation_whose_answer_got_lost(far: Far, s3: Store) -> None:
    """It finds its own bytes and has won; another's bytes, and it has lost."""
    for size in (100, 5 << 20):
        data = os.urandom(size)
        s3.door.forget()
        s3.door.rule = lambda number, method, key: ("lose", 0) if number == 0 else None
        storage = patient(ObjectStorage.connect(far.url))
        storage.create(f"sessions/{size}", data)
        assert storage.repeated == 1
        with pytest.raises(AlreadyExists):
            storage.create(f"sessions/{size}", data)  # A second call is another writer.
        staged = storage.stage()
        os.write(staged.fd, data)
        s3.door.forget()
        s3.door.rule = lambda number, method, key: ("lose", 0) if number == 0 else None
        staged.publish(f"packs/{size}")
        assert storage.read(f"packs/{size}") == data
    taken = threading.Event()

    def rule(number: int, method: str, key: str) -> tuple[str, int] | None:
        if number == 0:
            taken.set()
            return ("drop", 0)
        return None

    s3.door.forget()
    s3.door.rule = rule
    other = ObjectStorage.connect(far.url)

    def beaten(_: float) -> None:
        if taken.is_set():
            taken.clear()
            other.create("sessions/raced", b"the other's")

    with pytest.raises(AlreadyExists):
        Retrying(ObjectStorage.connect(far.url), sleep=beaten).create("sessions/raced", b"mine")
    assert other.read("sessions/raced") == b"the other's"


def test_deletions_and_moves_whose_answer_got_lost(far: Far) -> None:
    for call in ("delete", "move"):
        inner = ObjectStorage.connect(far.url)
        inner.create("packs/00", b"x" * 1000)
        lost = iter(["after"])

        def plan(number: int, what: str, name: str, call: str = call, lost=lost) -> str | None:
            return next(lost, None) if what == call else None

        storage = patient(Faulty(inner, plan))
        if call == "delete":
            storage.delete("packs/00")
        else:
            storage.move("packs/00", "damaged/packs/00")
            assert inner.read("damaged/packs/00") == b"x" * 1000
        assert storage.repeated == 1 and not inner.exists("packs/00")
        with pytest.raises(NotFound):
            storage.delete("packs/00")


# --- what the store says --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (403, StorageError, "refuses it: AccessDenied"),
        (503, Unavailable, "SlowDown"),
        (500, Unavailable, "InternalError"),
        (409, Unavailable, "ConditionalRequestConflict"),
        (418, StorageError, "Strange"),
    ],
)
def test_answers_become_one_clear_error(
    far: Far, s3: Store, status: int, kind: type[StorageError], words: str
) -> None:
    storage = ObjectStorage.connect(far.url)
    s3.door.rule = lambda *_: ("status", status)
    for use in (
        lambda: storage.read("config"),
        lambda: storage.read("config", 0, 10),
        lambda: storage.create("sets/a", b"x"),
        lambda: storage.list_names("sets/"),
    ):
        with pytest.raises(kind, match=words) as caught:
            use()
        assert type(caught.value) is kind and far.url in caught.value.message
        assert status == 418 or caught.value.hint
        assert "Debug source" not in caught.value.message and "\n" not in caught.value.message


def test_a_store_that_cannot_be_reached(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(Unavailable, match="cannot be reached") as caught:
        ObjectStorage.connect(far.url).read("config")
    assert "AWS_ENDPOINT_URL" in (caught.value.hint or "")


def test_a_bucket_that_is_not_there(other_s3: Store) -> None:
    with pytest.raises(NoRepository, match="no such bucket") as caught:
        Repository.begin(open_storage("s3://no-such-bucket/r"), None)  # type: ignore[arg-type]
    assert "create the bucket" in (caught.value.hint or "")
    with pytest.raises(StorageError, match="no such bucket"):
        open_storage("s3://no-such-bucket/r").create("sets/a", b"")


def test_wrong_keys_of_the_store(far: Far, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    with pytest.raises(StorageError, match="SignatureDoesNotMatch") as caught:
        ObjectStorage.connect(far.url).read("config")
    assert "AWS_SECRET_ACCESS_KEY" in (caught.value.hint or "") and "another" not in str(caught.value)


# --- damage ---------------------------------------------------------------------------------------


def test_packs_that_are_damaged_missing_or_cut_short(far: Far, s3: Store, image: Path) -> None:
    """As in a folder: named exactly, never passed over, never zeroes."""
    from imager.engine.verify import verify
    from imager.events import Silent

    far.backup(image)
    assert s3.objects is not None
    (pack,) = [path for path in (s3.objects / "packs").rglob("*") if path.is_file()]
    good = pack.read_bytes()
    for harm in ("flip", "cut", "gone"):
        if harm == "flip":
            pack.write_bytes(good[:600_000] + bytes([good[600_000] ^ 1]) + good[600_001:])
        elif harm == "cut":
            pack.write_bytes(good[: len(good) // 2])
        else:
            pack.unlink()
        with far.open() as repository:
            found = verify(repository, "d", Silent())
        assert not found.ok
        if harm == "flip":
            assert found.damaged_bytes == 2 * 4096  # The block is in the image twice.
        elif harm == "cut":
            assert 0.4 < found.damaged_bytes / (2 << 20) < 0.6
            assert any("ends here" in one.reason for one in found.damage)
        else:
            assert found.damaged_bytes == 2 << 20 and "missing" in found.damage[0].reason
        with pytest.raises(IntegrityError, match="damaged"):
            far.gives("d", image)
        (far.folder / "restored").unlink()
    pack.write_bytes(good)
    far.is_whole()


def test_a_disk_that_is_full_here_is_told_as_such(far: Far, image: Path, tmp_path: Path) -> None:
    """The spooled packs need room on this machine."""
    if os.geteuid() != 0:
        pytest.skip("mounts a filesystem")
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "imager-test", str(mount)], check=True)
    try:
        os.environ["IMAGER_SPOOL_DIR"] = str(mount)
        with pytest.raises(StorageError, match="No space left") as caught:
            far.backup(image)
        assert "IMAGER_SPOOL_DIR" in (caught.value.hint or "")
    finally:
        del os.environ["IMAGER_SPOOL_DIR"]
        subprocess.run(["umount", str(mount)], check=True)
    far.backup(image)
    far.gives("d", image)
    assert len(far.sets()) == 1


def test_a_disk_that_is_full_at_the_store(far: Far, image: Path, tmp_path: Path) -> None:
    """The server's disk fills up during a backup: earlier sets stay, and after space returns all goes on."""
    from tests import objectstores

    if os.geteuid() != 0:
        pytest.skip("mounts a filesystem")
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "imager-test", str(mount)], check=True)
    try:
        with objectstores.s3s(mount) as server, objectstores.open_door(server) as door:
            os.environ["AWS_ENDPOINT_URL"] = door.endpoint
            small = Far(f"s3://{objectstores.BUCKET}/small", tmp_path)
            small.init(block_size=4096)
            small.backup(image)
            kept = image.read_bytes()
            image.write_bytes(os.urandom(8 << 20))
            with pytest.raises(StorageError) as caught:
                small.backup(image, Retrying(ObjectStorage.connect(small.url), patience=0))
            assert caught.value.message and len(small.sets()) == 1
            subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
            small.backup(image)
            small.gives("d", image)
            image.write_bytes(kept)
            small.gives(small.sets()[0], image)
            small.is_whole()
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_the_guard_still_knows_a_local_repository(tmp_path: Path) -> None:
    from imager.storage.location import local_path

    folder = FolderStorage(str(tmp_path))
    assert local_path(Limited(folder, Paces(Limits(upload=1)))) == str(tmp_path)
    assert local_path(ObjectStorage("s3://b/x", None)) is None  # type: ignore[arg-type]


def command(far: Far, *arguments: str | Path) -> list[str]:
    keyfile = str(far.folder / "key")
    return [sys.executable, "-m", "imager", "-r", far.url, "--keyfile", keyfile, *map(str, arguments)]


def test_an_interrupt_ends_a_backup_that_waits_for_a_dead_server(far: Far, image: Path, s3: Store) -> None:
    seen = threading.Event()

    def rule(number: int, method: str, key: str) -> tuple[str, int] | None:
        if key.startswith(far.url.partition("imager-tests/")[2] + "/packs/") and method == "PUT":
            seen.set()
        return ("drop", 0) if seen.is_set() else None

    s3.door.forget()
    s3.door.rule = rule
    process = subprocess.Popen(command(far, "backup", image), stderr=subprocess.PIPE, text=True)
    assert seen.wait(60)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)  # It would have been patient for minutes.
    assert process.returncode == 130 and "Traceback" not in said, said
    s3.door.forget()
    assert far.sets() == []
    far.backup(image)
    far.gives("d", image)


def test_a_killed_backup_is_taken_up_by_the_next(far: Far, tmp_path: Path, s3: Store) -> None:
    """What it had uploaded and written an index of, or not, costs nothing but space."""
    image = tmp_path / "image"
    image.write_bytes(os.urandom(4 << 20))
    stop, killed = threading.Event(), threading.Event()

    def rule(number: int, method: str, key: str) -> tuple[str, int] | None:
        if method == "PUT" and "/sets/" in key:
            stop.set()  # The manifest is on its way, and never arrives.
            killed.wait(60)
            return ("drop", 0)
        return None

    s3.door.forget()
    s3.door.rule = rule
    process = subprocess.Popen(command(far, "backup", image, "--name", "d"))
    assert stop.wait(60)
    process.kill()
    process.wait()
    killed.set()
    s3.door.forget()
    made = far.backup(image)
    assert made.images[0].blocks_new == 0  # All of it was there, and known.
    far.gives(made.set, image)
    far.is_whole()
