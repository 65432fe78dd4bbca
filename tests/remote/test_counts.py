"""What the work costs in calls, and what of it is under way at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from imager.events import Silent
from imager.repository import forgetting, session
from imager.repository.prune import Prune, PruneOptions
from imager.repository.session import Session
from imager.storage.base import Storage
from imager.storage.cached import Cached
from imager.storage.location import open_storage
from imager.storage.rehearsal import Recording
from tests.objectstores import Store
from tests.remote.conftest import Far


@pytest.fixture
def counted(far: Far) -> Callable[[], tuple[Recording, Storage]]:
    """A recording storage, and the same as `imager backup` uses it: with copies kept on this machine."""

    def make() -> tuple[Recording, Storage]:
        recording = Recording(open_storage(far.url))
        return recording, Cached(recording)

    return make


def test_an_incremental_without_a_change(far: Far, image: Path, counted, s3: Store) -> None:
    far.backup(image, counted()[1])
    for _ in range(3):
        recording, storage = counted()
        s3.door.forget()
        assert far.backup(image, storage).images[0].blocks_changed == 0
        assert recording.total <= 12, recording.names
        assert sum(s3.door.counts.values()) <= 12, s3.door.requests
    assert len(far.sets()) == 4
    far.gives("d", image)


def test_a_full_backup(far: Far, tmp_path: Path, counted, s3: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # Packs of 1 MiB in the place of 64: fifty of them are quick.
    for module in ("imager.engine.imaging", "imager.repository.mapwriter"):
        monkeypatch.setattr(f"{module}.PACK_TARGET", 1 << 20)
    monkeypatch.setattr("imager.engine.imaging.SEGMENT", 1 << 20)
    image = tmp_path / "big.img"
    image.write_bytes(os.urandom(50 << 20))
    recording, storage = counted()
    s3.door.forget()
    far.backup(image, storage)
    packs = recording.calls["publish"]
    assert packs >= 45
    assert recording.total <= 1.2 * packs + 20, recording.calls
    assert sum(s3.door.counts.values()) <= 1.2 * packs + 20, s3.door.counts
    assert 2 <= recording.most <= session._FAR_IN_FLIGHT + 1  # Uploads run beside each other.
    recording, storage = counted()
    far.gives("d", image, storage)
    assert recording.most >= 8  # A restore keeps many reads under way.
    reads = [name for call, name in recording.names if call == "read" and name.startswith("packs/")]
    assert len(reads) <= 3 * packs


def test_a_restore_fetches_what_it_needs(far: Far, image: Path) -> None:
    """Of two sets' packs the one is read that the image needs, once."""
    far.backup(image)
    first = Recording(open_storage(far.url))
    far.gives("d", image, first)
    wanted = {name for call, name in first.names if call == "read" and name.startswith("packs/")}
    image.write_bytes(os.urandom(3 << 20))
    far.backup(image)
    second = Recording(open_storage(far.url))
    far.gives("d", image, second)
    assert not wanted & {name for call, name in second.names if call == "read"}
    assert not [name for call, name in second.names if call == "open" or call == "size"]


def test_a_cache_that_is_damaged_or_lost_costs_time_alone(
    far: Far, image: Path, counted, tmp_path: Path
) -> None:
    far.backup(image, counted()[1])
    copies = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    kept = {path.name.partition("_")[0] for path in copies if path.parent.parent.name == "objects"}
    assert kept == {"sets", "maps"}
    assert [path for path in copies if path.parent.name == "index"]
    for path in copies:
        path.write_bytes(path.read_bytes()[:-40] + bytes(40))
    assert far.backup(image, counted()[1]).images[0].blocks_changed == 0
    for path in copies:
        path.write_bytes(b"")
    assert far.backup(image, counted()[1]).images[0].blocks_changed == 0
    far.is_whole()


def test_the_cache_does_not_show_what_is_gone(far: Far, image: Path, counted) -> None:
    made = far.backup(image, counted()[1]).set
    storage = counted()[1]
    storage.list_names("sets/")
    assert storage.read(f"sets/{made}")
    open_storage(far.url).delete(f"sets/{made}")
    fresh = counted()[1]
    assert fresh.list_names("sets/") == []
    with pytest.raises(Exception, match="not in"):
        fresh.read(f"sets/{made}")
    with far.open(fresh) as repository:
        assert repository.storage.list_names("sets/") == []


def test_the_cache_keeps_to_its_room(far: Far, s3: Store, tmp_path: Path) -> None:
    storage = Cached(open_storage(far.url), room=100_000)
    for number in range(20):
        storage.create(f"sets/{number:032x}", os.urandom(10_000))
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert 50_000 < kept <= 100_000


def test_an_incremental_after_a_prune(far: Far, image: Path, counted, s3: Store) -> None:
    """Condemnations that wait for somebody, an index that a prune wrote, pages that it moved."""
    kept = image.read_bytes()
    ids = []
    for number in range(3):
        image.write_bytes(kept[: (number + 1) << 19] + os.urandom(1 << 19) + kept[(number + 2) << 19 :])
        ids.append(far.backup(image, counted()[1]).set)
    with far.open() as repository:
        session = Session.begin(repository)  # It knows of no condemnation, and has no end.
        forgetting.execute(repository, forgetting.plan_sets(repository, ids[:2], Silent()), Silent())
        for _ in range(2):
            with Prune(repository, PruneOptions(max_unused="0%"), Silent()) as work:
                done = work.execute(work.plan())
        assert done.condemned and done.waiting
    calls = []
    for _ in range(3):
        recording, storage = counted()
        s3.door.forget()
        assert far.backup(image, storage).images[0].blocks_changed == 0
        calls.append(recording.total)
        assert sum(s3.door.counts.values()) <= recording.total, s3.door.requests
    # The first one reads two condemnations and the moved page, and writes that page's new places down.
    assert calls[0] <= 19 and max(calls[1:]) <= 12, (calls, recording.names)
    session.abandon()
    far.gives("d", image)
    with far.open() as repository, Prune(repository, PruneOptions(max_unused="0%"), Silent()) as work:
        assert not work.execute(work.plan()).condemned
    assert far.backup(image, counted()[1]).images[0].blocks_changed == 0
    far.is_whole()
