"""A set exists by its manifest, written last; a writer that fails leaves nothing that counts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imager import _native
from imager.errors import IntegrityError, Locked, StorageError
from imager.events import Silent
from imager.repository import imageset
from imager.repository.check import check
from imager.repository.credentials import Credentials
from imager.repository.format import canonical
from imager.repository.repository import Repository
from imager.repository.session import Session
from imager.storage.errors import Gone
from imager.storage.folder import FolderStaged, FolderStorage
from tests.unit.repository.building import BLOCK, Lab, noise


def fill(session: Session, blocks: int = 4, seed: int = 0) -> _native.PackWriter:
    """A data pack with blocks in it."""
    repository, content = session.repository, noise(blocks, seed)
    pack = session.new_data_pack()
    known = _native.Known(repository.names)
    _native.scan(
        repository.vault,
        content,
        [(0, blocks)],
        image_size=len(content),
        block_size=BLOCK,
        base=None,
        pack=pack,
        known=known,
    )
    return pack


def test_objects_are_published_in_the_order_of_the_page(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    link = FolderStorage._link

    def linked(self: FolderStorage, fd: int, staged: str | None, name: str) -> None:
        link(self, fd, staged, name)
        order.append(name.partition("/")[0])

    monkeypatch.setattr(FolderStorage, "_link", linked)
    lab.backup(pack_blocks=50, sda=noise(300))
    assert order == ["sessions", *["packs"] * 6, "maps", "index", "sets"]


def test_a_commit_waits_for_what_is_under_way(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two packs are under way; the third waits, and so does the commit."""
    gate = threading.Event()
    publish = FolderStaged.publish

    def slow(self: FolderStaged, name: str) -> None:
        if name.startswith("packs/"):
            assert gate.wait(30)
        publish(self, name)

    monkeypatch.setattr(FolderStaged, "publish", slow)
    with Session.begin(lab.repository) as session:
        for seed in range(2):
            name = session.seal(fill(session, seed=seed))
            assert name is not None and lab.repository.names.intern(name) >= 0
        assert lab.paths("packs") == []
        third = fill(session, seed=2)
        waiting = threading.Thread(target=session.seal, args=(third,))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        gate.set()
        waiting.join(30)
        session.drain()
        assert len(lab.paths("packs")) == 3


def test_an_aborted_session_cannot_commit(lab: Lab) -> None:
    with Session.begin(lab.repository) as session:
        session.drain()
        mark = canonical({"session": session.id, "created": 1, "reason": "the operator said so"})
        lab.storage.create("sets/" + session.id, b"IMGRABRT" + mark)
        with pytest.raises(Locked, match="the operator said so"):
            session.commit(b"a manifest")
    with Session.begin(lab.repository) as session:
        lab.storage.create("sets/" + session.id, b"something else")
        with pytest.raises(IntegrityError):
            session.commit(b"a manifest")


def test_what_is_abandoned_leaves_nothing(lab: Lab) -> None:
    with pytest.raises(RuntimeError), Session.begin(lab.repository) as session:
        fill(session)
        raise RuntimeError
    assert lab.paths("sessions") == lab.paths("packs") == lab.paths("tmp") == []
    with Session.begin(lab.repository) as session:
        session.seal(fill(session))
    # The pack stays for a prune to find, which need not wait for this session.
    assert len(lab.paths("packs")) == 1 and lab.paths("sessions") == []
    assert check(lab.reopen(), Silent(), read_data="all").ok


def test_an_empty_pack_is_no_pack(lab: Lab) -> None:
    with Session.begin(lab.repository) as session:
        assert session.seal(session.new_data_pack()) is None
        with pytest.raises(ValueError, match="not sealed"):
            session.new_map_pack()
            session.commit(b"")
    assert lab.paths("packs") == lab.paths("maps") == lab.paths("sets") == []


def test_the_first_error_in_the_background_is_told_and_nothing_follows_it(lab: Lab) -> None:
    away = lab.root.with_name("away")
    session = Session.begin(lab.repository)
    session.seal(fill(session))
    session.drain()
    pack = fill(session, seed=1)
    os.rename(lab.root, away)
    try:
        session.seal(pack)
        with pytest.raises(Gone):
            session.drain()
        for use in (session.drain, lambda: session.create("index/x", b""), lambda: session.commit(b"")):
            with pytest.raises(Gone):
                use()
        session.abandon()
    finally:
        os.rename(away, lab.root)
    assert lab.paths("sets") == [] and len(lab.paths("packs")) == 1


def test_sessions_of_several_threads(lab: Lab) -> None:
    """Packs handed in from many threads each get their own sequence number and name."""
    with Session.begin(lab.repository) as session:
        threads = [
            threading.Thread(target=lambda seed=seed: session.seal(fill(session, seed=seed)))
            for seed in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        session.drain()
        sequences = {int.from_bytes(path.read_bytes()[48:56], "little") for path in lab.paths("packs")}
        assert sequences == set(range(6))


def test_a_key_that_cannot_read_can_write(make_lab: Callable[[str], Lab]) -> None:
    from imager.repository.keys import Secrets

    lab = make_lab("keyfile")
    full = lab.repository
    secrets = Secrets(full.secrets.id_key, full.secrets.signing_seed, {})
    writer = Repository(lab.storage, full.config, secrets)
    with Session.begin(writer) as session:
        session.seal(fill(session))
        session.drain()
        assert session.envelope is not None
        assert full.open_envelope(session.envelope)[1] == session.key


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a filesystem")
@pytest.mark.root
def test_a_full_disk_ends_the_session_and_hurts_nothing(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "imager-test", str(mount)], check=True)
    try:
        storage = FolderStorage(str(mount / "r"))
        credentials = Credentials(interactive=False)
        repository = Repository.init(storage, credentials, encryption="none")
        small = Lab(mount / "r", tmp_path / "key", "none", repository)
        kept = small.backup(sda=noise(20))
        with pytest.raises(StorageError, match="No space left") as caught:
            for seed in range(10):
                with Session.begin(repository) as session:
                    try:
                        pack = fill(session, 100, seed)
                    except _native.WriteError as error:
                        from imager.repository.session import writing_failed

                        raise writing_failed(repository, error) from error
                    session.seal(pack)
                    session.drain()
        assert "free some space" in (caught.value.hint or "")
        assert [item.id for item in imageset.list_sets(repository).sets] == [kept.id]
        repository.close()
        assert check(Repository.open(storage, credentials), Silent(), read_data="all").ok
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


_BACKUP = """
import sys
from pathlib import Path
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.storage.folder import FolderStorage
from tests.unit.repository.building import Lab, noise
root, key, encryption = sys.argv[1:4]
credentials = Credentials(keyfile=key, interactive=False)
lab = Lab(Path(root), Path(key), encryption, Repository.open(FolderStorage(root), credentials, writing=True))
print("ready", flush=True)
for seed in range(100):
    lab.backup(pack_blocks=20, sda=noise(100, seed))
    print("done", flush=True)
"""


@pytest.fixture
def moments() -> Iterator[int]:
    """A killed writer at several moments of a backup."""
    return iter(range(12))


def test_a_killed_writer_leaves_every_earlier_set_whole(lab: Lab, moments: Iterator[int]) -> None:
    first = lab.backup(sda=noise(100))
    for moment in moments:
        argv = [sys.executable, "-c", _BACKUP, str(lab.root), str(lab.keyfile), lab.encryption]
        writer = subprocess.Popen(argv, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        try:
            writer.wait(timeout=0.002 * moment)
        except subprocess.TimeoutExpired:
            pass
        writer.kill()
        finished = writer.communicate()[0].count(b"done")
        summary = check(lab.reopen(), Silent(), read_data="all")
        assert summary.ok, summary.problems
        listing = imageset.list_sets(lab.repository)
        assert first.id in {item.id for item in listing.sets}
        assert len(listing.sets) >= 1 + finished
    assert lab.backup(sda=noise(100, 7)).sequence == len(imageset.list_sets(lab.repository).sets)
    assert check(lab.reopen(), Silent(), read_data="all").ok


def test_two_writers_at_once_both_end_whole(lab: Lab) -> None:
    argv = [sys.executable, "-c", _BACKUP.replace("range(100)", "range(3)")]
    argv += [str(lab.root), str(lab.keyfile), lab.encryption]
    writers = [subprocess.Popen(argv, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    summary = check(lab.reopen(), Silent(), read_data="all")
    assert summary.ok and summary.sets == 6
