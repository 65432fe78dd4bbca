"""A set of a small disk with everything in it, served in this process."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from imager.cli import listening
from imager.engine import export
from imager.events import Silent
from tests.workbench import Workbench

BLOCK = 4096
SIZE = 6 * 256 * BLOCK + 1234
"""More than one page of the map, and a last block that is not whole."""


class Served:
    """A repository, what its newest set holds, and a server of it."""

    def __init__(self, place: Workbench, image: Path, before: bytes) -> None:
        self.place = place
        self.image = image
        self.before = before
        self.reporter = Silent()

    @property
    def content(self) -> bytes:
        return self.image.read_bytes()

    @contextmanager
    def serving(self, text: str = "d", path: str | None = None) -> Iterator[str]:
        """The socket's path, while a server listens there."""
        with self.place.open(writing=False) as repository:
            planned = export.plan(repository, text, self.reporter)
            with (
                listening.unix(path) as (listener, place),
                export.serving(repository, planned, listener, self.reporter),
            ):
                yield place


@pytest.fixture(params=["none", "keyfile"])
def served(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    place = Workbench(tmp_path, encryption=request.param, block_size=BLOCK)
    chance = random.Random(11)
    image = tmp_path / "disk"
    with image.open("wb") as file:
        for _ in range(60):
            file.seek(chance.randrange(SIZE // BLOCK) * BLOCK)
            file.write(chance.randbytes(BLOCK * chance.randint(1, 3)))
        file.truncate(SIZE)
        file.seek(SIZE - 1234)
        file.write(chance.randbytes(1234))
    before = image.read_bytes()
    place.backup(image, name="d")
    with image.open("r+b") as file:
        for at in (0, 7 * BLOCK, 300 * BLOCK):
            file.seek(at)
            file.write(os.urandom(BLOCK))
    place.backup(image, name="d")
    return Served(place, image, before)


@pytest.fixture
def socket_of(served: Served) -> Iterator[Callable[..., str]]:
    """Start servers that end with the test."""
    with ExitStack() as stack:
        yield lambda text="d": stack.enter_context(served.serving(text))
