"""Blocks that two writers stored at once: the merged index has one place of each, and that one may go."""

from __future__ import annotations

from pathlib import Path

import pytest

from imager.events import Silent
from imager.repository import index, merging, sync
from imager.repository.check import check
from imager.repository.format import KIND_DATA
from imager.repository.keyless import open_keyless
from imager.repository.sync import Wishes
from imager.storage.folder import FolderStorage
from tests.unit.repository.building import BLOCK, Lab, noise
from tests.unit.repository.test_prune import forget, prune, whole

CONTENT = noise(30)
LATER = noise(3, seed=77)


def stored_twice(lab: Lab, *, moved: bool) -> dict[Path, str]:
    """Two sets of the same content that know nothing of each other, and one index segment.

    The pack of each set -> the set. `moved`: a prune has moved what the first one refers to, so that
    only the index tells where it is.
    """
    if moved:
        old = lab.backup(sda=noise(20, seed=9) + CONTENT).id
        first = lab.backup(sda=noise(20, seed=8) + CONTENT).id
        forget(lab, old)
        assert prune(lab, max_unused="0%")[1].packs_rewritten
        lab.reopen()
    else:
        first = lab.backup(sda=CONTENT).id
    found = {place(lab): first}
    kept = {path: path.read_bytes() for path in lab.paths("index")}
    for path in kept:
        path.unlink()
    lab.reopen()
    second = lab.backup(name="other", sda=CONTENT).id
    found[place(lab)] = second
    assert len(found) == 2
    for path, data in kept.items():
        path.write_bytes(data)
    repository = lab.reopen()
    known = index.load(repository)
    repository.packs_present()
    merging.merge(repository, known, [name for name, _, _ in known.loaded])
    lab.reopen()
    return found


def place(lab: Lab) -> Path:
    """The pack in which the first block of the content lies, by the index."""
    repository = lab.repository
    known = index.load(repository)
    repository.packs_present()
    at = known.find(repository.vault.block_id(CONTENT[:BLOCK]))
    assert at is not None
    name = repository.names.name(at[0])
    assert name is not None
    return next(path for path in lab.paths("packs") if path.name == name.hex())


def test_the_index_may_lack_what_was_stored_twice(lab: Lab) -> None:
    """The set that goes is the one whose pack the index names: nothing is damaged, and check says so."""
    sets = stored_twice(lab, moved=False)
    gone = place(lab)
    lab.backup(sda=LATER)
    lab.backup(name="other", sda=LATER)
    forget(lab, sets[gone])
    prune(lab, max_unused="0%")
    assert not gone.exists()
    whole(lab)
    found = check(lab.reopen(), Silent(), read_data="all")
    assert [note for note in found.notes if "30 blocks are not in the index" in note]


def test_a_prune_takes_packs_into_the_index_that_no_segment_names(lab: Lab) -> None:
    """A rebuilt index names no pack all of whose blocks it knows elsewhere; then elsewhere is pruned."""
    sets = stored_twice(lab, moved=False)
    index.rebuild(lab.reopen(), Silent())
    gone = place(lab)
    lab.reopen()
    lab.backup(sda=LATER)
    lab.backup(name="other", sda=LATER)
    forget(lab, sets[gone])
    prune(lab, max_unused="0%")
    assert not gone.exists()
    found = check(lab.reopen(), Silent(), read_data="all")
    assert found.ok and not found.problems, found.problems
    assert place(lab) in sets


def test_a_segment_that_is_missing_is_still_a_problem(lab: Lab) -> None:
    lab.backup(sda=CONTENT)
    (segment,) = lab.paths("index")
    segment.unlink()
    found = check(lab.reopen(), Silent(), read_data="all")
    assert [problem.kind for problem in found.problems] == ["index"]


@pytest.mark.parametrize("kept", [0, 1])
def test_nothing_is_lost_where_the_index_knows_only_the_place_that_went(
    lab: Lab, kept: int, tmp_path: Path
) -> None:
    """A prune counts on one of two places, by an index that a merge is just about to replace: what
    it deletes may be the place that the merged one names."""
    sets = stored_twice(lab, moved=True)
    gone = place(lab)
    (stays,) = (path for path in sets if path != gone)
    gone.unlink()  # The prune had marked the other one.
    index.thin(lab.reopen(), Silent())
    repository = lab.reopen()
    found = repository.locator.find(repository.vault.block_id(CONTENT[:BLOCK]), KIND_DATA)
    assert found is not None and repository.names.name(found[0]) == bytes.fromhex(stays.name)
    whole(lab)
    # Whichever of the sets is forgotten: what the other one needs stays, and can be copied.
    lab.backup(sda=LATER)
    lab.backup(name="other", sda=LATER)
    forget(lab, list(sets.values())[kept])
    prune(lab, max_unused="0%")
    whole(lab)
    with open_keyless(FolderStorage(str(lab.root))) as source:
        assert sync.sync(source, FolderStorage(str(tmp_path / "copy")), Wishes(), Silent()).ok
