"""Making, opening and reading repositories; the reference reader is the judge of what lies there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from imager.errors import IntegrityError, NoRepository, UsageError, WrongKey
from imager.repository.credentials import Credentials
from imager.repository.format import KIND_DATA, canonical, config_message
from imager.repository.repository import Repository
from imager.storage.cached import Cached
from imager.storage.folder import FolderStorage
from imager.storage.location import open_storage
from tests.unit.repository.building import BLOCK, Lab, noise

QUIET = Credentials(interactive=False)


def test_another_repository_may_be_made_where_an_encrypted_one_was(tmp_path: Path) -> None:
    """By whoever uses it; where somebody else did, a person says that it was on purpose."""
    storage = FolderStorage(str(tmp_path / "r"))
    credentials = Credentials(keyfile=str(tmp_path / "key"), interactive=False)
    for encryption in ("keyfile", "none", "keyfile"):
        Repository.init(storage, credentials, encryption=encryption).close()
        Repository.open(storage, credentials).close()
        shutil.rmtree(tmp_path / "r")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGER_STATE_DIR", str(tmp_path / "of another machine"))
        Repository.init(storage, credentials, encryption="none").close()
    with pytest.raises(IntegrityError, match="was encrypted") as told:
        Repository.open(storage, credentials)
    assert told.value.hint
    Path(told.value.hint.rpartition("delete ")[2]).unlink()
    Repository.open(storage, credentials).close()


def test_init_and_open_with_a_passphrase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(str(tmp_path / "r"))
    monkeypatch.setenv("IMAGER_PASSPHRASE", "words")
    made = Repository.init(storage, QUIET, block_size=64 << 10)
    assert made.sealed and made.config.block_size == 64 << 10
    opening = Repository.begin(storage, QUIET, writing=True)
    assert opening.config == made.config
    opened = opening.unlock()
    assert opened.secrets == made.secrets and opened.id == made.id
    assert opened.newest_epoch()[0] == 1
    monkeypatch.setenv("IMAGER_PASSPHRASE", "other words")
    with pytest.raises(WrongKey):
        Repository.open(storage, QUIET)
    monkeypatch.delenv("IMAGER_PASSPHRASE")
    with pytest.raises(WrongKey):
        Repository.open(storage, QUIET)


def test_without_encryption_nothing_is_asked(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "r"))
    made = Repository.init(storage, QUIET, encryption="none")
    opened = Repository.open(storage, QUIET, writing=True)
    assert opened.secrets == made.secrets and not opened.sealed
    assert storage.list_names("slots/") == storage.list_names("epochs/") == []


def test_init_refuses_what_is_in_use(tmp_path: Path) -> None:
    storage = FolderStorage(str(tmp_path / "r"))
    for options in ({"encryption": "rot13"}, {"block_size": 5000}, {"block_size": 8 << 20}):
        with pytest.raises(UsageError):
            Repository.init(storage, QUIET, **{"encryption": "none", **options})  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        Repository.init(storage, QUIET)  # no passphrase
    assert not os.path.exists(storage.root)
    Repository.init(storage, QUIET, encryption="none")
    config = storage.read("config")
    with pytest.raises(UsageError, match="already"):
        Repository.init(storage, QUIET, encryption="none")
    assert storage.read("config") == config
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        Repository.init(FolderStorage(str(other)), QUIET, encryption="none")
    assert sorted(os.listdir(other)) == ["thesis.txt"]


def test_an_interrupted_init_can_be_done_again(tmp_path: Path) -> None:
    root = tmp_path / "r"
    credentials = Credentials(keyfile=str(tmp_path / "key"), interactive=False)
    Repository.init(FolderStorage(str(root)), credentials, encryption="keyfile")
    (root / "config").unlink()
    again = Repository.init(FolderStorage(str(root)), credentials, encryption="keyfile")
    opened = Repository.open(FolderStorage(str(root)), credentials)
    assert opened.secrets == again.secrets
    assert len(os.listdir(root / "slots")) == 1


def test_init_never_takes_the_keys_of_data_away(lab: Lab) -> None:
    lab.backup(sda=noise(2))
    kept = lab.storage.read("config")
    os.unlink(lab.root / "config")
    slots = lab.paths("slots")
    with pytest.raises(UsageError, match="config is gone"):
        Repository.init(lab.storage, lab.credentials(), encryption=lab.encryption)
    assert lab.paths("slots") == slots
    (lab.root / "config").write_bytes(kept)
    lab.reopen()


def test_no_repository(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(NoRepository) as caught:
            Repository.open(FolderStorage(str(place)), QUIET)
        assert "imager init" in (caught.value.hint or "")


def test_every_byte_of_the_config_counts(lab: Lab) -> None:
    path = lab.root / "config"
    raw = path.read_bytes()
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises((IntegrityError, NoRepository)):
            Repository.open(lab.storage, lab.credentials())
    for cut in (0, 1, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(IntegrityError):
            Repository.open(lab.storage, lab.credentials())


def test_a_config_of_somebody_else_is_refused(make_lab: Callable[[str], Lab]) -> None:
    """With an open key of its own it would make us write what its maker can read."""
    lab, other = make_lab("keyfile"), make_lab("none")
    (lab.root / "config").write_bytes((other.root / "config").read_bytes())
    with pytest.raises(IntegrityError, match="was encrypted"):
        Repository.open(lab.storage, lab.credentials())
    value = json.loads((other.root / "config").read_bytes())
    value["repository"] = lab.repository.id.hex()
    value["seal"] = config_message({key: item for key, item in value.items() if key != "seal"}).hex()
    (lab.root / "config").write_bytes(canonical(value))
    with pytest.raises(IntegrityError, match="was encrypted"):
        Repository.open(lab.storage, lab.credentials())
    sealed = make_lab("keyfile")
    mixed = json.loads((sealed.root / "config").read_bytes())
    mixed["block_size"] = 4096
    (sealed.root / "config").write_bytes(canonical(mixed))
    with pytest.raises(IntegrityError, match="signature"):
        Repository.open(sealed.storage, sealed.credentials())


def test_unknown_features_are_refused(lab: Lab) -> None:
    value = json.loads((lab.root / "config").read_bytes())
    value["features"]["write"] = ["ink"]
    (lab.root / "config").write_bytes(canonical(value))
    with pytest.raises(NoRepository, match="ink"):
        Repository.begin(lab.storage, lab.credentials(), writing=True)


def test_one_slot_of_many_damaged_is_no_obstacle_none_left_is(make_lab: Callable[[str], Lab]) -> None:
    lab = make_lab("keyfile")
    (lab.root / "slots" / ("ab" * 16)).write_bytes(b"garbage")
    (lab.root / "slots" / ".DS_Store").write_bytes(b"garbage")
    lab.reopen()
    for path in lab.paths("slots"):
        path.unlink()
    with pytest.raises(IntegrityError, match="slot"):
        Repository.open(lab.storage, lab.credentials())


def test_the_reference_reader_gets_the_images_back(lab: Lab, tmp_path: Path) -> None:
    first = noise(300) + b"a last short block"
    second = bytearray(first)
    second[10 * BLOCK : 20 * BLOCK] = bytes(10 * BLOCK)
    ids = [lab.backup(sda=first, sdb=b"").id, lab.backup(sda=bytes(second), sdb=noise(1)).id]
    for set_id in ids:
        for disk, content in lab.images[set_id].items():
            out = tmp_path / f"{set_id}.{disk}"
            assert run_reference([str(lab.root), set_id, str(out), "--disk", disk], lab) == 0
            assert out.read_bytes() == content


def run_reference(argv: list[str], lab: Lab) -> int:
    """`python -m imager.reference`, in a process of its own."""
    environment = dict(os.environ)
    if lab.encryption == "keyfile":
        environment["IMAGER_KEYFILE"] = str(lab.keyfile)
    return subprocess.run([sys.executable, "-m", "imager.reference", *argv], env=environment).returncode


def test_more_packs_than_stay_open(lab: Lab) -> None:
    content = noise(100)
    manifest = lab.backup(pack_blocks=1, sda=content)
    repository = lab.reopen()
    assert repository.packs_present() == 101
    numbers = [repository.names.intern(name) for name in repository.pack_names(KIND_DATA)]
    for number in numbers:
        fd, keys = repository.pack_reader(number)
        assert os.pread(fd, 8, 0) == b"IMGRPACK" and len(keys) == (1 if repository.sealed else 0)
    assert len(repository._readers) == 64
    with repository.packs(numbers) as readers:
        assert sorted(readers) == sorted(numbers)
        first = {number: os.fstat(fd).st_ino for number, (fd, _) in readers.items()}
        with repository.packs(numbers[:80]):
            pass
        for number in numbers:
            repository.pack_reader(number)
        assert {number: os.fstat(fd).st_ino for number, (fd, _) in readers.items()} == first
        assert len(set(first.values())) == 100
    assert len(repository._readers) == 64 and not repository._pinned
    assert manifest.images[0].root is not None
    repository.close()
    repository.pack_reader(numbers[0])


def test_a_missing_pack_is_named(lab: Lab) -> None:
    lab.backup(sda=noise(2))
    path = lab.paths("packs")[0]
    path.unlink()
    repository = lab.reopen()
    number = repository.names.intern(bytes.fromhex(path.name))
    with pytest.raises(IntegrityError, match=path.name):
        repository.pack_reader(number)
    with pytest.raises(IntegrityError, match=path.name), repository.packs([number]):
        pass
    assert not repository._pinned
    assert repository.packs_present() == 1 and not repository.names.is_present(number)


def test_a_page_is_read_within_its_bounds(lab: Lab) -> None:
    manifest = lab.backup(sda=noise(1000))
    repository = lab.reopen()
    root = manifest.images[0].root
    assert root is not None
    number = repository.names.intern(bytes.fromhex(root.pack))
    record = repository.read_page(number, root.offset, root.length)
    assert record[:4] == b"IREC" and len(record) == root.length
    assert repository.read_page(number, root.offset, root.length) == record
    for offset, length in ((1 << 31, 100), (0, 10), (0, 1 << 30), (root.offset, 64 << 10)):
        with pytest.raises(IntegrityError):
            repository.read_page(number, offset, length)


def test_pages_across_the_edge_of_a_chunk_are_whole(lab: Lab, tmp_path: Path) -> None:
    """Read-ahead goes by chunks of 256 KiB; a record may lie across two of them."""
    lab.backup(sda=noise(64))
    repository = lab.reopen()
    path = lab.paths("packs")[0]
    assert path.stat().st_size > 256 << 10
    number = repository.names.intern(bytes.fromhex(path.name))
    content = path.read_bytes()
    for offset in (0, (256 << 10) - 4096, (256 << 10) - 1, 256 << 10, (256 << 10) + 5):
        length = min(8000, len(content) - offset)
        assert repository.read_page(number, offset, length) == content[offset : offset + length]


def test_no_copy_is_kept_of_a_damaged_map_pack(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be healed where it is, under the same name, and the copy would go on being damaged."""
    monkeypatch.setenv("IMAGER_CACHE_DIR", str(tmp_path / "cache"))
    lab.backup(sda=noise(20))
    (path,) = lab.paths("maps")
    name, whole = f"maps/{path.parent.name}/{path.name}", path.read_bytes()

    def opened() -> bytes:
        storage = Cached(FolderStorage(str(lab.root)))
        storage.list_names("maps/")
        with os.fdopen(storage.open(name), "rb") as file:
            content = file.read()
        storage.close()
        return content

    rotten = whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]
    path.write_bytes(rotten)
    assert opened() == rotten
    path.write_bytes(whole)
    assert opened() == whole
    path.unlink()
    path.write_bytes(rotten)
    assert opened() == whole, "a whole one was kept"
