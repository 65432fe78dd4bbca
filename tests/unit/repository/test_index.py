"""The index is a hint: it saves space, and its damage costs nothing else."""

from __future__ import annotations

import blake3

from imager.events import Silent
from imager.repository import index
from imager.repository.format import KIND_DATA
from imager.repository.session import Session
from tests.unit.repository.building import Lab, noise
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


def test_rebuilding_finds_all_blocks_again(lab: Lab) -> None:
    lab.backup(sda=noise(30))
    lab.backup(sda=noise(40, seed=1))
    old = lab.paths("index")
    repository = lab.reopen()
    made, dropped = index.rebuild(repository, Silent())
    assert len(made) == 1 and len(dropped) == len(old) == 2
    assert [str(path.relative_to(lab.root)) for path in lab.paths("index")] == made
    assert index.rebuild(lab.reopen(), Silent()) == (made, [])
    repository = lab.reopen()
    known = index.load(repository)
    for content in (noise(30), noise(40, seed=1)):
        for at in range(0, len(content), 4096):
            assert known.find(repository.vault.block_id(content[at : at + 4096])) is not None
    assert len(repository.pack_names(KIND_DATA)) == 2
