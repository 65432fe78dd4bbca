"""Repositories in an object store."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from imager.engine import backup, restore
from imager.engine.backup import BackupOptions, BackupSummary
from imager.engine.restore import RestoreOptions
from imager.engine.verify import verify
from imager.events import Silent
from imager.repository.check import check
from imager.repository.credentials import Credentials
from imager.repository.imageset import list_sets
from imager.repository.repository import Repository
from imager.storage.base import Storage
from imager.storage.location import open_storage
from tests.objectstores import Store, careless_s3, moto_door, other_s3, s3, s3s_door  # noqa: F401
from tests.workbench import same


class Far:
    """A repository in an object store, opened anew for each step; `wrap` decorates its storage."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        # Sealed, as most are; a passphrase would cost a second each time.
        self.credentials = Credentials(keyfile=str(folder / "key"), interactive=False)
        self.connect: Callable[[], Storage] = lambda: open_storage(url)

    def init(self, **options: object) -> None:
        storage = open_storage(self.url)
        Repository.init(storage, self.credentials, encryption="keyfile", **options).close()  # type: ignore[arg-type]

    def open(self, storage: Storage | None = None) -> Repository:
        return Repository.open(storage or self.connect(), self.credentials, writing=True)

    def backup(self, image: Path, storage: Storage | None = None, **options: object) -> BackupSummary:
        with self.open(storage) as repository:
            wanted = BackupOptions(name="d", **options)  # type: ignore[arg-type]
            plan = backup.plan(repository, [str(image)], wanted, Silent())
            return backup.execute(repository, plan, Silent())

    def gives(self, text: str, image: Path, storage: Storage | None = None) -> None:
        """A restore gives exactly the image."""
        target = self.folder / "restored"
        with self.open(storage) as repository:
            plan = restore.plan(repository, text, str(target), RestoreOptions(), Silent())
            assert restore.execute(repository, plan, Silent()).verified
        same(target, image, text)
        target.unlink()

    def sets(self) -> list[str]:
        with self.open() as repository:
            listing = list_sets(repository)
            assert not listing.problems
            return [one.id for one in listing.sets]

    def is_whole(self) -> None:
        """All sets verify, and check finds nothing."""
        for one in self.sets():
            with self.open() as repository:
                found = verify(repository, one, Silent())
                assert found.ok, found.damage
        with self.open() as repository:
            summary = check(repository, Silent(), read_data="all")
            assert summary.ok and not summary.problems, summary.problems


@pytest.fixture
def far(s3: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Far:  # noqa: F811
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("IMAGER_CACHE_DIR", str(tmp_path / "cache"))
    made = Far(s3.url, tmp_path)
    made.init(block_size=4096)
    return made


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """3 MiB: random, repeated, zero."""
    path = tmp_path / "disk.img"
    half = os.urandom(1 << 20)
    path.write_bytes(half + bytes(1 << 20) + half)
    return path
