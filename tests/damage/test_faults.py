"""Sources and repositories that fail in the middle of things; no root needed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.damage.workshop import MIB, Place, restored


@pytest.fixture
def place(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(quick)
    for key, value in place.environment().items():
        monkeypatch.setenv(key, value)
    assert place.imager("init", place.root, "--encryption", "none").code == 0
    small = quick / "small"
    small.write_bytes(random.Random(1).randbytes(3 * MIB))
    assert place.imager("backup", small, "--name", "small").code == 0
    return place


def during_backup(place: Place, source: Path, act: Callable[[], object]) -> tuple[int, str]:
    """Back `source` up, and act once its first pack is stored: exit code and what was said.

    The source must be larger than what a run has in flight then, some 200 MiB.
    """
    before = len(place.files("packs"))
    process = subprocess.Popen(
        [sys.executable, "-m", "imager", "-r", str(place.root), "backup", str(source)]
        + ["--name", "large", "--compression", "none", "--threads", "1"],
        env={**os.environ, **place.environment()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while len(place.files("packs")) == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert process.poll() is None, "it ended before anything could be done to it"
    act()
    _, err = process.communicate(timeout=120)
    text = err.decode()
    assert "Traceback" not in text and "internal error" not in text, text
    return process.returncode, text


@pytest.fixture
def large(place: Place) -> Path:
    path = place.folder / "large"
    with path.open("wb") as file:
        for _ in range(480):
            file.write(os.urandom(MIB))
    return path


def earlier_set_is_whole(place: Place) -> None:
    check = place.imager("check", "--read-data")
    assert (check.code, check.summary["problems"], check.summary["sets"]) == (0, [], 1)
    assert place.imager("verify", "small").code == 0


def test_a_source_that_shrinks(place: Place, large: Path) -> None:
    code, said = during_backup(place, large, lambda: os.truncate(large, 400 * MIB + 77))
    assert code == 1 and "shrank" in said and str(large) in said and "hint:" in said
    assert len(place.files("sets")) == 1 and not place.files("tmp")
    earlier_set_is_whole(place)
    ended = place.imager("backup", large, "--name", "large")
    assert ended.code == 0 and ended.summary["images"][0]["size"] == 400 * MIB + 77


def test_a_repository_that_is_removed(place: Place, large: Path) -> None:
    """As when somebody deletes the folder, or pulls the disk out."""
    away = place.folder / "away"
    code, said = during_backup(place, large, lambda: place.root.rename(away))
    assert code == 1 and "no repository" in said and str(place.root) in said and "hint:" in said
    assert not place.root.exists(), "nothing is made in its place"
    away.rename(place.root)
    earlier_set_is_whole(place)
    assert place.imager("backup", large, "--name", "large").code == 0
    assert place.imager("verify", "large").code == 0


def test_a_repository_that_is_deleted(place: Place, large: Path) -> None:
    code, said = during_backup(place, large, lambda: shutil.rmtree(place.root))
    assert code == 1 and "no repository" in said, said
    assert not place.root.exists()
    ended = place.imager("backup", large, "--name", "large")
    assert ended.code == 10 and "init" in ended.err


def test_a_source_that_is_gone(place: Place) -> None:
    ended = place.imager("backup", place.folder / "nowhere", "--name", "x")
    assert ended.code == 1 and "nowhere" in ended.err
    earlier_set_is_whole(place)


def test_a_stream_that_breaks_off_is_an_image(place: Place) -> None:
    """Whoever feeds a stream must tell by other means that it was whole; its bytes are kept as they came."""
    data = os.urandom(MIB + 5)
    done = subprocess.run(
        [sys.executable, "-m", "imager", "-r", str(place.root), "backup", "-", "--name", "stream"],
        input=data,
        env={**os.environ, **place.environment()},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert restored(place, ("stream", "stream"), place.folder / "out")[1] == data
