"""Golden repositories: what earlier versions wrote, every version reads, by engine and reference reader.

And the other way round: a repository that the engine had no part in, written
from the format's page by `tests.reference_writer`, is restored by it.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from imager import reference
from imager.engine.verify import verify
from imager.events import Silent
from imager.repository import forgetting, sync
from imager.repository.check import check
from imager.repository.imageset import list_sets
from imager.repository.keyless import open_keyless
from imager.repository.prune import Prune, PruneOptions, PruneSummary
from imager.repository.retention import Rules
from imager.storage.folder import FolderStorage
from tests import reference_writer as w
from tests.workbench import KEYFILE, PASSPHRASE, Workbench, sha256, state_in

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
NAMES = sorted(path.name.removesuffix(".tar.xz") for path in GOLDEN.glob("*.tar.xz"))


def unpack(name: str, folder: Path) -> None:
    """The repository as it was written. Python before 3.11.4 has no filters; the archives are our own."""
    known: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    with tarfile.open(GOLDEN / f"{name}.tar.xz") as archive:
        archive.extractall(folder, **known)


@pytest.fixture(autouse=True)
def state(tmp_path: Path) -> Any:
    with state_in(tmp_path / "state"):
        yield


def test_there_are_some() -> None:
    assert set(NAMES) >= {"keys", "plain-lz4", "keyfile-zstd", "passphrase-stream", "sizes", "unreadable"}
    assert NAMES == sorted(path.stem for path in GOLDEN.glob("*.json")), "each with its expectations"


@pytest.mark.parametrize("name", NAMES)
def test_golden_repository(name: str, tmp_path: Path) -> None:
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    unpack(name, tmp_path)
    place = Workbench(tmp_path, encryption=facts["encryption"], create=False)
    with place.open(writing=False) as repository:
        listing = list_sets(repository)
        assert not listing.problems
        assert [one.id for one in listing.sets] == [one["set"] for one in facts["sets"]]
        found = check(repository, Silent(), read_data="all")
        assert found.ok and not found.problems
        for one in listing.sets:
            assert verify(repository, one.id, Silent()).ok
    for one in facts["sets"]:
        manifest = place.manifest(one["set"])
        assert manifest.content.strategy == one["strategy"]
        assert [image.disk for image in manifest.images] == list(one["disks"])
        for image in manifest.images:
            wanted = one["disks"][image.disk]
            assert (image.size, [list(extent) for extent in image.unreadable]) == (
                wanted["size"],
                wanted["unreadable"],
            )
            target = tmp_path / "out"
            summary = place.restore(f"{one['set']}:{image.disk}", target)
            assert summary.verified and sha256(target) == wanted["sha256"], f"restore of {one['set']}"
            target.unlink()
            place.reference(one["set"], target, image.disk)
            assert sha256(target) == wanted["sha256"], f"reference reader of {one['set']}"
            target.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_repository_is_copied_without_a_key(name: str, tmp_path: Path) -> None:
    """Checked, copied, checked again; the copy's sets are the same sets, and each disk comes back."""
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    unpack(name, tmp_path)
    copy = tmp_path / "copied" / "repo"
    with open_keyless(FolderStorage(str(tmp_path / "repo"))) as source:
        found = check(source, Silent(), read_data="all")
        assert found.ok and not found.problems
        done = sync.sync(source, FolderStorage(str(copy)), sync.Wishes(), Silent(), verify=True)
    ids = [one["set"] for one in facts["sets"]]
    assert done.ok and list(done.sets) == ids
    for kind in ("slots", "epochs", "sets", "sessions", "packs", "maps"):
        for path in (tmp_path / "repo" / kind).rglob("*"):
            if path.is_file():
                assert (copy / path.relative_to(tmp_path / "repo")).read_bytes() == path.read_bytes()
    place = Workbench(copy.parent, encryption=facts["encryption"], create=False)
    with place.open(writing=False) as repository:
        found = check(repository, Silent(), read_data="all")
        assert found.ok and not found.problems
    last = facts["sets"][-1]
    for disk, wanted in last["disks"].items():
        target = tmp_path / "out"
        assert place.restore(f"{last['set']}:{disk}", target).verified
        assert sha256(target) == wanted["sha256"]
        target.unlink()
        place.reference(last["set"], target, disk)
        assert sha256(target) == wanted["sha256"]
        target.unlink()
    with open_keyless(FolderStorage(str(tmp_path / "repo"))) as source:
        again = sync.sync(source, FolderStorage(str(copy)), sync.Wishes(), Silent())
    assert (again.packs, again.maps, again.objects, again.sets) == (0, 0, 0, ())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "passphrase-stream"])
def test_a_golden_repository_goes_on(name: str, tmp_path: Path) -> None:
    """This version adds a set to it, of another lineage, and all is as it should be."""
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    unpack(name, tmp_path)
    place = Workbench(tmp_path, encryption=facts["encryption"], create=False)
    last = facts["sets"][-1]
    disk = next(iter(last["disks"]))
    image = tmp_path / "image"
    place.restore(f"{last['set']}:{disk}", image)
    one = place.backup(image, name="more")
    assert one.images[0].blocks_new == 0, "all of it is there already"
    place.gives(one.set, {"image": image})
    place.is_whole([one.set, *(one["set"] for one in facts["sets"])])


@pytest.mark.parametrize("kind", ["none", "keyfile", "passphrase"])
@pytest.mark.parametrize("codec", [w.STORED, w.LZ4, w.ZSTD])
def test_the_engine_restores_what_it_did_not_write(kind: str, codec: int, tmp_path: Path) -> None:
    secrets = {"keyfile": KEYFILE, "passphrase": PASSPHRASE.encode()}
    slots = [(kind, secrets[kind])] if kind in secrets else []
    writer = w.Writer(tmp_path / "repo", *slots, seed=codec, kdf=(64, 1, 1))
    text = b"some text that compresses " * 40000
    cipher = w.CHACHA if codec == w.LZ4 else w.AES
    first = w.Disk.of(text[:700_001], "a")
    sets = {writer.write_set("line", [first], codec=codec, cipher=cipher): {"a": first.content()}}
    # Shared blocks and pages, small packs, two levels, unused and unreadable blocks.
    second = w.Disk.of(text[:600_000] + bytes(90_001) + text[:710_000], "a")
    third = w.Disk(
        "b", 300 * 4096 + 5, 4096, {299: text[:4096], 300: b"tail!"}, frozenset({5, 6}), frozenset({9})
    )
    one = writer.write_set("line", [second, third], codec=codec, cipher=cipher, pack_bytes=20_000)
    sets[one] = {"a": second.content(), "b": third.content()}
    place = Workbench(tmp_path, encryption=kind, create=False)
    for text_, wanted in sets.items():
        place.gives(text_, wanted, old=b"x" * 1_000_000)
    place.is_whole(sets)
    assert place.manifest(one).images[1].unreadable == ((9 * 4096, 4096),)
    # And it can be built on.
    image = tmp_path / "a"
    image.write_bytes(second.content() + b"more")
    more = place.backup(image, name="line")
    place.gives(more.set, {"a": image.read_bytes()})
    place.is_whole([*sets, more.set])


def test_the_engine_reads_what_writers_signed(tmp_path: Path) -> None:
    """Certificates, a revocation and two epochs, none of them made by the tool."""
    writer = w.Writer(tmp_path / "repo", ("keyfile", KEYFILE), seed=9)
    image = w.Disk.of(b"of a host " * 9000, "a")
    writer.add_slot("keyfile", b"w" * 40, role="write", host="host")
    writer.add_slot("keyfile", b"r" * 40, role="read")
    (one,) = writer.writers
    writer.signer = one
    first = writer.write_set("line", [image])
    writer.revoke(one, [first])
    later = writer.write_set("line", [image])
    writer.signer = None
    writer.add_epoch()
    writer.add_slot("keyfile", KEYFILE[::-1])
    last = writer.write_set("line", [image])
    writer.add_slot("keyfile", b"x" * 40, role="write", host="another")
    writer.signer = next(reversed(writer.writers))
    forged = writer.write_set("line", [image])
    for keyfile, readable in ((KEYFILE, {first}), (KEYFILE[::-1], {first, last}), (b"r" * 40, {first})):
        (tmp_path / "key").write_bytes(keyfile)
        place = Workbench(tmp_path, encryption="keyfile", create=False)
        with place.open(writing=False) as repository:
            listing = list_sets(repository)
            refused = {item.id: item.reason for item in listing.problems}
            assert "revoked" in refused.pop(later)
            if last in readable:
                assert "may sign sets of another" in refused.pop(forged)
            assert not refused
            assert {one.id for one in listing.sets if one.body is not None} == readable
        other = reference.Repository(str(tmp_path / "repo"), keyfile=keyfile)
        for set_id in readable:
            place.restore(set_id, tmp_path / "out")
            assert (tmp_path / "out").read_bytes() == image.content()
            (tmp_path / "out").unlink()
            assert other.images(other.resolve(set_id))[0].size == len(image.content())
        with pytest.raises(reference.Damaged, match="revoked"):
            other.resolve(later)
        with pytest.raises((reference.Damaged, reference.WrongKey)):
            other.images(other.resolve(forged))


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_repository_is_pruned(name: str, tmp_path: Path) -> None:
    """All but the newest set of each lineage go, and what only they needed; both readers read the rest."""
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    unpack(name, tmp_path)
    place = Workbench(tmp_path, encryption=facts["encryption"], create=False)

    def run() -> PruneSummary:
        with (
            open_keyless(place.storage(), writing=True) as repository,
            Prune(repository, PruneOptions(max_unused="0%"), Silent()) as work,
        ):
            return work.execute(work.plan())

    assert run().condemned == 0
    place.is_whole([one["set"] for one in facts["sets"]])
    with place.open() as repository:
        plan = forgetting.plan_rules(repository, Rules(last=1), Silent())
        forgetting.execute(repository, plan, Silent())
    summary = run()
    assert summary.condemned == 0
    if name in ("plain-lz4", "keyfile-zstd"):
        assert plan.doomed and summary.packs_deleted > 0
    gone = {manifest.id for manifest in plan.doomed}
    for one in facts["sets"]:
        if one["set"] in gone:
            continue
        place.is_whole([one["set"]])
        for disk, wanted in one["disks"].items():
            target = tmp_path / "out"
            place.reference(one["set"], target, disk)
            assert sha256(target) == wanted["sha256"]
            target.unlink()
