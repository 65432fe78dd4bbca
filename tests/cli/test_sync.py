"""`imager sync` and the upkeep options of `imager check`, as a person's shell runs them."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from imager.cli.main import run
from imager.storage.folder import FolderStorage
from imager.storage.limit import Limited, Paces
from tests.cli.test_contract import field_names, refused

both_forms = pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
PAGE = (Path(__file__).parents[2] / "docs/reference/json.md").read_text()


def test_a_sync_is_a_stream_that_ends_in_its_summary(imager, repository: Path, tmp_path: Path) -> None:
    ended = imager.ok("sync", repository, tmp_path / "copy", "--json", "--verify-after")
    kinds = [message["message_type"] for message in ended.messages]
    assert kinds[-1] == "summary" and set(kinds) <= {"progress", "note", "warning", "summary"}
    assert ended.err == ""
    for name in field_names(ended.messages):
        assert f"`{name}`" in PAGE, name
    again = imager.ok("sync", f"file://{repository}", tmp_path / "copy", "--json").messages[-1]
    assert (again["sets"], again["packs"], again["present"]) == ([], 0, 1)
    assert imager.ok("-r", tmp_path / "copy", "verify", "latest").code == 0


@both_forms
def test_a_dry_run_copies_nothing(imager, repository: Path, tmp_path: Path, as_json: bool) -> None:
    before = sorted(repository.rglob("*"))
    ended = imager.ok("sync", repository, tmp_path / "copy", "--dry-run", *(["--json"] if as_json else []))
    if as_json:
        assert ended.messages[-1]["message_type"] == "plan"
        for name in field_names(ended.messages):
            assert f"`{name}`" in PAGE, name
    else:
        assert "would copy 1 set" in ended.out
    assert sorted(repository.rglob("*")) == before and not (tmp_path / "copy").exists()


@both_forms
def test_ends_that_cannot_be(imager, repository: Path, tmp_path: Path, as_json: bool) -> None:
    form = ["--json"] if as_json else []
    copy, other = tmp_path / "copy", tmp_path / "another"
    ended = imager("sync", tmp_path / "nothing", copy, *form)
    refused(ended, 10, as_json=as_json, kind="no-repository")
    imager.ok("init", other, "--encryption", "none")
    message = refused(imager("sync", repository, other, *form), 2, as_json=as_json, kind="usage")
    assert "another repository" in message
    refused(imager("sync", repository, copy, "--set", "abcd", *form), 2, as_json=as_json, kind="usage")
    refused(imager("sync", repository, copy, "--since", "soon", *form), 2, as_json=as_json, kind="usage")
    refused(imager("sync", repository, *form), 2, as_json=as_json, kind="usage")
    assert not copy.exists()


def test_damage_in_the_source_is_exit_30(imager, repository: Path, tmp_path: Path) -> None:
    pack = next(path for path in (repository / "packs").rglob("*") if path.is_file())
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    ended = imager("sync", repository, tmp_path / "copy")
    assert ended.code == 30 and f"NOT COPIED: packs/{pack.name[:2]}/{pack.name}" in ended.out
    assert "NOT COPIED: sets/" in ended.out and "copied 0 sets" in ended.out


def test_options_of_check(imager, repository: Path, tmp_path: Path) -> None:
    ended = imager.ok("-r", repository, "check", "--read-data", "1/2", "--ages", "--json")
    for name in field_names(ended.messages):
        assert f"`{name}`" in PAGE, name
    assert imager.ok("-r", repository, "check", "--keyless", "--read-data", "5%").code == 0
    for wrong in (["--read-data", "2/1"], ["--heal-from", "x"], ["--read-data", "0"]):
        refused(imager("-r", repository, "check", *wrong), 2, as_json=False)
    imager.ok("sync", repository, tmp_path / "copy")
    for path in (repository / "packs").rglob("*"):
        if path.is_file():
            path.unlink()
    ended = imager("-r", repository, "check", "--json")
    assert ended.code == 30
    for name in field_names(ended.messages):
        assert f"`{name}`" in PAGE, name
    ended = imager.ok("-r", repository, "check", "--repair", "--heal-from", tmp_path / "copy")
    assert "put 1 pack back" in ended.out and "the repository is whole" in ended.out


# --- limits of two storages at once ---------------------------------------------------------------


class Counted:
    """What passed the limits of this process, in bytes, by storage; nobody has to wait for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paces: set[Paces] = set()
        self.storages: dict[str, Limited] = {}
        self.down: Counter[Paces] = Counter()
        self.up: Counter[Paces] = Counter()
        made, sent, fetched = Limited.__init__, Paces.upload, Paces.download

        def make(storage: Limited, inner: FolderStorage, paces: Paces) -> None:
            made(storage, inner, paces)
            self.storages[inner.url] = storage
            self.paces.add(paces)

        def send(paces: Paces, size: int) -> None:
            sent(paces, size)
            self.up[paces] += size

        def fetch(paces: Paces, size: int) -> None:
            fetched(paces, size)
            self.down[paces] += size

        monkeypatch.setattr(Limited, "__init__", make)
        monkeypatch.setattr(Paces, "upload", send)
        monkeypatch.setattr(Paces, "download", fetch)
        for name in [name for name in os.environ if name.startswith("IMAGER_")]:
            monkeypatch.delenv(name)


LIMITS = ["--limit-download", "1G", "--limit-upload", "1G"]


def packed(root: Path) -> int:
    return sum(path.stat().st_size for path in (root / "packs").rglob("*") if path.is_file())


def test_both_ends_of_a_sync_keep_one_limit(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    counted = Counted(monkeypatch)
    copy = tmp_path / "copy"
    assert run(["-q", *LIMITS, "sync", str(repository), str(copy), "--verify-after"]) == 0
    assert counted.storages.keys() == {str(repository), str(copy)}
    [paces] = counted.paces
    # Read from the one, written to the other, and read back from there.
    assert counted.up[paces] >= packed(copy) > 300_000
    assert counted.down[paces] >= 2 * packed(copy)


def test_what_heals_is_fetched_within_the_limit(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    copy = tmp_path / "copy"
    assert run(["-q", "sync", str(repository), str(copy)]) == 0
    lost = packed(repository)
    shutil.rmtree(repository / "packs")
    counted = Counted(monkeypatch)
    heal = ["check", "--repair", "--heal-from", str(copy)]
    assert run(["-q", *LIMITS, "-r", str(repository), *heal]) == 0
    assert counted.storages.keys() == {str(repository), str(copy)}
    [paces] = counted.paces
    assert counted.down[paces] >= lost and counted.up[paces] >= lost
    assert packed(repository) == lost
