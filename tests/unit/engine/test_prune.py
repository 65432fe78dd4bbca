"""Prune beside real backups: what it costs, and what backups and restores are like after it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from imager.events import Silent
from imager.repository import forgetting, imageset
from imager.repository.keyless import open_keyless
from imager.repository.prune import Prune, PruneOptions, PrunePlan, PruneSummary
from tests.unit.engine.test_backup import BLOCK, json_map, overwrite
from tests.workbench import Workbench

MIB = 1 << 20


@pytest.fixture(params=["none", "keyfile"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "state"))
    return Workbench(tmp_path, encryption=request.param, block_size=BLOCK, record=True)


def forget(place: Workbench, *sets: str) -> None:
    with place.open() as repository:
        plan = forgetting.plan_sets(repository, sets, Silent())
        forgetting.execute(repository, plan, Silent())


def prune(place: Workbench, **options: object) -> tuple[PrunePlan, PruneSummary]:
    with (
        open_keyless(place.storage(), writing=True) as repository,
        Prune(repository, PruneOptions(**options), Silent()) as work,  # type: ignore[arg-type]
    ):
        plan = work.plan()
        return plan, work.execute(plan)


def history(place: Workbench, image: Path, sets: int, changes: int) -> list[str]:
    """Sets of an image of 16 MiB, of which some blocks change each time."""
    image.write_bytes(random.Random(1).randbytes(16 * MIB))
    ids = []
    for seed in range(sets):
        if seed:
            chance = random.Random(seed)
            overwrite(image, sorted(chance.sample(range(4096), changes)), seed)
        ids.append(place.backup(image, name="d").set)
    return ids


def io_of_this_process() -> tuple[int, int]:
    """Bytes that this process asked the kernel to read and to write, by the kernel's own count."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def test_what_is_copied_is_what_the_threshold_demands(place: Workbench, tmp_path: Path) -> None:
    ids = history(place, tmp_path / "image", 12, 300)
    forget(place, *ids[:-1:2])
    before = io_of_this_process()
    plan, summary = prune(place, max_unused="3%")
    after = io_of_this_process()
    read, written = (b - a for a, b in zip(before, after, strict=True))
    assert plan.rewrite and plan.left <= 0.03 * (plan.live + plan.left)
    # Each live record of the packs that have to go is read once and written once; and each page of
    # the maps that are left is read once, to know what lives.
    pages = summary.bytes_of_pages
    assert read <= 1.2 * (plan.copied + pages) + 64 * 1024, (read, plan.copied, pages)
    assert written <= 1.2 * plan.copied + 64 * 1024
    assert summary.bytes_read <= 1.1 * plan.copied and summary.bytes_written <= 1.1 * plan.copied
    place.is_whole(ids[1::2])


def test_what_the_newest_set_needs_is_put_together(place: Workbench, tmp_path: Path) -> None:
    ids = history(place, tmp_path / "image", 8, 400)
    forget(place, *ids[:-3])
    prune(place, max_unused="0%")
    place.is_whole(ids[-3:])
    with place.reading(ids[-1]) as (repository, _, reader):
        pieces = [(count, part) for _, count, part in reader.walk() if not isinstance(part, int)]
        identities = [part.get(at)[1] for count, part in pieces for at in range(count)]
        places = repository.locator.find_all(identities, 1)
        mine = {places[identity][0] for identity in identities if identity in places}
        held = sum(
            1
            for name in repository.pack_names(1)
            if repository.names.intern(name) in mine
            for _ in records(repository, name)
        )
    # In the packs that it is read from lies little else: what was whole stayed where it was.
    assert held <= 1.1 * len(set(identities)), (held, len(set(identities)))


def records(repository, name: bytes):  # type: ignore[no-untyped-def]
    from imager.repository.locator import records_of

    return records_of(repository, name, 1)


def test_a_given_map_is_still_believed_after_a_prune(place: Workbench, tmp_path: Path) -> None:
    image = tmp_path / "image"
    ids = history(place, image, 6, 300)
    forget(place, *ids[:-1])
    plan, _ = prune(place, max_unused="0%")
    assert plan.rewrite
    for seed in (77, 78):
        named = sorted(random.Random(seed).sample(range(4096), 50))
        path = json_map(tmp_path / "map", overwrite(image, named, seed), size=16 * MIB)
        reporter = Silent()
        found = place.backup(image, name="d", changed=str(path), reporter=reporter).images[0]
        assert not reporter.warnings and found.change_source.startswith("given")
        # What prune has moved is not read again from the source.
        assert found.blocks_changed == 50 and found.blocks_read <= 50 + 64
        place.gives("d", {"image": image.read_bytes()})
    place.is_whole([ids[-1]])


def test_a_scan_after_a_prune_stores_nothing_and_mends_the_places(place: Workbench, tmp_path: Path) -> None:
    image = tmp_path / "image"
    ids = history(place, image, 5, 300)
    forget(place, *ids[:-1])
    prune(place, max_unused="0%")
    again = place.backup(image, name="d")
    first = again.images[0]
    assert (first.blocks_new, first.blocks_changed) == (0, 0)
    with place.reading(again.set) as (repository, _, reader):
        repository.packs_present()
        for _, _, part in reader.walk():
            assert isinstance(part, int) or part.copy().drop_absent(repository.names) == 0
    place.calls.clear()
    place.backup(image, name="d")
    # Nothing changed: the announcement and the manifest, no pack, no page, no segment.
    assert place.calls["create"] == 2 and place.calls["publish"] == 0, place.calls


def test_a_prune_that_has_nothing_to_do_costs_little(place: Workbench, tmp_path: Path) -> None:
    history(place, tmp_path / "image", 3, 20)
    place.calls.clear()
    prune(place)
    sets = 3
    assert place.calls["open"] <= 2 * sets + 2, place.calls
    assert place.calls["create"] == 1 and place.calls["delete"] == 1, "its announcement comes and goes"
    with place.open() as repository:
        assert len(imageset.list_sets(repository).sets) == sets
