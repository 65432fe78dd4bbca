"""The undamaged repositories, built once, and copies of them to damage."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.damage.workshop import Place, World, build

Copy = Callable[[World], Place]


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of flushes to a disk would take minutes."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="imager-test-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, World]]:
    """`sealed` and `none`."""
    folder = tmp_path_factory.mktemp("worlds")
    with pytest.MonkeyPatch.context() as patch:
        out = {}
        for name in ("sealed", "none"):
            for key, value in Place(folder / name).environment().items():
                patch.setenv(key, value)
            out[name] = build(folder / name, sealed=name == "sealed")
    yield out


@pytest.fixture(params=["sealed", "none"])
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    return worlds[request.param]


@pytest.fixture
def copy(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Copy:
    """A copy of a world, whose state and key the environment names from then on."""

    def make(world: World) -> Place:
        place = world.place.copy(quick / "copy")
        for key, value in place.environment().items():
            monkeypatch.setenv(key, value)
        return place

    return make
