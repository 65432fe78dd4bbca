"""Prune: what dies goes, what lives stays readable, and the storage ends with nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager import _native, reference
from imager.errors import IntegrityError
from imager.events import Silent
from imager.repository import forgetting, imageset, sessions
from imager.repository.check import check
from imager.repository.format import KIND_DATA, KIND_MAP
from imager.repository.keyless import open_keyless
from imager.repository.prune import Prune, PruneOptions, PrunePlan, PruneSummary
from imager.repository.session import Session
from imager.storage.folder import FolderStorage
from tests.unit.repository.building import BLOCK, Lab, noise


def prune(lab: Lab, reporter: Silent | None = None, **options: object) -> tuple[PrunePlan, PruneSummary]:
    """One run, as a machine without any key does it."""
    with (
        open_keyless(FolderStorage(str(lab.root)), writing=True) as repository,
        Prune(repository, PruneOptions(**options), reporter or Silent()) as work,  # type: ignore[arg-type]
    ):
        plan = work.plan()
        return plan, work.execute(plan)


def forget(lab: Lab, *ids: str) -> None:
    plan = forgetting.plan_sets(lab.repository, ids, Silent())
    forgetting.execute(lab.repository, plan, Silent())


def whole(lab: Lab) -> None:
    """Every set is there for both readers, and nothing is wrong."""
    found = check(lab.reopen(), Silent(), read_data="all")
    assert found.ok, found.problems
    listing = imageset.list_sets(lab.repository)
    keyfile = lab.keyfile.read_bytes() if lab.keyfile.exists() else None
    reader = reference.Repository(str(lab.root), keyfile=keyfile)
    for manifest in listing.sets:
        for image in reader.images(reader.resolve(manifest.id)):
            content = lab.images[manifest.id][image.disk]
            out = bytearray(len(content))
            for offset, block in reader.blocks(image):
                out[offset : offset + len(block)] = block
            assert bytes(out) == content


def records(lab: Lab) -> Iterator[tuple[str, bytes, int]]:
    """(folder, id, length) of every record that is stored."""
    for folder in ("packs", "maps"):
        for path in lab.paths(folder):
            fd = os.open(path, os.O_RDONLY)
            try:
                for _, identity, _, length in _native.pack_records(
                    fd, bytes.fromhex(path.name), lab.repository.id
                ):
                    yield folder, identity, length
            finally:
                os.close(fd)


def changed(content: bytes, blocks: Iterator[int] | range | list[int], seed: int) -> bytes:
    out = bytearray(content)
    for block in blocks:
        out[block * BLOCK : (block + 1) * BLOCK] = noise(1, seed * 10_000 + block)
    return bytes(out)


def three_sets(lab: Lab) -> list[str]:
    """The second changes every other block of the first, the third every fourth."""
    first = noise(600, seed=1)
    second = changed(first, range(0, 600, 2), 2)
    third = changed(second, range(0, 600, 4), 3)
    return [lab.backup(sda=content).id for content in (first, second, third)]


def test_nothing_to_do(lab: Lab) -> None:
    three_sets(lab)
    before = {path: path.read_bytes() for path in lab.root.rglob("*") if path.is_file()}
    plan, summary = prune(lab)
    assert (plan.unused, plan.drop, plan.rewrite, plan.busy) == (0, (), (), 0)
    assert (summary.packs_deleted, summary.packs_written, summary.condemned) == (0, 0, 0)
    assert before == {path: path.read_bytes() for path in lab.root.rglob("*") if path.is_file()}


def test_what_nobody_needs_goes_and_the_rest_moves_together(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0], ids[1])
    plan, summary = prune(lab, max_unused="0%")
    assert plan.drop or plan.rewrite
    assert summary.packs_deleted == len(plan.drop) + len(plan.rewrite) and summary.condemned == 0
    whole(lab)
    # 600 blocks of one set, and the pages of its map; each record once, nothing else.
    found = list(records(lab))
    assert len({identity for _, identity, _ in found}) == len(found)
    assert sum(folder == "packs" for folder, _, _ in found) == 600
    assert lab.paths("condemned") == [] and len(lab.paths("sessions")) == 1
    again, summary = prune(lab, max_unused="0%")
    assert (again.unused, summary.packs_deleted, summary.packs_written) == (0, 0, 0)


def test_backups_go_on_after_a_prune(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0], ids[1])
    prune(lab, max_unused="0%")
    lab.reopen()
    content = changed(lab.images[ids[2]]["sda"], [5, 300], 4)
    before = len(lab.paths("packs"))
    lab.backup(sda=content)
    whole(lab)
    # What was moved is known where it is now: two blocks are new, no more.
    new = sum(folder == "packs" for folder, _, _ in records(lab)) - 600
    assert (new, len(lab.paths("packs")) - before) == (2, 2)


def test_the_limit_says_how_much_stays_unused(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0])
    plan, summary = prune(lab, max_unused="100%")
    assert plan.rewrite == () and plan.unused > 0
    plan, summary = prune(lab, max_unused="20%")
    assert plan.left <= 0.2 * (plan.live + plan.left)
    assert plan.rewrite
    most = max(pack.unused for pack in plan.rewrite)
    # One pack less would have left too much.
    assert plan.left + most > 0.2 * plan.live
    whole(lab)


def test_a_budget_is_kept(lab: Lab) -> None:
    ids = three_sets(lab)
    forget(lab, ids[0], ids[1])
    full, _ = None, None
    with open_keyless(FolderStorage(str(lab.root))) as repository:
        with Prune(repository, PruneOptions(max_unused="0"), Silent(), dry_run=True) as work:
            full = work.plan()
    assert full.copied > 0 and lab.paths("condemned") == []
    plan, summary = prune(lab, max_unused="0", max_rewrite=full.copied // 2)
    assert 0 < plan.copied <= full.copied // 2 and summary.bytes_written < full.copied
    _, summary = prune(lab, max_unused="0", max_minutes=0.0)
    assert summary.packs_rewritten == 0
    whole(lab)
    _, summary = prune(lab, max_unused="0")
    assert summary.packs_rewritten > 0
    whole(lab)
