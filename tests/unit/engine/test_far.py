"""Reading from a storage that is not local: ahead, at once, bounded, and never what was not fetched."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from imager.engine import restore
from imager.engine.restore import RestoreOptions
from imager.engine.verify import verify
from imager.errors import StorageError
from imager.events import Silent
from imager.repository import ahead
from imager.repository.repository import Repository
from imager.storage import spool
from imager.storage.base import Storage
from imager.storage.errors import NotFound, Unavailable
from imager.storage.folder import FolderStorage
from imager.storage.rehearsal import Distant, Recording
from imager.storage.wrapper import Wrapper
from tests.workbench import Workbench, same

T = TypeVar("T")
MIB = 1 << 20


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "state"))
    return Workbench(tmp_path, encryption="keyfile", block_size=4096)


def opened(bench: Workbench, storage: Storage) -> Repository:
    return Repository.open(storage, bench.credentials, writing=True)


def gives(bench: Workbench, storage: Storage, text: str, image: Path) -> None:
    target = bench.folder / "restored"
    with opened(bench, storage) as repository:
        plan = restore.plan(repository, text, str(target), RestoreOptions(verify=False), Silent())
        restore.execute(repository, plan, Silent())
    same(target, image, text)
    target.unlink()


def distant(bench: Workbench) -> Distant:
    return Distant(FolderStorage(str(bench.root)))


def scattered(path: Path, seed: int, size: int = 24 * MIB) -> Path:
    """Random data with holes and repeated blocks."""
    chance = random.Random(seed)
    same_block = chance.randbytes(4096)
    with path.open("wb") as file:
        for at in range(0, size, 64 << 10):
            what = chance.random()
            if what < 0.2:
                continue
            file.seek(at)
            file.write(same_block * 16 if what < 0.3 else chance.randbytes(64 << 10))
        file.truncate(size)
    return path


def test_sets_over_many_packs(bench: Workbench, tmp_path: Path) -> None:
    """Incrementals scatter an image over packs: each comes back, from far as from near."""
    image = scattered(tmp_path / "image", 1)
    bench.backup(image, name="d")
    chance = random.Random(2)
    copies = []
    for turn in range(6):
        with image.open("r+b") as file:
            for _ in range(40):
                file.seek(chance.randrange(24 * MIB // 4096) * 4096)
                file.write(chance.randbytes(4096))
        bench.backup(image, name="d")
        copy = tmp_path / f"copy{turn}"
        copy.write_bytes(image.read_bytes())
        copies.append((bench.backup(image, name="d").set, copy))
    for set_id, copy in copies:
        gives(bench, distant(bench), set_id, copy)
        with opened(bench, distant(bench)) as repository:
            assert verify(repository, set_id, Silent()).ok


class Watched(Wrapper):
    """A far storage that notes how much is under way, and takes its time."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self.lock = threading.Lock()
        self.now = self.most = 0
        self.ranges: list[tuple[str, int, int]] = []

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            if name.startswith("packs/") and offset:
                self.ranges.append((name, offset, offset + (length or 0)))
        time.sleep(0.005)
        try:
            return self.inner.read(name, offset, length)
        finally:
            with self.lock:
                self.now -= 1


def test_what_is_under_way_is_bounded(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "SLICE", 1 * MIB)
    monkeypatch.setattr(ahead, "AHEAD", 4 * MIB)
    monkeypatch.setattr(spool, "PIECE", 256 << 10)
    image = tmp_path / "image"
    image.write_bytes(os.urandom(24 * MIB))
    bench.backup(image, name="d")
    held: list[int] = []
    begin = ahead._Ahead._begin

    def begun(self: ahead._Ahead, start: int, end: int) -> None:
        begin(self, start, end)
        held.append(self._held)

    monkeypatch.setattr(ahead._Ahead, "_begin", begun)
    watched = Watched(distant(bench))
    gives(bench, watched, "d", image)
    assert 8 <= watched.most <= spool.IN_FLIGHT
    assert 4 * MIB <= max(held) <= 4 * MIB + 2 * MIB
    # Each byte was asked for once, but those of the image's first MiB, which is fetched twice more with
    # what lies between its records (threads write them in no order).
    total = sum(end - start for _, start, end in watched.ranges)
    assert total <= 8 * MIB + sum(path.stat().st_size for path in (bench.root / "packs").rglob("*"))


def test_only_what_is_needed_is_fetched(bench: Workbench, tmp_path: Path) -> None:
    """One block of a large image: a few KiB of its pack."""
    from imager.engine import images
    from imager.engine.stream import Streamer

    image = tmp_path / "image"
    image.write_bytes(os.urandom(24 * MIB))
    bench.backup(image, name="d")
    watched = Watched(distant(bench))
    with opened(bench, watched) as repository:
        streamer = Streamer(images.select_one(repository, "d"))
        streamer.fill(10 * MIB, 10 * MIB + 4096)
        assert os.pread(streamer.fd, 4096, 10 * MIB) == image.read_bytes()[10 * MIB : 10 * MIB + 4096]
        streamer.close()
    assert sum(end - start for _, start, end in watched.ranges) < 8192


class Broken(Wrapper):
    """Reads of packs, but for their heads, end in `error`."""

    def __init__(self, inner: Storage, error: Exception, after: int = 3) -> None:
        super().__init__(inner)
        self.error = error
        self.left = after

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        if name.startswith("packs/") and offset:
            self.left -= 1
            if self.left < 0:
                raise self.error
        return self.inner.read(name, offset, length)


@pytest.mark.parametrize("after", [0, 3])
def test_a_fetch_that_fails_ends_the_work(bench: Workbench, tmp_path: Path, after: int) -> None:
    image = scattered(tmp_path / "image", 3, 40 * MIB)
    bench.backup(image, name="d")
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Unavailable, match="gone fishing"):
        gives(bench, Broken(distant(bench), Unavailable("gone fishing"), after), "d", image)
    assert not any((tmp_path / "restored").read_bytes()[:MIB])
    (tmp_path / "restored").unlink()
    assert len(os.listdir("/proc/self/fd")) <= files + 1
    gives(bench, distant(bench), "d", image)


def test_a_pack_that_vanishes_meanwhile_is_missing(bench: Workbench, tmp_path: Path) -> None:
    image = scattered(tmp_path / "image", 4)
    bench.backup(image, name="d")
    with opened(bench, Broken(distant(bench), NotFound("deleted just now"), 0)) as repository:
        found = verify(repository, "d", Silent())
    assert not found.ok and all("missing" in one.reason for one in found.damage)
    with opened(bench, Broken(distant(bench), StorageError("no access to it"), 0)) as repository:
        found = verify(repository, "d", Silent())
    assert not found.ok and all("no access" in one.reason for one in found.damage)


def test_map_pages_are_asked_for_before_they_are_needed(bench: Workbench, tmp_path: Path) -> None:
    """A walk of a map of 2 MiB waits for few of its pieces."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        for at in range(40_000):
            file.seek(at * 4096)
            file.write((at + 1).to_bytes(8, "little"))
        file.truncate(40_000 * 4096)
    bench.backup(image, name="d")
    watched = Watched(distant(bench))
    with opened(bench, watched) as repository:
        from imager.engine import images

        (chosen,) = images.select(repository, "d")
        watched.most = 0
        assert chosen.totals()[0] == 40_000 * 4096
    assert watched.most >= 4
    recording = Recording(distant(bench))
    with opened(bench, recording) as repository:
        (chosen,) = images.select(repository, "d")
        chosen.totals()
    pieces = [name for call, name in recording.names if call == "read" and name.startswith("maps/")]
    size = sum(path.stat().st_size for path in (bench.root / "maps").rglob("*") if path.is_file())
    assert len(pieces) <= size // (256 << 10) + 8


def test_a_large_map_pack_is_not_copied(bench: Workbench, tmp_path: Path) -> None:
    """A backup on top of a far set opens nothing but index segments as whole."""
    image = scattered(tmp_path / "image", 5)
    bench.backup(image, name="d")
    recording = Recording(distant(bench))
    from imager.engine import backup
    from imager.engine.backup import BackupOptions

    with opened(bench, recording) as repository:
        plan = backup.plan(repository, [str(image)], BackupOptions(name="d"), Silent())
        assert backup.execute(repository, plan, Silent()).images[0].blocks_changed == 0
    sized = [name for call, name in recording.names if call == "size"]
    assert all(name.startswith("index/") for name in sized), sized


def test_an_interrupted_backup_does_not_wait_for_uploads_in_line(bench: Workbench) -> None:
    from imager.repository.session import Session

    gate = threading.Event()

    class Waiting(Wrapper):
        def around(self, call: str, name: str, do: Callable[[], T]) -> T:
            if call == "sweep":  # What a session does first in the background; the others wait for it.
                gate.wait(10)
            return do()

    with opened(bench, Waiting(distant(bench))) as repository:
        session = Session.begin(repository)
        for number in range(2):
            session.create(f"index/{number:064x}", b"never sent")
        threading.Timer(0.1, gate.set).start()
        session.abandon()
    assert not list((bench.root / "index").iterdir())
