"""Copies between a folder and an object store, there and back: by the protocol alone."""

from __future__ import annotations

import os
from pathlib import Path

from imager.engine import heal
from imager.events import Silent
from imager.repository import sync
from imager.repository.check import check
from imager.repository.keyless import open_keyless
from imager.repository.sync import SyncSummary, Wishes
from imager.storage.base import Storage
from imager.storage.folder import FolderStorage
from imager.storage.location import open_storage
from imager.storage.rehearsal import Recording
from tests.objectstores import Store
from tests.remote.conftest import Far


def copied(source: Storage, target: Storage, **wishes: object) -> SyncSummary:
    with open_keyless(source) as repository:
        return sync.sync(repository, target, Wishes(**wishes), Silent(), verify=True)  # type: ignore[arg-type]


def two_sets(far: Far, image: Path) -> list[str]:
    image.write_bytes(os.urandom(6 << 20))
    first = far.backup(image).set
    with image.open("r+b") as file:
        file.seek(1 << 20)
        file.write(os.urandom(1 << 18))
    return [first, far.backup(image).set]


def test_there_and_back(far: Far, image: Path, tmp_path: Path, s3: Store) -> None:
    ids = two_sets(far, image)
    folder = FolderStorage(str(tmp_path / "folder"))
    done = copied(open_storage(far.url), folder)
    assert done.ok and list(done.sets) == ids and done.verified == done.packs + done.maps
    near = Far(far.url, tmp_path)
    near.connect = lambda: folder
    near.is_whole()
    near.gives(ids[1], image)
    # And from the folder to another place in the object store.
    elsewhere = Far(f"{far.url}-copy", tmp_path)
    done = copied(folder, open_storage(elsewhere.url))
    assert done.ok and list(done.sets) == ids
    elsewhere.is_whole()
    elsewhere.gives(ids[1], image)
    assert copied(folder, open_storage(elsewhere.url)).bytes == 0


def test_what_a_second_sync_asks_for(far: Far, image: Path, tmp_path: Path) -> None:
    """Nothing new costs a few listings; one more set what it weighs, and not what the repository does."""
    ids = two_sets(far, image)
    folder = FolderStorage(str(tmp_path / "folder"))
    copied(open_storage(far.url), folder)
    recording = Recording(open_storage(far.url))
    assert copied(recording, folder).sets == ()
    read = {name for call, name in recording.names if call in ("open", "read")}
    assert not [name for name in read if name.startswith("packs/")]
    assert len(recording.names) <= 12 + 2 * len(ids), recording.names
    with image.open("r+b") as file:
        file.write(os.urandom(4096))
    far.backup(image)
    recording = Recording(open_storage(far.url))
    done = copied(recording, folder)
    assert (done.packs, done.maps) == (1, 1)
    read = {name for call, name in recording.names if call in ("open", "read")}
    assert len([name for name in read if name.startswith("packs/")]) == 1


def test_a_far_repository_is_checked_without_a_key_and_healed(
    far: Far, image: Path, tmp_path: Path, s3: Store
) -> None:
    ids = two_sets(far, image)
    folder = FolderStorage(str(tmp_path / "folder"))
    copied(open_storage(far.url), folder)
    assert s3.objects is not None
    for kind in ("packs", "maps"):
        path = max((one for one in (s3.objects / kind).rglob("*") if one.is_file()), key=os.path.getsize)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] + b"oops" + data[len(data) // 2 + 4 :])
    with open_keyless(open_storage(far.url)) as repository:
        found = check(repository, Silent(), read_data="all")
        assert {problem.kind for problem in found.problems} == {"pack", "map"}
        assert {hurt.set for problem in found.problems for hurt in problem.hurt} <= set(ids)
        found = check(repository, Silent(), read_data="all", repair=True)
        found = heal.repaired(repository, found, [folder.root], far.credentials, Silent())
        assert found.ok and not found.problems, found.problems
    far.is_whole()
    far.gives(ids[1], image)
