"""A connection that breaks in the midst of a backup or restore is made again, and the work ends whole."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from imager.engine import backup, restore, restore_plan
from imager.errors import StorageError
from imager.events import Silent
from imager.repository.check import check
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.storage.errors import AlreadyExists
from imager.storage.folder import FolderStorage
from imager.storage.retry import Retrying
from imager.storage.ssh import SshStorage
from tests.sshd import Client, Sshd


class Breaking(SshStorage):
    """Breaks its connection with the `at`-th frames that it sends. `how`: which process is killed."""

    def arm(self, how: Callable[[Breaking], None], at: set[int]) -> None:
        self.sent = 0
        self.how = how
        self.at = at
        self.broken = 0

    def _connected(self):  # type: ignore[no-untyped-def]
        connection = super()._connected()
        if hasattr(self, "at") and not hasattr(connection, "watched"):
            connection.watched = True
            send = connection._send

            def counted(number: int, message: object, body: bytes) -> None:
                self.sent += 1
                if self.sent in self.at:
                    self.broken += 1
                    self.how(self)
                send(number, message, body)

            connection._send = counted
        return connection


@pytest.fixture
def bench(sshd: Sshd, owner: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    owner.use(monkeypatch)
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "state"))
    return Bench(sshd, tmp_path)


class Bench:
    """A new repository behind ssh, and an image."""

    _count = 0

    def __init__(self, sshd: Sshd, folder: Path) -> None:
        Bench._count += 1
        self.sshd = sshd
        self.folder = folder
        self.place = sshd.served / f"lost-{Bench._count}"
        (folder / "passphrase").write_text("correct horse")
        self.credentials = Credentials(passphrase_file=str(folder / "passphrase"), interactive=False)
        self.image = folder / "disk.img"
        self.image.write_bytes(os.urandom(24 << 20))
        self.storage = Breaking(sshd.url(self.place))
        Repository.init(self.storage, self.credentials).close()
        self.retrying = Retrying(self.storage, sleep=lambda _: None)

    def open(self) -> Repository:
        return Repository.open(self.retrying, self.credentials, writing=True)

    def backup(self) -> str:
        with self.open() as repository:
            plan = backup.plan(repository, [str(self.image)], backup.BackupOptions(name="disk"), Silent())
            return backup.execute(repository, plan, Silent()).set

    def prove(self) -> None:
        """Whole, read by another storage: the folder itself."""
        folder = FolderStorage(str(self.place))
        with Repository.open(folder, self.credentials) as repository:
            summary = check(repository, Silent(), read_data="all")
            assert summary.ok, summary.problems
        assert os.listdir(self.place / "tmp") == []


def kill_ssh(storage: Breaking) -> None:
    assert storage.pid
    os.kill(storage.pid, signal.SIGKILL)


@pytest.mark.parametrize("whose", ["ssh", "sshd"])
def test_a_backup_goes_on(bench: Bench, whose: str) -> None:
    """The client, or the server's process, is killed three times: in uploads, and between them."""
    bench.storage.arm(kill_ssh if whose == "ssh" else lambda _: bench.sshd.hang_up(), {5, 12, 25})
    bench.backup()
    assert bench.storage.broken == 3
    assert bench.storage.connections == 4
    assert bench.retrying.repeated >= 3
    bench.storage.close()
    bench.prove()


def test_a_restore_goes_on(bench: Bench) -> None:
    set_id = bench.backup()
    bench.storage.arm(kill_ssh, {2, 6, 8})
    out = bench.folder / "out.img"
    with bench.open() as repository:
        plan = restore_plan.plan(repository, set_id, str(out), restore_plan.RestoreOptions(), Silent())
        restore.execute(repository, plan, Silent())
    assert bench.storage.broken >= 2
    assert out.read_bytes() == bench.image.read_bytes()
    bench.storage.close()


def test_a_break_at_every_message(bench: Bench) -> None:
    """The connection breaks at each of a small backup's messages in turn; each backup ends whole."""
    bench.image.write_bytes(os.urandom(1 << 20))
    bench.storage.arm(kill_ssh, set())
    bench.backup()
    count = bench.storage.sent
    for at in range(1, count + 1):
        with bench.image.open("r+b") as file:
            file.write(os.urandom(70_000))
        bench.storage.arm(kill_ssh, {at})
        bench.backup()
        assert bench.storage.broken == 1
    assert count >= 8
    bench.storage.close()
    bench.prove()


def test_the_connection_of_many_threads(bench: Bench) -> None:
    """Sixteen threads lose the one connection that they share, and share the next one."""
    data = {f"packs/{number:02x}/{number:02x}": os.urandom(300_000) for number in range(16)}
    bench.storage.arm(kill_ssh, {40, 120})
    errors: list[BaseException] = []

    def use(name: str) -> None:
        try:
            bench.retrying.create(name, data[name])
            for _ in range(12):
                assert bench.retrying.read(name) == data[name]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=use, args=[name]) for name in data]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert bench.storage.broken == 2 and bench.storage.connections == 3
    bench.storage.close()


def test_a_ctrl_c_leaves_the_connection_alone(bench: Bench) -> None:
    """The terminal sends it to ssh too; what this process still has to say must get through."""
    assert bench.storage.exists("config") and bench.storage.pid
    os.kill(bench.storage.pid, signal.SIGINT)
    bench.storage.create("packs/aa/aa", os.urandom(5 << 20))
    assert bench.storage.connections == 1
    bench.storage.close()


def test_what_took_effect_is_not_done_twice(bench: Bench) -> None:
    """The answer is lost, not the request: what is repeated then finds that it was done."""
    storage = bench.storage

    def after(call: str) -> None:
        """Break the connection when the far end has done `call`, before it answers."""
        link = storage._connected()
        original = link.call

        def once(request, *more, **options):  # type: ignore[no-untyped-def]
            result = original(request, *more, **options)
            if type(request).__name__ == call and not link.lost:
                kill_ssh(storage)
                link.join(20)
                raise link._why()
            return result

        link.call = once  # type: ignore[method-assign]

    big = os.urandom(3 << 20)
    after("Create")
    bench.retrying.create("packs/aa/aa", b"small")
    after("Publish")
    bench.retrying.create("packs/bb/bb", big)
    assert bench.retrying.read("packs/bb/bb") == big
    after("Move")
    bench.retrying.move("packs/aa/aa", "damaged/packs/aa/aa")
    after("Delete")
    bench.retrying.delete("damaged/packs/aa/aa")
    assert storage.connections == 5
    # What others made meanwhile is not taken for one's own.
    FolderStorage(str(bench.place)).create("packs/cc/cc", b"theirs")
    with pytest.raises(AlreadyExists):
        bench.retrying.create("packs/cc/cc", b"mine")
    storage.close()


def test_making_a_repository_is_not_gone_on_with(bench: Bench) -> None:
    """What keeps a second init out ends with the connection: so the first one stops."""
    storage = Breaking(bench.sshd.url(bench.place.with_name("lost-init")))
    storage.arm(kill_ssh, {12})
    with pytest.raises(StorageError, match="while a repository was being made"):
        Repository.init(Retrying(storage, sleep=lambda _: None), bench.credentials)
    storage.close()
    storage = Breaking(storage.url)
    Repository.init(storage, bench.credentials).close()
    storage.close()


def test_a_full_disk_there(bench: Bench) -> None:
    """What the far end says of its disk reaches the person here."""
    if os.geteuid() != 0:
        pytest.skip("mounts a filesystem")
    place = bench.sshd.served / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "small", place], check=True)
    try:
        storage = SshStorage.connect(bench.sshd.url(place / "r"))
        with storage.initializing():
            storage.create("config", b"{}")
        with pytest.raises(StorageError, match="No space left on device") as caught:
            storage.create("packs/aa/aa", bytes(8 << 20))
        assert caught.value.hint and "free some space" in caught.value.hint
        storage.create("packs/bb/bb", b"still there")
        storage.close()
    finally:
        subprocess.run(["umount", place], check=True)
