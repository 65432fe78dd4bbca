"""Where the thrashed repositories lie: in a folder, in an object store, on another machine over ssh.

The commands reach a repository by its address. Who judges looks at the folder in which the server
keeps the objects: what is there is what counts, and looking is no part of the play.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import objectstores
from tests.sshd import Sshd


@dataclass(frozen=True, slots=True)
class Backend:
    """A kind of storage that is there to be used."""

    name: str
    operations: tuple[int, int]
    "Commands of one round, where there is little time and where there is much."
    url: Callable[[str], str]
    "A place's name -> what `imager -r` is told."
    kept: Callable[[str], Path]
    "A place's name -> the folder in which its objects lie."
    environment: Mapping[str, str]
    settled: Callable[[], bool]
    "Whether nothing is under way of what killed processes had asked for."

    def settle(self) -> None:
        """Wait until the server is done with what killed processes had asked for."""
        for _ in range(600):
            if self.settled():
                return
            time.sleep(0.05)
        raise AssertionError("the server is still at work for processes that are dead")


@contextmanager
def _folder(arena: Path) -> Iterator[Backend]:
    """A folder."""
    yield Backend(
        "folder", (60, 90), lambda name: str(arena / name), lambda name: arena / name, {}, lambda: True
    )


@contextmanager
def _s3(arena: Path) -> Iterator[Backend]:
    """An object store, in a process of its own: the play forks, and threads would not survive that."""
    bucket, folder = "thrash", arena / "s3"
    argv = [sys.executable, "-m", "tests.objectstores", str(folder), bucket]
    server = subprocess.Popen(argv, cwd=Path(__file__).parents[2])
    told = folder / "env"
    try:
        for _ in range(600):
            if told.exists():
                break
            assert server.poll() is None, "the S3 server does not run"
            time.sleep(0.05)
        lines = (line.removeprefix("export ").partition("=") for line in told.read_text().splitlines())
        environment = {name: value for name, _, value in lines}
        port = int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2])
        yield Backend(
            "s3",
            (20, 40),
            lambda name: f"s3://{bucket}/{name}",
            lambda name: folder / "objects" / bucket / name,
            environment,
            lambda: not _connected(port),
        )
    finally:
        server.terminate()
        server.wait()


def _connected(port: int) -> bool:
    """Whether the server at a port of loopback has a connection that it has not closed."""
    ends = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    # 01: established, 08: the client is gone and the server has not noticed yet.
    return any(end[1] == f"0100007F:{port:04X}" and end[3] in ("01", "08") for end in ends)


@contextmanager
def _ssh(arena: Path) -> Iterator[Backend]:
    """Another machine, as far as ssh can tell."""
    server = Sshd(arena / "ssh")
    client = server.client("thrash")
    served = server.served
    try:
        yield Backend(
            "ssh",
            (12, 30),
            lambda name: server.url(served / name),
            lambda name: served / name,
            client.environment,
            lambda: not server.busy(),
        )
    finally:
        server.stop()


BACKENDS: dict[str, Callable[[Path], AbstractContextManager[Backend]]] = {
    "folder": _folder,
    "s3": _s3,
    "ssh": _ssh,
}


def missing(name: str) -> str | None:
    """What a backend lacks on this machine."""
    if name == "s3" and objectstores.s3s_program() is None:
        return objectstores.NO_SERVER
    return None


def use(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands of this process's children reach it."""
    for name, value in backend.environment.items():
        monkeypatch.setenv(name, value)
