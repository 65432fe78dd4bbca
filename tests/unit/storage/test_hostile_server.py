"""A far end that lies: what it names is no object of the folder that was asked for, or is without end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imager.storage.folder import FolderStorage
from imager.storage.ssh import SshStorage
from imager.storage.wire import ProtocolError

SERVER = """#!{python}
from imager.storage import wire
from imager.storage.serve import Server

class Liar(Server):
    def _list(self, storage, request):
        lines = {lines!r}
        if not request.sizes:
            lines = [line.partition(" ")[2] for line in lines]
        while True:
            yield wire.lines(lines)
            if not {endless!r}:
                return

Liar(0, 1, mode="full").run()
"""


@pytest.fixture
def liar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., SshStorage]]:
    """Connects to a server that answers each listing with these lines."""
    made: list[SshStorage] = []
    root = tmp_path / "r"
    with FolderStorage(str(root)).initializing():
        pass

    def connect(*lines: str, endless: bool = False) -> SshStorage:
        program = tmp_path / "ssh"
        program.write_text(SERVER.format(python=sys.executable, lines=list(lines), endless=endless))
        program.chmod(0o700)
        monkeypatch.setenv("IMAGER_SSH", str(program))
        made.append(SshStorage.connect(f"ssh://far{root}"))
        return made[-1]

    yield connect
    for one in made:
        one.close()


@pytest.mark.parametrize("name", ["condemned/" + "ab" * 16, "config", "slots", "slotsx/a", "sets/../slots/a"])
def test_what_is_not_below_the_folder_is_no_listing(liar: Callable[..., SshStorage], name: str) -> None:
    with pytest.raises(ProtocolError):
        liar(f"1 {name}").list_names("slots/")
    with pytest.raises(ProtocolError):
        list(liar(f"1 {name}").list("slots/"))


def test_what_is_below_is(liar: Callable[..., SshStorage]) -> None:
    storage = liar("17 slots/a", "1 slots/b")
    assert storage.list_names("slots/") == ["slots/a", "slots/b"]
    assert [entry.size for entry in storage.list("slots")] == [17, 1]


def test_a_listing_without_end_ends(liar: Callable[..., SshStorage], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imager.storage.ssh._MAX_LISTING", 1 << 20)
    with pytest.raises(ProtocolError, match="longer than"):
        liar(*[f"1 slots/{number}" for number in range(1000)], endless=True).list_names("slots/")
