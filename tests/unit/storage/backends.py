"""The storages that the conformance suite runs over.

To add one: a function that takes the request of a fixture and yields a `Place`, and
an entry in `BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from imager.storage.base import Storage
from imager.storage.location import open_storage


@dataclass
class Place:
    """A new, empty place. `connect` makes another storage for it, as another process would."""

    url: str
    connect: Callable[[], Storage]


@contextmanager
def folder(request: pytest.FixtureRequest) -> Iterator[Place]:
    url = str(Path(request.getfixturevalue("tmp_path")) / "r")
    yield Place(url, lambda: open_storage(url))


@contextmanager
def s3s(request: pytest.FixtureRequest) -> Iterator[Place]:
    url = request.getfixturevalue("s3").url
    yield Place(url, lambda: open_storage(url))


@contextmanager
def moto(request: pytest.FixtureRequest) -> Iterator[Place]:
    url = request.getfixturevalue("other_s3").url
    yield Place(url, lambda: open_storage(url))


@contextmanager
def locked(request: pytest.FixtureRequest) -> Iterator[Place]:
    """A bucket that keeps versions and locks each of them at upload."""
    url = request.getfixturevalue("locking_s3").url
    yield Place(url, lambda: open_storage(url))


@contextmanager
def ssh(request: pytest.FixtureRequest) -> Iterator[Place]:
    server = request.getfixturevalue("sshd")
    request.getfixturevalue("owner").use(request.getfixturevalue("monkeypatch"))
    url = server.url(Path(request.getfixturevalue("tmp_path")) / "r")
    made: list[Storage] = []

    def connect() -> Storage:
        made.append(open_storage(url))
        return made[-1]

    yield Place(url, connect)
    for storage in made:
        storage.close()


BACKENDS: dict[str, Callable[[pytest.FixtureRequest], AbstractContextManager[Place]]] = {
    "folder": folder,
    "s3s": s3s,
    "moto": moto,
    "locked": locked,
    "ssh": ssh,
}
