"""The journal: only of this restore, only what is whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from imager.engine import verified
from imager.engine.journal import Journal
from imager.errors import ImagerError

FIELDS: dict[str, Any] = {
    "target": "serial:1",
    "place": (1, 2),
    "set_id": "ab" * 16,
    "disk": "sda",
    "size": 1 << 20,
    "block_size": 4096,
}


def test_what_is_finished_is_found_again() -> None:
    journal = Journal(**FIELDS)
    assert not journal.load()
    journal.begin(0, 100)
    journal.finish()
    journal.begin(100, 200)
    again = Journal(**FIELDS)
    assert again.load()
    assert again.done.ranges == ((0, 100),)
    assert again.begun.ranges == ((100, 200),)
    again.finish()
    third = Journal(**FIELDS)
    assert third.load() and third.done.ranges == ((0, 200),) and not third.begun
    third.remove()
    assert not Journal(**FIELDS).load()
    third.remove()


@pytest.mark.parametrize(
    "other",
    [{"target": "serial:2"}, {"place": (1, 3)}, {"set_id": "cd" * 16}, {"disk": "sdb"}, {"size": 1 << 21}],
)
def test_another_restore_has_another_journal(other: dict[str, Any]) -> None:
    journal = Journal(**FIELDS)
    journal.begin(0, 1)
    assert not Journal(**{**FIELDS, **other}).load()


@pytest.mark.parametrize(
    "bad", [b"", b"{", b"[]", b'{"version": 1}', bytes(range(100, 200)), b'{"version":2}', None]
)
def test_a_damaged_journal_is_none(bad: bytes | None) -> None:
    journal = Journal(**FIELDS)
    journal.begin(0, 10)
    path = Path(journal.path)
    path.write_bytes(path.read_bytes().replace(b"[0,10]", b"[0,10000]") if bad is None else bad)
    assert not Journal(**FIELDS).load()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "file"))
    with pytest.raises(ImagerError) as caught:
        Journal(**FIELDS).begin(0, 1)
    assert caught.value.hint and "IMAGER_STATE_DIR" in caught.value.hint
    assert not verified.record("aa", "bb", ok=True, size=1)


def test_last_verified() -> None:
    assert verified.last("aa", "bb") is None
    assert verified.record("aa", "bb", ok=False, size=7, damaged=3, against="/dev/x")
    found = verified.last("aa", "bb")
    assert found is not None
    assert (found.ok, found.bytes, found.damaged, found.against) == (False, 7, 3, "/dev/x")
    Path(os.environ["IMAGER_STATE_DIR"], "verified/aa/bb.json").write_bytes(b"\xff")
    assert verified.last("aa", "bb") is None
