"""Segments of a far storage are kept on this machine: fetched once, and checked by their names."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imager.events import Silent
from imager.repository import index, merging
from imager.repository.format import INDEX
from imager.repository.repository import Repository
from imager.repository.segments import SegmentCache, segment_name
from imager.repository.session import Session
from imager.storage.folder import FolderStorage
from tests.unit.repository.building import Lab
from tests.unit.repository.segment_making import blocks, digest, put, segment_of


class Far(FolderStorage):
    """A folder that is told to be far: `open` gives a temporary copy."""

    local = False

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.opened: list[str] = []

    def open(self, name: str) -> int:
        self.opened.append(name)
        data = self.read(name)
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            return os.dup(file.fileno())

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        fd = super().open(name)
        try:
            return os.pread(fd, os.fstat(fd).st_size, 0)[offset:][:length]
        finally:
            os.close(fd)


@pytest.fixture
def far(
    make_lab: Callable[[str], Lab], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Repository]:
    """A far repository with three segments of ten blocks each."""
    monkeypatch.setenv("IMAGER_CACHE_DIR", str(tmp_path / "cache"))
    lab = make_lab("none")
    for number in range(3):
        put(lab.repository, blocks(range(number * 10, number * 10 + 10)))
    repository = Repository.open(Far(str(lab.root)), lab.credentials(), writing=True)
    yield repository
    repository.close()


def fetched(repository: Repository, expected: int = 30) -> int:
    """How many segments a load fetches from the storage."""
    storage = repository.storage
    assert isinstance(storage, Far)
    storage.opened.clear()
    reporter = Silent()
    known = index.load(repository, reporter)
    assert known.count(b"".join(blocks(range(1000)))) == expected and not reporter.warnings
    return sum(name.startswith(INDEX) for name in storage.opened)


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*/index/*"))


def test_a_segment_is_fetched_once(far: Repository, tmp_path: Path) -> None:
    assert [fetched(far), fetched(far)] == [3, 0]
    assert {INDEX + path.name for path in kept(tmp_path)} == set(far.storage.list_names(INDEX))
    assert kept(tmp_path)[0].stat().st_mode & 0o777 == 0o600
    assert kept(tmp_path)[0].parent.stat().st_mode & 0o777 == 0o700
    put(far, blocks(range(100, 110)))
    assert fetched(far, 40) == 1
    shutil.rmtree(tmp_path / "cache")
    assert fetched(far, 40) == 4


def test_what_the_storage_has_no_longer_goes(far: Repository, tmp_path: Path) -> None:
    fetched(far)
    far.storage.delete(far.storage.list_names(INDEX)[0])
    fetched(far, 20)
    assert {INDEX + path.name for path in kept(tmp_path)} == set(far.storage.list_names(INDEX))


@pytest.mark.parametrize("harm", ["empty", "short", "header", "folder", "link"])
def test_a_harmed_copy_is_fetched_anew(far: Repository, tmp_path: Path, harm: str) -> None:
    fetched(far)
    path = kept(tmp_path)[1]
    data = path.read_bytes()
    path.unlink()
    if harm == "folder":
        path.mkdir()
    elif harm == "link":
        path.symlink_to("/etc/passwd")
    else:
        path.write_bytes({"empty": b"", "short": data[:5000], "header": data[:20] + b"x" + data[21:]}[harm])
    assert fetched(far) == 1
    if harm != "folder":
        assert path.read_bytes() == data and fetched(far) == 0


def test_a_segment_that_is_not_its_name_is_not_kept(far: Repository, tmp_path: Path) -> None:
    name = INDEX + "ab" * 32
    far.storage.create(name, segment_of(far, blocks(range(900, 910))))
    reporter = Silent()
    known = index.load(far, reporter)
    assert len(reporter.warnings) == 1 and "damaged or swapped" in reporter.warnings[0]
    assert known.count(b"".join(blocks(range(1000)))) == 30 and len(kept(tmp_path)) == 3


def test_without_room_or_folder_it_is_fetched_each_time(
    far: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = far.storage.list_names(INDEX)[0]
    small = SegmentCache(far.id, limit=100)
    os.close(small.fetch(far.storage, name))
    assert kept(tmp_path) == []
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("in the way")
    assert [fetched(far), fetched(far)] == [3, 3]
    monkeypatch.setenv("IMAGER_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    assert [fetched(far), fetched(far)] == [3, 3]
    assert list((tmp_path / "other").glob("*/index/*")) == []


def test_what_this_machine_has_written_is_not_fetched(far: Repository) -> None:
    fetched(far)
    known = index.load(far)
    with Session.begin(far) as session:
        pack = far.names.intern(digest("pack"))
        known.add_pack(pack, [(1, identity, 72, 100) for identity in blocks(range(500, 510))])
        assert index.write_segment(session, known) is not None
        session.drain()
    assert fetched(far, 40) == 0


def test_a_merged_segment_is_kept_without_being_fetched(far: Repository, tmp_path: Path) -> None:
    for number in range(3, 9):
        put(far, blocks(range(number * 10, number * 10 + 10)))
    known = index.load(far)
    assert merging.tend(far, known, Silent(), stored=0).written == 1
    assert known.count(b"".join(blocks(range(90)))) == 90
    assert fetched(far, 90) == 0 and len(kept(tmp_path)) == 1
    data = kept(tmp_path)[0].read_bytes()
    assert segment_name(data) == far.storage.list_names(INDEX)[0]
