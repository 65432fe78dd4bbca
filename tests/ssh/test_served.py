"""What a key in authorized_keys is bound to holds, with the real commands and a real server."""

from __future__ import annotations

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from imager.engine import backup
from imager.events import Silent
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.storage.cached import Cached
from imager.storage.errors import NotFound
from imager.storage.rehearsal import Recording
from imager.storage.ssh import SshStorage
from imager.storage.wire import Refused
from tests.cli.conftest import Imager
from tests.sshd import Client, Sshd


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(3 << 20) + bytes(1 << 20))
    return path


@pytest.fixture(scope="module")
def host(sshd: Sshd) -> Client:
    """A machine that may only add backups, in a folder of its own."""
    return sshd.client("host", forced=f"--stdio --append-only --restrict {sshd.served}/host")


def objects(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_append_only_machine(
    imager: Imager, sshd: Sshd, host: Client, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imager.environment |= {**host.environment, "IMAGER_PASSPHRASE": "correct horse"}
    place = sshd.served / "host/first"
    url = sshd.url(place)
    imager.ok("init", url)
    imager.ok("-r", url, "backup", image, "--name", "disk")
    with image.open("r+b") as file:
        file.write(os.urandom(100_000))
    imager.ok("-r", url, "backup", image, "--name", "disk")
    imager.ok("-r", url, "check", "--read-data")
    imager.ok("-r", url, "restore", "latest", tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == image.read_bytes()

    # A second init is told what any other is told; a repair needs more rights than this key has.
    before = objects(place)
    assert "already" in imager("init", url).err
    pack = next(name for name in before if name.startswith("packs/"))
    (place / pack).chmod(0o600)
    (place / pack).write_bytes(before[pack][:-1] + bytes([before[pack][-1] ^ 1]))
    ended = imager("-r", url, "check", "--read-data", "--repair")
    assert ended.code == 1 and "served append-only" in ended.err and "hint: " in ended.err
    (place / pack).write_bytes(before[pack])
    assert objects(place) == before

    host.use(monkeypatch)
    storage = SshStorage.connect(url)
    assert storage.append_only and Recording(storage).append_only
    for name in before:
        with pytest.raises(Refused, match="append-only"):
            storage.delete(name)
        with pytest.raises(Refused, match="append-only"):
            storage.move(name, "damaged/" + name)
    storage.close()
    assert objects(place) == before


@pytest.mark.parametrize("where", ["elsewhere", "host/../elsewhere", "host/link", ""])
def test_another_folder(imager: Imager, sshd: Sshd, host: Client, where: str) -> None:
    (sshd.served / "elsewhere").mkdir(exist_ok=True)
    (sshd.served / "host").mkdir(exist_ok=True)
    link = sshd.served / "host/link"
    if not link.is_symlink():
        link.symlink_to(sshd.served / "elsewhere")
    url = sshd.url(sshd.served / where)
    ended = imager("init", url, "--encryption", "none", env=host.environment)
    assert ended.code == 1 and "outside of what is served here" in ended.err and "--restrict" in ended.err
    assert list((sshd.served / "elsewhere").iterdir()) == []


def test_the_key_gives_no_shell(sshd: Sshd, host: Client) -> None:
    """Whatever command is asked for, the forced one runs: it wants its own language."""
    argv = [host.ssh, "-p", str(sshd.port), "--", "127.0.0.1", "touch /tmp/imager-was-here; id"]
    done = subprocess.run(argv, input=b"id\n", capture_output=True, timeout=60, check=False)
    assert done.returncode == 1 and b"uid=" not in done.stdout
    assert b"does not speak this protocol" in done.stderr
    assert not os.path.exists("/tmp/imager-was-here")


def test_a_reader(imager: Imager, sshd: Sshd, image: Path, tmp_path: Path) -> None:
    reader = sshd.client("reader", forced=f"--stdio --read-only --restrict {sshd.served}")
    url = sshd.url(sshd.served / "read")
    imager.ok("init", url, "--encryption", "none")
    imager.ok("-r", url, "backup", image, "--name", "disk")
    imager.environment |= reader.environment
    imager.ok("-r", url, "verify", "latest")
    imager.ok("-r", url, "restore", "latest", tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == image.read_bytes()
    ended = imager("-r", url, "backup", image, "--name", "disk")
    assert ended.code == 1 and "served read-only" in ended.err


def test_two_writers_at_once(imager: Imager, sshd: Sshd, tmp_path: Path) -> None:
    url = sshd.url(sshd.served / "two")
    imager.ok("init", url, "--encryption", "none")
    running = []
    for number in range(2):
        image = tmp_path / f"{number}.img"
        image.write_bytes(os.urandom(6 << 20))
        argv = imager.argv("-r", url, "backup", image, "--name", f"disk{number}", "--json")
        running.append(
            subprocess.Popen(argv, env=imager.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    for process in running:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    imager.ok("-r", url, "check", "--read-data")
    for number in range(2):
        out = tmp_path / f"out{number}.img"
        imager.ok("-r", url, "restore", f"disk{number}", out)
        assert out.read_bytes() == (tmp_path / f"{number}.img").read_bytes()


def test_round_trips(sshd: Sshd, owner: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup of what did not change asks at most 12 times; a full one little more than it has packs."""
    owner.use(monkeypatch)
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("IMAGER_CACHE_DIR", str(tmp_path / "cache"))
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(20 << 20))
    url = sshd.url(sshd.served / "counted")
    (tmp_path / "passphrase").write_text("correct horse")
    credentials = Credentials(passphrase_file=str(tmp_path / "passphrase"), interactive=False)
    Repository.init(SshStorage.connect(url), credentials).close()
    asked: list[int] = []
    for turn in range(3):
        far = SshStorage.connect(url)
        storage = Recording(far)
        with Repository.open(Cached(storage), credentials, writing=True) as repository:
            plan = backup.plan(repository, [str(image)], backup.BackupOptions(name="disk"), Silent())
            summary = backup.execute(repository, plan, Silent())
        assert summary.strategy == ("incremental" if turn else "full")
        asked.append(far.requests)
        calls = Counter(call for call in storage.calls.elements() if call != "stage")
        assert far.requests <= calls.total() + 1, "a call is one question, and one more opens the folder"
        storage.close()
    packs = len(list((sshd.served / "counted/packs").rglob("*/*")))
    maps = len(list((sshd.served / "counted/maps").rglob("*/*")))
    assert asked[0] <= 1.2 * (packs + maps) + 20
    assert asked[1] == asked[2] <= 12 + 1


def test_a_copy_that_is_served_append_only(
    imager: Imager, sshd: Sshd, host: Client, image: Path, tmp_path: Path
) -> None:
    """It takes sets, also a choice of them; of keys and revocations it is told that they are not copied."""
    imager.environment |= {**host.environment, "IMAGER_PASSPHRASE": "correct horse"}
    source, url = str(tmp_path / "source"), sshd.url(sshd.served / "host/copy")
    imager.ok("init", source)
    (tmp_path / "key").write_bytes(b"k" * 40)
    add = ("-r", source, "key", "add", "--new-keyfile", tmp_path / "key", "--role", "write", "--host", "old")
    imager.ok(*add, "--label", "old")
    imager.ok("-r", source, "key", "remove", "old")
    for _ in range(3):
        with image.open("r+b") as file:
            file.write(os.urandom(100_000))
        imager.ok("-r", source, "backup", image, "--name", "disk")
    # It begins with all that there is, the revocation too, but for the older sets.
    imager.ok("sync", source, url, "--latest", "1")
    copy = sshd.served / "host/copy"
    assert len(list((copy / "revoked").iterdir())) == len(list((copy / "absent").iterdir())) == 1
    imager.ok(*add, "--label", "new")
    imager.ok("-r", source, "key", "remove", "new")
    (tmp_path / "other").write_bytes(b"o" * 40)
    imager.ok("-r", source, "key", "add", "--new-keyfile", tmp_path / "other", "--label", "other")
    for _ in range(2):
        with image.open("r+b") as file:
            file.write(os.urandom(100_000))
        imager.ok("-r", source, "backup", image, "--name", "disk")
    ids = [one["set"] for one in imager.ok("-r", source, "list", "--json").document["sets"]]
    imager.ok("-r", source, "forget", ids[-2])
    before = objects(copy)
    ended = imager.ok("sync", source, url, "--latest", "1")
    assert "1 key slots, 1 revocations of the source are not copied" in ended.out + ended.err
    fresh = objects(copy).keys() - before.keys()
    kinds = {"packs", "maps", "index", "sets", "absent", "sessions"}
    assert {name.partition("/")[0] for name in fresh} == kinds
    imager.ok("-r", url, "restore", "latest", tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == image.read_bytes()
    checked = imager("-r", url, "check")
    assert checked.code == 30 and "this machine saw that writer's key being revoked" in checked.out
    # With all rights the rest comes, too.
    ended = imager.ok("sync", source, str(copy))
    assert "gets 1 key slots that it lacked" in ended.out + ended.err
    assert len(list((copy / "revoked").iterdir())) == 2
    imager.ok("-r", url, "check", "--read-data")


def test_a_long_listing_and_a_missing_object(
    sshd: Sshd, owner: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner.use(monkeypatch)
    place = sshd.served / "long"
    storage = SshStorage.connect(sshd.url(place))
    with storage.initializing():
        storage.create("config", b"{}")
    names = sorted(f"index/{number:064x}" for number in range(5000))
    for name in names:
        (place / name).touch()
    before = storage.requests
    assert sorted(storage.list_names("index/")) == names
    assert storage.requests == before + 1, "one question, however long the answer"
    with pytest.raises(NotFound, match=r"sets/none"):
        storage.open("sets/none")
    storage.close()
