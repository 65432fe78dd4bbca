"""`imager doctor` finds each promise that a storage breaks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imager.errors import StorageError
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.storage import probe
from imager.storage.base import Storage
from imager.storage.errors import NotFound
from imager.storage.location import open_storage
from imager.storage.rehearsal import Eventual
from imager.storage.wrapper import Wrapper
from tests.objectstores import Store
from tests.unit.storage.backends import Place


def states(diagnosis: probe.Diagnosis) -> dict[str, str]:
    return {finding.promise: finding.state for finding in diagnosis.findings}


def test_storages_that_keep_their_promises(place: Place) -> None:
    storage = place.connect()
    with storage.initializing():
        storage.create("config", b"{}")
    found = probe.probe(storage)
    assert found.ok and probe.BROKEN not in states(found).values(), found.findings
    assert {
        "create-only",
        "create-only, raced",
        "read after write",
        "list after write",
        "delete",
        "move",
    } <= {finding.promise for finding in found.findings if finding.state == probe.KEPT}
    assert storage.list_names("") == ["config"] and storage.strangers() == []


def test_a_folder_without_a_repository(tmp_path: Path) -> None:
    found = probe.probe(open_storage(str(tmp_path)))
    assert found.ok and found.location == str(tmp_path) and os.listdir(tmp_path) == []
    with pytest.raises(StorageError, match="nowhere"):
        probe.probe(open_storage(str(tmp_path / "nowhere")))


def test_a_store_where_two_writers_can_win(careless_s3: Store) -> None:
    """A real server, s3s-fs: it looks whether the name is free, then writes."""
    storage = open_storage(careless_s3.url)
    found = probe.probe(storage)
    assert not found.ok and states(found)["create-only, raced"] == probe.BROKEN
    assert states(found)["create-only"] == probe.KEPT
    assert storage.list_names("") == []


class Overwriting(Wrapper):
    """What an S3 server is that does not know conditional writes."""

    def create(self, name: str, data: bytes) -> None:
        try:
            self.inner.delete(name)
        except NotFound:
            pass
        self.inner.create(name, data)


class Stale(Wrapper):
    """A store that shows the first bytes of any object that it shows."""

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self.inner.read(name, offset, length)[:1]


class Undead(Wrapper):
    """Deleted objects stay."""

    def delete(self, name: str) -> None:
        self.size(name)


@pytest.mark.parametrize(
    ("broken", "promise", "fit"),
    [
        (Overwriting, "create-only", False),
        (Stale, "read after write", False),
        (lambda inner: Eventual(inner, 1), "list after write", False),
        (Undead, "delete", True),
    ],
)
def test_promises_that_are_broken(tmp_path: Path, broken, promise: str, fit: bool) -> None:
    inner = open_storage(str(tmp_path / "r"))
    with inner.initializing():
        inner.create("config", b"{}")
    storage: Storage = broken(inner)
    found = probe.probe(storage)
    assert found.ok == fit and states(found)[promise] == probe.BROKEN, found.findings
    if not fit:
        with pytest.raises(StorageError, match="not fit"):
            probe.refuse_unfit(storage)


def test_init_refuses_what_is_not_safe(careless_s3: Store, tmp_path: Path) -> None:
    storage = open_storage(careless_s3.url)
    with pytest.raises(StorageError, match="not fit for a repository: create-only, raced") as caught:
        Repository.init(storage, Credentials(), encryption="none")
    assert "imager doctor" in (caught.value.hint or "")
    assert storage.list_names("") == [] and storage.strangers() == []


def test_a_key_that_may_not_delete_is_told(s3: Store) -> None:
    storage = open_storage(s3.url)
    s3.door.rule = lambda number, method, key: ("status", 403) if method == "DELETE" else None
    found = probe.probe(storage)
    assert found.ok and states(found)["delete"] == probe.UNKNOWN
    assert "may not delete" in found.findings[-1].detail


def test_the_verb(s3: Store, tmp_path: Path) -> None:
    imager = [sys.executable, "-m", "imager"]
    done = subprocess.run([*imager, "doctor", s3.url, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ok"] and document["location"] == s3.url
    assert all(set(one) == {"promise", "state", "detail", "essential"} for one in document["findings"])
    s3.door.exclusive = False
    try:
        done = subprocess.run([*imager, "doctor", s3.url], capture_output=True, text=True, check=False)
    finally:
        s3.door.exclusive = True
    assert (
        done.returncode == 1 and "BROKEN   create-only, raced" in done.stdout and "is NOT fit" in done.stdout
    )
    done = subprocess.run([*imager, "doctor", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "is fit for a repository" in done.stdout
