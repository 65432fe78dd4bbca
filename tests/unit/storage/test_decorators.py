"""Each decorator does its one thing, and all a storage does besides."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from imager.errors import StorageError, UsageError
from imager.storage import location, spool
from imager.storage.base import Storage
from imager.storage.errors import AlreadyExists, NotFound, Unavailable
from imager.storage.folder import FolderStorage
from imager.storage.limit import Limited, Limits, Paces
from imager.storage.object_store import ObjectStorage
from imager.storage.rehearsal import Faulty, Recording
from imager.storage.retry import FIRST_PATIENCE, PATIENCE, Retrying


@pytest.fixture
def folder(tmp_path: Path) -> FolderStorage:
    made = FolderStorage(str(tmp_path / "r"))
    with made.initializing():
        made.create("config", b"{}")
    return made


def failing(inner: Storage, times: int, when: str = "before") -> Faulty:
    return Faulty(inner, lambda number, *_: when if number < times else None)


def test_pauses_grow_and_end(folder: FolderStorage) -> None:
    pauses: list[float] = []
    storage = Retrying(failing(folder, 10**6), sleep=pauses.append)
    with pytest.raises(Unavailable):
        storage.read("config")
    # Nobody has ever answered: soon over.
    assert FIRST_PATIENCE <= sum(pauses) < 3 * FIRST_PATIENCE
    assert 0.05 <= pauses[0] <= 0.1 and all(b > a / 2 for a, b in zip(pauses, pauses[1:], strict=False))
    pauses.clear()
    once = Faulty(folder, lambda number, *_: "before" if number else None)
    storage = Retrying(once, sleep=pauses.append)
    storage.read("config")
    with pytest.raises(Unavailable):
        storage.read("config")
    assert PATIENCE <= sum(pauses) < PATIENCE + 20 and max(pauses) <= 15


def test_nothing_is_repeated_when_the_process_ends(
    folder: FolderStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imager.storage import retry

    monkeypatch.setattr(retry, "_ending", threading.Event())
    faulty = failing(folder, 10**6)
    storage = Retrying(faulty)
    storage._answered = True
    threading.Timer(0.3, retry.give_up).start()
    with pytest.raises(Unavailable):
        storage.read("config")
    assert faulty.made < 10  # It would have gone on for minutes.
    made = faulty.made
    with pytest.raises(Unavailable):
        storage.read("config")
    assert faulty.made == made + 1


def test_only_what_may_pass_is_repeated(folder: FolderStorage) -> None:
    for error in (NotFound("x"), StorageError("x"), AlreadyExists("x"), ValueError("x")):

        def broken(number: int, call: str, name: str, error: Exception = error) -> str | None:
            raise error

        faulty = Faulty(folder, broken)
        with pytest.raises(type(error)):
            Retrying(faulty, sleep=lambda _: None).read("config")
        assert faulty.made == 1


def test_a_lost_answer_to_a_creation(folder: FolderStorage) -> None:
    storage = Retrying(failing(folder, 1, "after"), sleep=lambda _: None)
    storage.create("sets/a", b"mine")
    folder.create("sets/b", b"the other's")
    with pytest.raises(AlreadyExists):
        Retrying(failing(folder, 1), sleep=lambda _: None).create("sets/b", b"mine")
    # The first attempt found the name taken: that is an answer, equal bytes or not.
    with pytest.raises(AlreadyExists):
        Retrying(folder, sleep=lambda _: None).create("sets/b", b"the other's")


def test_a_publish_that_is_given_up_frees_its_bytes(folder: FolderStorage) -> None:
    storage = Retrying(failing(folder, 10**6), patience=0)
    staged = storage.stage()
    os.write(staged.fd, b"x")
    with pytest.raises(Unavailable):
        staged.publish("packs/00")
    assert staged.fd == -1


class Clock:
    """Time that passes by sleeping."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_rates_are_kept(folder: FolderStorage) -> None:
    clock = Clock()
    storage = Limited(folder, Paces(Limits(1000, 500), clock=clock, sleep=clock.sleep))
    for number in range(10):
        storage.create(f"sets/{number}", bytes(1000))
    assert 9 <= clock.now - 1000 <= 10  # 10,000 bytes at 1,000 a second, the last one on its way
    staged = storage.stage()
    os.write(staged.fd, bytes(5000))
    staged.publish("packs/00")
    clock.now = begun = clock.now + 100
    for _ in range(5):
        assert len(storage.read("packs/00", 0, 1000)) == 1000
    assert len(storage.read("packs/00")) == 5000
    storage.read("sets/0", 0, 10)
    assert 19 <= clock.now - begun <= 21
    free = Limited(folder, Paces(Limits(), sleep=clock.sleep))
    begun = clock.now
    free.create("sets/free", bytes(10**6))
    assert clock.now == begun


def test_storages_that_share_their_paces_keep_the_rate_together(
    folder: FolderStorage, tmp_path: Path
) -> None:
    clock = Clock()
    paces = Paces(Limits(upload=1000, download=500), clock=clock, sleep=clock.sleep)
    first, second = Limited(folder, paces), Limited(FolderStorage(str(tmp_path / "r")), paces)
    first.create("sets/a", bytes(2000))
    begun = clock.now
    second.create("sets/b", bytes(10))
    assert clock.now - begun == 2.0
    begun = clock.now
    for storage in (first, second, first):
        storage.read("sets/a", 0, 1000)
    assert clock.now - begun == 4.0


def test_what_is_read_in_place_cannot_pass_a_limit_by(folder: FolderStorage) -> None:
    clock = Clock()
    folder.create("sets/a", bytes(2000))
    assert Limited(folder, Paces(Limits(upload=5))).local
    storage = Limited(folder, Paces(Limits(download=500), clock=clock, sleep=clock.sleep))
    assert not storage.local
    os.close(storage.open("sets/a"))
    storage.read("sets/a", 0, 1)
    assert clock.now - 1000 == 4.0


def test_uploads_under_way_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_uploads", spool.Budget(1000))
    lock, most, now = threading.Lock(), 0, 0

    def upload(name: str, fd: int, size: int) -> None:
        nonlocal most, now
        with lock:
            now += size
            most = max(most, now)
        threading.Event().wait(0.01)
        with lock:
            now -= size

    def write(size: int) -> None:
        staged = spool.Spool(upload, lambda *_: b"").stage()
        os.write(staged.fd, bytes(size))
        staged.publish("packs/00")

    threads = [threading.Thread(target=write, args=(size,)) for size in (400, 400, 400, 400, 5000, 100, 900)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 5000  # The one that is larger than all goes alone.


def test_spooled_files_have_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGER_SPOOL_DIR", str(tmp_path))
    fd = spool.temporary()
    os.write(fd, b"x")
    assert os.listdir(tmp_path) == []
    os.close(fd)
    monkeypatch.setenv("IMAGER_SPOOL_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(StorageError, match="nowhere") as caught:
        spool.temporary()
    assert "IMAGER_SPOOL_DIR" in (caught.value.hint or "")


def test_a_copy_of_an_object_that_shrank(folder: FolderStorage) -> None:
    folder.create("packs/00", b"short")
    with pytest.raises(StorageError, match="ends earlier"):
        spool.Spool.reading(folder.read).copy("packs/00", 6)


def test_run_all_waits_for_what_it_began() -> None:
    done: list[int] = []

    def job(number: int) -> int:
        if number == 3:
            raise NotFound("three")
        done.append(number)
        return number

    jobs: list[Callable[[], int]] = [lambda n=n: job(n) for n in range(40)]  # type: ignore[misc]
    with pytest.raises(NotFound):
        spool.run_all(jobs)
    count = len(done)
    assert spool.run_all([lambda: 1, lambda: 2]) == [1, 2]
    assert len(done) == count


# --- addresses -----------------------------------------------------------------------------


def test_addresses(tmp_path: Path) -> None:
    assert location.open_storage(str(tmp_path)).url == str(tmp_path)
    assert location.local_path(location.open_storage(f"file://{tmp_path}/a%20b")) == f"{tmp_path}/a b"
    far = location.open_storage("s3://bucket/some/prefix/")
    assert far.url == "s3://bucket/some/prefix" and not far.local
    assert isinstance(far, Retrying) and isinstance(location.bare(far), ObjectStorage)
    assert location.local_path(far) is None
    limited = location.open_storage(str(tmp_path), Paces(Limits(upload=5)))
    assert isinstance(limited, Limited) and location.local_path(limited) == str(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    ["ftp://x/y", "s3://", "s3://key:secret@bucket/x", "s3:///x", "file://relative", "", "S3://bucket/x"],
)
def test_addresses_that_make_no_sense(wrong: str) -> None:
    with pytest.raises(UsageError) as caught:
        location.open_storage(wrong)
    assert caught.value.hint and "secret" not in str(caught.value)


def test_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from imager.storage.object_settings import settings

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    keys = "[{}]\naws_access_key_id={}\naws_secret_access_key={}\n"
    (tmp_path / "credentials").write_text(keys.format("default", "D", "d") + keys.format("w", "W", "w"))
    more = "[profile w]\nregion=eu-2\nendpoint_url=http://127.0.0.1:1\n[profile sso]\nsso_session=x\n"
    (tmp_path / "config").write_text(f"[default]\nregion=eu-1\n{more}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    found = settings("s3").config
    assert (found["access_key_id"], found["secret_access_key"], found["region"]) == ("D", "d", "eu-1")
    monkeypatch.setenv("AWS_PROFILE", "w")
    both = settings("s3")
    assert both.config["access_key_id"] == "W" and both.config["region"] == "eu-2"
    assert both.client == {"allow_http": True} and both.config["endpoint"] == "http://127.0.0.1:1"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "E")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "e")
    assert settings("s3").config["access_key_id"] == "W"  # The profile that was named.
    monkeypatch.delenv("AWS_PROFILE")
    assert "access_key_id" not in settings("s3").config  # The client reads the environment itself.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://store.example")
    assert settings("s3").client == {} and settings("s3").config["endpoint"] == "https://store.example"
    assert settings("gs").config == {}
    for profile, words in (("none", "no AWS profile"), ("sso", "holds no keys")):
        monkeypatch.setenv("AWS_PROFILE", profile)
        with pytest.raises(UsageError, match=words):
            settings("s3")


def test_recording_counts_what_is_under_way(folder: FolderStorage) -> None:
    recording = Recording(folder)
    recording.create("sets/a", b"x")
    recording.stage().discard()
    assert recording.total == 1 and recording.calls == {"create": 1, "stage": 1} and recording.most == 1
