"""`imager sync` and the upkeep options of `imager check`, as a person's shell runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

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
