"""Verify names exactly what is damaged; what it found is remembered."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from imager.engine import verified, verify
from imager.errors import SourceError, UsageError
from imager.events import Silent
from imager.repository.manifest import Manifest
from imager.repository.repository import Repository
from tests.unit.engine.conftest import Writer, content
from tests.unit.engine.test_restore import damage

MIB = 1 << 20


def check(repository: Repository, text: str, against: Path | None = None) -> verify.VerifySummary:
    return verify.verify(repository, text, Silent(), against=str(against) if against else None)


@pytest.mark.parametrize("size", [0, 1, 4096, 3 * MIB + 5])
def test_whole(repository: Repository, writer: Writer, size: int) -> None:
    data = content(size)
    manifest = writer.store({"sda": data, "sdb": content(size, seed=2)})
    summary = check(repository, "disk")
    assert summary.ok and not summary.damage
    assert summary.disks == ("sda", "sdb")
    assert summary.blocks * 4096 >= summary.bytes >= summary.blocks * 4096 - 2 * 4095
    assert summary.bytes <= 2 * size
    msgspec.json.encode(summary)
    kept = verified.last(repository.place, manifest.id)
    assert kept is not None and kept.ok and kept.bytes == summary.bytes


def test_one_disk_alone_is_not_the_set(plain: Repository, plain_writer: Writer) -> None:
    manifest = plain_writer.store({"sda": content(MIB), "sdb": content(MIB, seed=2)})
    assert check(plain, "disk:sdb").disks == ("sdb",)
    assert verified.last(plain.place, manifest.id) is None


def test_damaged_blocks_are_named(repository: Repository, writer: Writer) -> None:
    data = os.urandom(4 * MIB)
    manifest = writer.store({"sda": content(MIB), "sdb": data})
    # the helper damages the only image: a set of its own shares no pack, and no block that could stand in
    other = writer.store({"sda": os.urandom(4 * MIB) + b"other"})
    for block in (700, 701, 12, 1023):
        damage(repository, other, writer, block)
    summary = check(repository, other.id)
    assert not summary.ok
    found = {(one.start, one.length) for one in summary.damage}
    assert found == {(12 * 4096, 4096), (700 * 4096, 2 * 4096), (1023 * 4096, 4096)}
    assert all(one.disk == "sda" and one.pack == writer.packs[-1] for one in summary.damage)
    assert all(one.reason for one in summary.damage)
    assert summary.damaged_bytes == 4 * 4096
    kept = verified.last(repository.place, other.id)
    assert kept is not None and not kept.ok and kept.damaged == 4 * 4096
    assert check(repository, manifest.id).ok


def test_a_record_that_several_blocks_use(plain: Repository, plain_writer: Writer) -> None:
    block = os.urandom(4096)
    manifest = plain_writer.store({"sda": block * 3 + bytes(4096) + block + os.urandom(4096)})
    damage(plain, manifest, plain_writer, 1)
    assert [(one.start, one.length) for one in check(plain, "disk").damage] == [(0, 12288), (16384, 4096)]


def test_missing_pack(plain: Repository, plain_writer: Writer) -> None:
    data = os.urandom(MIB + 100)
    plain_writer.store({"sda": data})
    name = plain_writer.packs[0]
    Path(plain.storage.url, "packs", name[:2], name).unlink()
    summary = check(plain, "disk")
    assert [(one.start, one.length) for one in summary.damage] == [(0, len(data))]
    assert "missing" in summary.damage[0].reason and summary.damage[0].pack == name


def test_truncated_pack(plain: Repository, plain_writer: Writer) -> None:
    plain_writer.store({"sda": os.urandom(MIB)})
    name = plain_writer.packs[0]
    path = Path(plain.storage.url, "packs", name[:2], name)
    path.chmod(0o600)
    os.truncate(path, 500_000)
    summary = check(plain, "disk")
    assert 450_000 < summary.damaged_bytes < 700_000
    os.truncate(path, 20)
    plain.close()
    assert check(plain, "disk").damaged_bytes == MIB


def flip_map(repository: Repository, manifest: Manifest, at: int) -> None:
    root = manifest.images[0].root
    assert root is not None
    path = Path(repository.storage.url, "maps", root.pack[:2], root.pack)
    path.chmod(0o600)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
    repository.close()


def test_a_damaged_page_is_named(repository: Repository, writer: Writer) -> None:
    manifest = writer.store({"sda": os.urandom(4 * MIB)})
    root = manifest.images[0].root
    assert root is not None
    flip_map(repository, manifest, 400)  # within the first leaf
    summary = check(repository, "disk")
    assert [(one.start, one.length) for one in summary.damage] == [(0, 256 * 4096)]
    assert summary.blocks == 768
    flip_map(repository, manifest, root.offset + 80)
    summary = check(repository, "disk")
    assert [(one.start, one.length) for one in summary.damage] == [(0, 4 * MIB)]


def test_against(repository: Repository, writer: Writer, tmp_path: Path) -> None:
    data = content(4 * MIB + 700)
    writer.store({"sda": data})
    path = tmp_path / "device"
    path.write_bytes(data)
    assert check(repository, "disk", path).ok
    changed = bytearray(data)
    changed[2 * MIB] ^= 1
    changed[-1] ^= 1
    path.write_bytes(changed)
    summary = check(repository, "disk", path)
    assert not summary.ok and not summary.damage
    assert summary.differing == (("sda", 2 * MIB, 4096), ("sda", 4 * MIB, 700))
    path.write_bytes(data + b"more")
    assert check(repository, "disk", path).ok
    path.write_bytes(data[: 3 * MIB + 5])
    assert check(repository, "disk", path).differing == (("sda", 3 * MIB, MIB + 700),)
    with pytest.raises(SourceError):
        check(repository, "disk", tmp_path / "none")


def test_against_needs_one_disk(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    plain_writer.store({"sda": content(MIB), "sdb": content(MIB)})
    with pytest.raises(UsageError):
        check(plain, "disk", tmp_path / "x")


def test_a_block_that_lies_elsewhere_too(repository: Repository, writer: Writer, tmp_path: Path) -> None:
    """Two sessions that knew nothing of each other stored the same blocks; one pack is lost."""
    from imager._native import Known, pack_records
    from imager.repository.index import segment_name
    from tests.unit.engine.test_restore import go

    data = os.urandom(2 * MIB)
    other = writer.store({"sda": data[:MIB] + os.urandom(4096) + data[MIB:]}, name="other")
    manifest = writer.store({"sda": data})
    lost, spare = writer.packs[1], writer.packs[0]
    known = Known(repository.names)
    path = Path(repository.storage.url, "packs", spare[:2], spare)
    fd = os.open(path, os.O_RDONLY)
    records = pack_records(fd, bytes.fromhex(spare), repository.id)
    os.close(fd)
    known.add_pack(repository.names.intern(bytes.fromhex(spare)), records)
    segment = known.segment(repository.id)
    assert segment is not None
    repository.storage.create(segment_name(segment), segment)

    Path(repository.storage.url, "packs", lost[:2], lost).unlink()
    repository.close()
    reporter = Silent()
    summary = verify.verify(repository, manifest.id, reporter)
    assert summary.ok and summary.blocks == 512
    assert not reporter.warnings, "as after a prune, which deletes what it has moved"
    go(repository, manifest.id, tmp_path / "out.img")
    assert (tmp_path / "out.img").read_bytes() == data

    damage(repository, other, writer, 7)
    summary = check(repository, manifest.id)
    assert [(one.start, one.length, one.pack) for one in summary.damage] == [(7 * 4096, 4096, lost)]
