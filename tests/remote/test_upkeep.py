"""Check and repair of far repositories read what they need, and no more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from imager.events import Silent
from imager.repository import index
from imager.repository.check import check
from imager.storage.location import open_storage
from imager.storage.rehearsal import Recording
from tests.objectstores import Store
from tests.remote.conftest import Far


def test_a_check_of_the_structure_reads_the_ends_of_packs(far: Far, image: Path, s3: Store) -> None:
    image.write_bytes(os.urandom(12 << 20))
    far.backup(image)
    recording = Recording(open_storage(far.url))
    with far.open(recording) as repository:
        assert check(repository, Silent()).ok
    assert not [name for call, name in recording.names if call == "open"]
    packs = [name for call, name in recording.names if call == "read" and name.startswith("packs/")]
    assert len(packs) == 2  # its header, its footer
    assert s3.objects is not None
    (pack,) = [path for path in (s3.objects / "packs").rglob("*") if path.is_file()]
    good = pack.read_bytes()
    for bad in (good[:-1], good[:-20] + bytes(20), b"\0" * 72 + good[72:], good[:50]):
        pack.write_bytes(bad)
        with far.open() as repository:
            found = check(repository, Silent())
        assert not found.ok and pack.name in str(found.problems)
    pack.write_bytes(good)
    far.is_whole()


@pytest.mark.parametrize("mib", [1, 24])  # a trailer within the last 256 KiB, and a longer one
def test_the_index_is_rebuilt_from_trailers(far: Far, tmp_path: Path, mib: int) -> None:
    image = tmp_path / "big.img"
    image.write_bytes(os.urandom(mib << 20))
    far.backup(image)
    recording = Recording(open_storage(far.url))
    with far.open(recording) as repository:
        made, _ = index.rebuild(repository, Silent())
        assert len(made) == 1
        known = index.load(repository)
        assert known.damaged_pages == 0
    packs = [name for call, name in recording.names if call == "read" and name.startswith("packs/")]
    assert 2 <= len(packs) <= 3
    assert far.backup(image, strategy="full").images[0].blocks_new == 0
    far.is_whole()


def test_a_repair_in_an_object_store(far: Far, image: Path, s3: Store) -> None:
    """A damaged pack is set aside; the next backup stores again what its source still has."""
    far.backup(image)
    assert s3.objects is not None
    (pack,) = [path for path in (s3.objects / "packs").rglob("*") if path.is_file()]
    data = pack.read_bytes()
    pack.write_bytes(data[:500_000] + bytes(5000) + data[505_000:])
    with far.open() as repository:
        found = check(repository, Silent(), read_data="all", repair=True)
    assert not pack.exists() and found.repaired
    assert (s3.objects / "damaged" / pack.relative_to(s3.objects)).exists()
    far.backup(image)
    far.gives("latest", image)
