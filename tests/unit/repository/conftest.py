"""Repositories in temporary folders, and a machine without memory or secrets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.storage.folder import FolderStorage
from tests.unit.repository.building import Lab


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own memory or secrets takes part."""
    for name in list(os.environ):
        if name.startswith("IMAGER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "state"))


@pytest.fixture
def make_lab(tmp_path: Path) -> Iterator[Callable[[str], Lab]]:
    """Creates repositories: `none` or `keyfile`."""
    made: list[Lab] = []

    def make(encryption: str) -> Lab:
        root, keyfile = tmp_path / f"repo{len(made)}", tmp_path / f"key{len(made)}"
        credentials = Credentials(keyfile=str(keyfile), interactive=False)
        repository = Repository.init(FolderStorage(str(root)), credentials, encryption=encryption)
        made.append(Lab(root, keyfile, encryption, repository))
        return made[-1]

    yield make
    for lab in made:
        lab.repository.close()


@pytest.fixture(params=["none", "keyfile"])
def lab(request: pytest.FixtureRequest, make_lab: Callable[[str], Lab]) -> Lab:
    """An empty repository, without and with encryption."""
    return make_lab(request.param)
