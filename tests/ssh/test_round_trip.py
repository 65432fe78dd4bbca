"""A repository on another machine, from init to restore, by the command."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from imager.engine.verify import verify
from imager.events import Silent
from imager.repository.check import check
from imager.repository.repository import Repository
from imager.storage.location import open_storage
from tests.cli.conftest import Imager
from tests.sshd import Sshd
from tests.unit.test_golden import GOLDEN, unpack
from tests.workbench import Workbench


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Some MiB that do not compress, a hole, text, and a last block that is not full."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(os.urandom(5 << 20) + b"text " * 60_000)
        file.seek(12 << 20)
        file.write(os.urandom(100_001))
    return path


@pytest.mark.parametrize("encryption", ["none", "passphrase"])
def test_a_whole_life(imager: Imager, sshd: Sshd, image: Path, tmp_path: Path, encryption: str) -> None:
    imager.environment["IMAGER_PASSPHRASE"] = "correct horse"
    url = sshd.url(sshd.served / f"life-{encryption}")
    imager.ok("init", url, "--encryption", encryption)
    imager.ok("-r", url, "backup", image, "--name", "disk")
    before = image.read_bytes()
    with image.open("r+b") as file:
        file.seek(1 << 20)
        file.write(os.urandom(50_000))
    imager.ok("-r", url, "backup", image, "--name", "disk")
    listed = imager.ok("-r", url, "list", "--json").document
    first, second = sorted(listed["sets"], key=lambda item: item["sequence"])
    assert imager.ok("-r", url, "show", "latest", "--json").document["set"] == second["set"]
    assert imager("-r", url, "diff", first["set"], second["set"]).code == 1
    imager.ok("-r", url, "verify", "latest")
    imager.ok("-r", url, "check", "--read-data")
    for one, content in ((first, before), (second, image.read_bytes())):
        out = tmp_path / f"{one['set']}.img"
        imager.ok("-r", url, "restore", one["set"], out)
        assert out.read_bytes() == content


@pytest.mark.parametrize("name", ["keyfile-zstd", "passphrase-stream"])
def test_a_golden_repository(sshd: Sshd, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier version wrote is whole when it is read from afar, with a key that may only read."""
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "state"))
    place = sshd.served / name
    unpack(name, place)
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    sshd.client(name, forced=f"--stdio --read-only --restrict {place}").use(monkeypatch)
    bench = Workbench(tmp_path, encryption=facts["encryption"], create=False)
    storage = open_storage(sshd.url(place / "repo"))
    with Repository.open(storage, bench.credentials) as repository:
        found = check(repository, Silent(), read_data="all")
        assert found.ok and found.packs_read
        for one in facts["sets"]:
            assert verify(repository, one["set"], Silent()).ok
    storage.close()
