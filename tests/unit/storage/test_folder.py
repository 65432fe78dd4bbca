"""The folder storage keeps the promises of `Storage` on real filesystems."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.errors import Locked, StorageError
from imager.storage.base import Entry, Storage
from imager.storage.errors import AlreadyExists, Gone, NotFound
from imager.storage.folder import FolderStorage

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a filesystem")


def make(root: Path) -> FolderStorage:
    storage = FolderStorage(str(root))
    with storage.initializing():
        storage.create("config", b"{}")
    return storage


@pytest.fixture(params=["nameless", "named", "linkless"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderStorage:
    """The three ways to stage: without a name, with one, and where the filesystem has no links."""
    made = make(tmp_path / "r")
    if request.param != "nameless":
        made._nameless = False
    if request.param == "linkless":

        def no_link(*_: object, **__: object) -> None:
            raise PermissionError(1, "this filesystem has no links")

        monkeypatch.setattr(os, "link", no_link)
    return made


def test_objects_come_back(storage: FolderStorage) -> None:
    contract: Storage = storage
    contract.create("sets/a", b"hello")
    staged = contract.stage()
    os.write(staged.fd, b"a pack")
    staged.publish("packs/3f/3f00")
    staged.discard()
    assert contract.read("sets/a") == b"hello"
    assert contract.read("sets/a", 1, 3) == b"ell"
    assert contract.read("sets/a", 4, 100) == b"o"
    assert contract.read("sets/a", 9) == b""
    assert contract.size("packs/3f/3f00") == 6
    assert contract.exists("sets/a") and not contract.exists("sets/b")
    assert list(contract.list("packs/")) == [Entry("packs/3f/3f00", 6)]
    assert contract.list_names("sets/") == ["sets/a"]
    assert contract.list_names("index/") == []
    fd = contract.open("packs/3f/3f00")
    assert os.read(fd, 10) == b"a pack"
    os.close(fd)
    assert os.listdir(f"{storage.root}/tmp") == []
    assert (contract.free_space() or 0) > 0


def test_a_name_is_given_once(storage: FolderStorage) -> None:
    storage.create("sets/a", b"first")
    with pytest.raises(AlreadyExists):
        storage.create("sets/a", b"second")
    assert storage.read("sets/a") == b"first"
    assert os.listdir(f"{storage.root}/tmp") == []


def test_one_of_many_writers_wins(storage: FolderStorage) -> None:
    won: list[int] = []
    begin = threading.Barrier(8)

    def write(number: int) -> None:
        begin.wait()
        try:
            storage.create("sets/a", bytes([number]) * 1000)
            won.append(number)
        except AlreadyExists:
            pass

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read("sets/a") == bytes(won) * 1000


def test_the_bytes_are_flushed_before_the_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = make(tmp_path / "r")
    calls: list[str] = []
    fsync, link = os.fsync, os.link

    def flushed(fd: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    def linked(*args: object, **options: object) -> None:
        calls.append("link")
        link(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "link", linked)
    storage.create("sets/a", b"x")
    assert calls == ["file", "link", "folder"]


def test_what_is_discarded_leaves_nothing(storage: FolderStorage) -> None:
    staged = storage.stage()
    os.write(staged.fd, b"x")
    staged.discard()
    staged.discard()
    assert os.listdir(f"{storage.root}/tmp") == []


def test_move_and_delete(storage: FolderStorage) -> None:
    storage.create("packs/3f/3f00", b"x")
    storage.move("packs/3f/3f00", "damaged/packs/3f/3f00")
    assert not storage.exists("packs/3f/3f00")
    assert storage.list_names("damaged/") == ["damaged/packs/3f/3f00"]
    storage.create("packs/3f/3f00", b"y")
    with pytest.raises(AlreadyExists):
        storage.move("packs/3f/3f00", "damaged/packs/3f/3f00")
    assert storage.read("damaged/packs/3f/3f00") == b"x"
    storage.delete("packs/3f/3f00")
    for missing in (
        lambda: storage.delete("packs/3f/3f00"),
        lambda: storage.read("packs/3f/3f00"),
        lambda: storage.move("sets/zz", "damaged/sets/zz"),
    ):
        with pytest.raises(NotFound):
            missing()


def test_names_cannot_lead_out_of_the_folder(storage: FolderStorage) -> None:
    for name in ("../x", "/etc/passwd", "sets/../../x"):
        with pytest.raises(ValueError, match="object name"):
            storage.create(name, b"x")


def test_empty_folders_that_a_copy_left_out_are_made_again(storage: FolderStorage) -> None:
    for folder in ("tmp", "sets", "packs", "index"):
        os.rmdir(f"{storage.root}/{folder}")
    assert storage.list_names("packs/") == []
    storage.create("packs/3f/3f00", b"x")
    storage.create("sets/a", b"x")
    assert storage.exists("sets/a")


def test_a_folder_that_is_gone_is_told_and_not_made_anew(storage: FolderStorage) -> None:
    staged = storage.stage()
    os.write(staged.fd, b"x")
    os.rename(storage.root, storage.root + ".away")
    for use in (
        lambda: storage.create("sets/a", b"x"),
        lambda: staged.publish("sets/b"),
        lambda: storage.read("sets/a"),
        lambda: storage.list_names("sets/"),
        lambda: storage.exists("sets/a"),
    ):
        with pytest.raises(Gone) as caught:
            use()
        assert caught.value.hint
    assert not os.path.exists(storage.root)
    os.mkdir(storage.root)  # an empty mount point
    with pytest.raises(Gone):
        storage.create("sets/a", b"x")
    assert os.listdir(storage.root) == []


def test_a_second_init_meanwhile_is_kept_out(tmp_path: Path) -> None:
    first, second = FolderStorage(str(tmp_path / "r")), FolderStorage(str(tmp_path / "r"))
    assert first.strangers() == []
    with first.initializing(), pytest.raises(Locked), second.initializing():
        pass
    (tmp_path / "r" / "letter.txt").write_text("")
    assert first.strangers() == ["letter.txt"]


_WRITER = """
import os, sys
from imager.storage.folder import FolderStorage
storage = FolderStorage(sys.argv[1])
storage._nameless = sys.argv[2] == "nameless"
staged = storage.stage()
os.write(staged.fd, b"half a pack")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("way", ["nameless", "named"])
def test_a_killed_writer_leaves_no_object_and_sweep_takes_the_rest(tmp_path: Path, way: str) -> None:
    storage = make(tmp_path / "r")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, storage.root, way], **pipes)  # type: ignore[call-overload]
    assert writer.stdout.readline() == b"ready\n"
    left = os.listdir(f"{storage.root}/tmp")
    assert len(left) == (0 if way == "nameless" else 1)
    assert storage.sweep() == []  # it lives
    assert os.listdir(f"{storage.root}/tmp") == left
    writer.kill()
    writer.communicate()
    assert storage.list_names("packs/") == []
    assert storage.sweep() == [f"tmp/{name}" for name in left]
    assert os.listdir(f"{storage.root}/tmp") == []


@pytest.fixture
def small(tmp_path: Path) -> Iterator[FolderStorage]:
    """A repository folder on a filesystem of 1 MiB."""
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "imager-test", str(mount)], check=True)
    try:
        yield make(mount / "r")
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(mount)], check=True)
        subprocess.run(["umount", str(mount)], check=True)


@needs_root
@pytest.mark.root
def test_a_full_disk_is_told_and_leaves_what_was_there(small: FolderStorage) -> None:
    small.create("sets/a", b"x")
    with pytest.raises(StorageError, match="No space left") as caught:
        small.create("sets/b", bytes(2 << 20))
    assert "free some space" in (caught.value.hint or "")
    assert small.list_names("sets/") == ["sets/a"]
    small.create("sets/c", bytes(100 << 10))  # the space that the failure held is free again


@needs_root
@pytest.mark.root
def test_a_read_only_disk_is_told(small: FolderStorage) -> None:
    small.create("sets/a", b"x")
    subprocess.run(["mount", "-o", "remount,ro", os.path.dirname(small.root)], check=True)
    with pytest.raises(StorageError, match="Read-only") as caught:
        small.create("sets/b", b"x")
    assert "writable" in (caught.value.hint or "")
    assert small.read("sets/a") == b"x"
