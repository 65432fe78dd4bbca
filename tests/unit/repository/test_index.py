"""The index is a hint: it saves space, and its damage costs nothing else."""

from __future__ import annotations

import blake3
import pytest

from imager.events import Silent
from imager.repository import index, merging, sessions
from imager.repository.check import check
from imager.repository.format import INDEX, KIND_DATA
from imager.repository.repository import Repository
from imager.repository.segments import segment_name
from imager.repository.session import Session
from imager.storage.rehearsal import Distant
from tests.reference_writer import index_segment
from tests.unit.repository.building import Lab, noise
from tests.unit.repository.segment_making import digest, segment_of
from tests.unit.repository.test_session import fill


def test_what_is_stored_is_known_to_the_next_writer(lab: Lab) -> None:
    lab.backup(sda=noise(50))
    before = len(lab.paths("packs"))
    lab.backup(name="other", sda=noise(50))
    assert len(lab.paths("packs")) == before
    lab.backup(name="more", sda=noise(51))
    assert len(lab.paths("packs")) == before + 1
    (segment, *_) = lab.paths("index")
    assert segment.name == blake3.blake3(b"imager index v1" + segment.read_bytes()).hexdigest()


def test_a_pack_that_is_gone_is_not_known(lab: Lab) -> None:
    lab.backup(sda=noise(5))
    gone = lab.paths("packs")[0]
    gone.unlink()
    lab.reopen()
    lab.backup(name="other", sda=noise(5))
    assert len(lab.paths("packs")) == 1 and not gone.exists()


def test_a_damaged_segment_is_left_out_with_a_warning(lab: Lab) -> None:
    lab.backup(sda=noise(5))
    (lab.root / "index" / ("ab" * 32)).write_bytes(b"garbage")
    (lab.root / "index" / ("cd" * 32)).write_bytes(b"")
    (lab.root / "index" / ".DS_Store").write_bytes(b"x")
    reporter = Silent()
    repository = lab.reopen()
    repository.packs_present()
    known = index.load(repository, reporter)
    assert len(reporter.warnings) == 2
    block = noise(5)[:4096]
    assert known.find(repository.vault.block_id(block)) is not None
    assert known.find(bytes(32)) is None


def test_a_long_run_writes_segments_on_the_way(lab: Lab) -> None:
    repository = lab.repository
    known = index.load(repository)
    with Session.begin(repository) as session:
        pack = fill(session)
        session.seal(pack)
        assert index.write_segment(session, known) is None
        number = pack.number
        session.drain()
        fd, _ = repository.pack_reader(number)
        from imager import _native

        name = repository.names.name(number)
        known.add_pack(number, _native.pack_records(fd, name, repository.id))
        assert known.pending == 4
        identity = repository.vault.block_id(noise(4)[:4096])
        found = known.find(identity)
        assert found is not None and found[0] == number
        assert index.write_segment(session, known, reload=True) is not None
        assert known.pending == 0 and known.find(identity) == found
        assert len(lab.paths("index")) == 1


@pytest.mark.parametrize("count", [1, 127, 128, 3024, 3025, 20_000])
def test_a_segment_is_what_the_page_says(lab: Lab, count: int) -> None:
    """Byte for byte what the reference writer makes, filter and all."""
    packs = [digest("one"), digest("two"), digest("three")]
    places = {digest(str(number)): (packs[number % 3], 80 + number) for number in range(count)}
    used = [pack for pack in packs if any(place[0] == pack for place in places.values())]
    rows = [(identity, used.index(pack), offset, 100) for identity, (pack, offset) in places.items()]
    name, data = index_segment(lab.repository.id, used, rows)
    assert segment_of(lab.repository, places) == data and segment_name(data) == INDEX + name.hex()


def test_a_rebuilt_segment_has_a_name_that_no_sleeping_merge_is_about_to_delete(lab: Lab) -> None:
    """Rebuilt, merged with another, rebuilt; then the merger wakes up and deletes what it had merged."""
    lab.backup(sda=noise(30))
    index.rebuild(lab.reopen(), Silent())
    lab.backup(sda=noise(40, seed=1))
    asleep = [str(path.relative_to(lab.root)) for path in lab.paths("index")]
    assert len(asleep) == 2
    repository = lab.reopen()
    known = index.load(repository)
    assert merging.merge(repository, known, [bytes.fromhex(name[-64:]) for name in asleep]).written == 1
    for _ in range(2):
        (made,), dropped = index.rebuild(lab.reopen(), Silent())
        assert len(dropped) == 1 and made not in (*asleep, *dropped)
    for name in asleep:  # It deletes late.
        (lab.root / name).unlink(missing_ok=True)
    repository = lab.reopen()
    known = index.load(repository)
    for content in (noise(30), noise(40, seed=1)):
        for at in range(0, len(content), 4096):
            assert known.find(repository.vault.block_id(content[at : at + 4096])) is not None
    assert check(lab.reopen(), Silent(), read_data="all").ok


def test_a_prune_that_ends_while_a_far_writer_looks_around(lab: Lab) -> None:
    """All names come in one listing; a condemnation in it that is gone when it is to be read says that
    packs of the listing are gone, too."""

    class Racing(Distant):
        raced = 0

        def list_names(self, prefix: str) -> list[str]:
            names = super().list_names(prefix)
            if not prefix:
                for name in [one for one in names if one.startswith("condemned/")]:
                    self.raced += 1
                    for path in lab.paths("packs"):
                        path.unlink()
                    self.delete(name)
            return names

    lab.backup(sda=noise(30))
    packs = [bytes.fromhex(path.name) for path in lab.paths("packs")]
    sessions.condemn(lab.storage, lab.repository.config.repository, packs, [])
    storage = Racing(lab.storage)
    repository = Repository.open(storage, lab.credentials(), writing=True)
    with Session.begin(repository) as session:
        known = index.look_around(session)
        assert storage.raced == 1 and not lab.paths("packs")
        assert known.find(repository.vault.block_id(noise(30)[:4096])) is None
    repository.close()


def test_rebuilding_finds_all_blocks_again(lab: Lab) -> None:
    lab.backup(sda=noise(30))
    lab.backup(sda=noise(40, seed=1))
    old = lab.paths("index")
    repository = lab.reopen()
    made, dropped = index.rebuild(repository, Silent())
    assert len(made) == 1 and len(dropped) == len(old) == 2
    assert [str(path.relative_to(lab.root)) for path in lab.paths("index")] == made
    made, dropped = index.rebuild(lab.reopen(), Silent())
    assert len(made) == len(dropped) == 1
    repository = lab.reopen()
    known = index.load(repository)
    for content in (noise(30), noise(40, seed=1)):
        for at in range(0, len(content), 4096):
            assert known.find(repository.vault.block_id(content[at : at + 4096])) is not None
    assert len(repository.pack_names(KIND_DATA)) == 2
