"""The damage table once more, for a repository in an object store, and for one that is reached over ssh.

The server keeps its objects as files, so the damage is done to them by the same hands; what
the commands make of it must be the same, byte for byte. Of the rows every fourth is run in the object
store and every twenty-fourth over ssh, and all of them where IMAGER_TEST_ALL is set (many minutes).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.damage import test_table
from tests.damage.conftest import Copy
from tests.damage.damages import TABLE, Row
from tests.damage.workshop import Place, World
from tests.objectstores import Store, s3, s3s_door  # noqa: F401
from tests.sshd import Client, Sshd, owner, sshd  # noqa: F401


@pytest.fixture
def far_copy(s3: Store, monkeypatch: pytest.MonkeyPatch) -> Copy:  # noqa: F811
    """A copy of a world in the object store."""

    def make(world: World) -> Place:
        assert s3.objects is not None
        world.place.copy(s3.objects.parent)
        place = Place(s3.objects.parent, s3.url)
        for key, value in place.environment().items():
            monkeypatch.setenv(key, value)
        # What a machine remembers belongs to the place: it has to have seen the copy.
        assert place.imager("check").code == 0
        return place

    return make


@pytest.fixture
def ssh_copy(
    sshd: Sshd,  # noqa: F811
    owner: Client,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Copy:
    """A copy of a world on another machine, as far as ssh can tell."""
    owner.use(monkeypatch)

    def make(world: World) -> Place:
        folder = Path(tempfile.mkdtemp(dir=sshd.served)) / "place"
        world.place.copy(folder)
        place = Place(folder, sshd.url(folder / "r"))
        for key, value in place.environment().items():
            monkeypatch.setenv(key, value)
        assert place.imager("check").code == 0
        return place

    return make


SEALED = [row for row in TABLE if row.only in ("", "sealed")]
ALL = bool(os.environ.get("IMAGER_TEST_ALL"))
ROWS = SEALED if ALL else SEALED[::4]
SSH_ROWS = SEALED if ALL else SEALED[2::24]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(row: Row, worlds: dict[str, World], far_copy: Copy, quick: Path) -> None:
    test_table.test_row(row, "sealed", worlds, far_copy, quick)


@pytest.mark.parametrize("row", SSH_ROWS, ids=str)
def test_row_over_ssh(row: Row, worlds: dict[str, World], ssh_copy: Copy, quick: Path) -> None:
    test_table.test_row(row, "sealed", worlds, ssh_copy, quick)


@pytest.mark.parametrize("name", ["sealed", "none"])
def test_nothing_is_wrong_before(name: str, worlds: dict[str, World], far_copy: Copy, quick: Path) -> None:
    test_table.test_nothing_is_wrong_before(worlds[name], far_copy, quick)
