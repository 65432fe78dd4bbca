"""A machine remembers the newest set that it saw, and says so when that is gone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager import config
from imager.repository.witness import Witness

REPOSITORY = bytes(16).hex()


@dataclass(frozen=True)
class Item:
    id: str
    sequence: int
    lineage: str = "aa" * 16
    digest: bytes = b"d" * 32


def item(sequence: int, **more: object) -> Item:
    return Item(f"{sequence:032x}", sequence, **more)  # type: ignore[arg-type]


def test_growth_is_fine_and_going_back_is_not() -> None:
    one, two, three = item(1), item(2), item(3)
    assert Witness(REPOSITORY).observe([]) == []
    assert Witness(REPOSITORY).observe([one]) == []
    assert Witness(REPOSITORY).observe([one, two, three]) == []
    assert Witness(REPOSITORY).observe([two, three]) == []  # older ones may go
    (problem,) = Witness(REPOSITORY).observe([one, two])
    assert three.id in problem
    # A new set on top of the older state does not hide it, however many follow.
    for top in (4, 5):
        (problem,) = Witness(REPOSITORY).observe([one, two, item(top)])
        assert three.id in problem
    assert Witness(REPOSITORY).accept([one, two]) == []
    assert Witness(REPOSITORY).observe([one, two]) == []


def test_another_set_under_the_same_id_is_noticed() -> None:
    Witness(REPOSITORY).observe([item(1)])
    (problem,) = Witness(REPOSITORY).observe([item(1, digest=b"x" * 32)])
    assert "replaced" in problem


def test_lineages_and_repositories_do_not_mix() -> None:
    other = Item("ff" * 16, 7, lineage="bb" * 16)
    Witness(REPOSITORY).observe([item(1), other])
    assert len(Witness(REPOSITORY).observe([item(1)])) == 1
    assert Witness("78" * 16).observe([item(1)]) == []


def test_a_damaged_set_is_told_once_elsewhere() -> None:
    Witness(REPOSITORY).observe([item(1), item(2)])
    assert Witness(REPOSITORY).observe([item(1)], damaged=[item(2).id]) == []
    assert len(Witness(REPOSITORY).observe([item(1)])) == 1


def test_a_memory_that_cannot_be_kept_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("IMAGER_STATE_DIR", str(blocked))
    problems = Witness(REPOSITORY).observe([item(1)])
    assert problems and all(str(blocked) in problem for problem in problems)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_a_damaged_memory_is_told_and_replaced(raw: bytes) -> None:
    path = Path(config.state_dir()) / "witness" / f"{REPOSITORY}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    assert len(Witness(REPOSITORY).observe([item(1)])) == 1
    assert Witness(REPOSITORY).observe([item(1)]) == []


def test_where_state_and_cache_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGER_STATE_DIR", "/a")
    monkeypatch.setenv("IMAGER_CACHE_DIR", "/b")
    assert (config.state_dir(), config.cache_dir()) == ("/a", "/b")
    monkeypatch.delenv("IMAGER_STATE_DIR")
    monkeypatch.delenv("IMAGER_CACHE_DIR")
    monkeypatch.setenv("XDG_STATE_HOME", "/c")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, so not to be used")
    assert config.state_dir() == "/c/imager"
    root = os.geteuid() == 0
    assert config.cache_dir() == ("/var/cache/imager" if root else os.path.expanduser("~/.cache/imager"))
