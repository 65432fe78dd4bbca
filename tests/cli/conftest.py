"""Runs the real command in a process of its own, as a person's shell would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.out)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Standard output as JSON Lines."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, Any]:
        """The error document, the last line of standard error."""
        document: dict[str, Any] = json.loads(self.err.splitlines()[-1])
        assert document["message_type"] == "error"
        return document


class Imager:
    """`imager(...)` runs the command; the environment has only what a test put there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        kept = {k: v for k, v in os.environ.items() if not k.startswith("IMAGER_")}
        states = {"IMAGER_STATE_DIR": str(folder / "state"), "IMAGER_CACHE_DIR": str(folder / "cache")}
        self.environment = {**kept, **states, "TERM": "dumb"}

    def argv(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "imager", *map(str, arguments)]

    def __call__(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None, stdin: bytes = b""
    ) -> Ended:
        done = subprocess.run(
            self.argv(*arguments),
            input=stdin,
            capture_output=True,
            env={**self.environment, **(env or {})},
            timeout=300,
            check=False,
        )
        ended = Ended(done.returncode, done.stdout.decode(), done.stderr.decode())
        assert "Traceback" not in ended.err, ended.err
        assert "internal error" not in ended.err, ended.err
        return ended

    def ok(self, *arguments: str | Path, **more: Any) -> Ended:
        """Run, and expect exit 0."""
        ended = self(*arguments, **more)
        assert ended.code == 0, f"{arguments}: exit {ended.code}\n{ended.out}{ended.err}"
        return ended


@pytest.fixture
def imager(tmp_path: Path) -> Imager:
    return Imager(tmp_path)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A small image: data, a hole, zeroes, and a last block that is not full."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(os.urandom(300_000) + b"text " * 60_000)
        file.seek(4 << 20)
        file.write(bytes(200_000) + os.urandom(1000))
    return path


@pytest.fixture
def repository(imager: Imager, image: Path, tmp_path: Path) -> Path:
    """A repository without encryption that holds one set, `disk`."""
    place = tmp_path / "repository"
    imager.ok("init", place, "--encryption", "none")
    imager.ok("-r", place, "backup", image, "--name", "disk")
    return place
