"""A place is a hint, the id is the truth: where a record is stored twice, one whole copy is enough."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from imager import _native
from imager.engine.verify import verify
from imager.events import Silent
from imager.repository.check import check
from imager.repository.format import KIND_DATA, RECORD_HEAD, pack_object
from tests.workbench import Workbench

BLOCK = 4096


@pytest.fixture
def twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Workbench, Path, list[str]]:
    """Two sets of one image, whose writers did not know of each other: each block lies in two packs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    place = Workbench(tmp_path, encryption="keyfile", block_size=BLOCK)
    image = tmp_path / "image"
    image.write_bytes(random.Random(5).randbytes(300 * BLOCK))
    first = place.backup(image, name="a")
    index, hidden = place.root / "index", tmp_path / "hidden"
    index.rename(hidden)
    index.mkdir()
    second = place.backup(image, name="b")
    assert second.images[0].blocks_new == 300
    for segment in hidden.iterdir():
        segment.rename(index / segment.name)
    return place, image, [first.set, second.set]


def harm_every_block(place: Workbench, set_id: str) -> None:
    """Flip a bit in the payload of each record of the set's data pack."""
    with place.reading(set_id) as (repository, _, reader):
        (number,) = {
            number for _, _, part in reader.walk() if not isinstance(part, int) for number in part.packs()
        }
        name = repository.names.name(number)
        assert name is not None
        fd = repository.storage.open(pack_object(KIND_DATA, name))
        records = _native.pack_records(fd, name, repository.id)
    with (place.root / pack_object(KIND_DATA, name)).open("r+b") as file:
        for _, _, offset, _ in records:
            file.seek(offset + RECORD_HEAD)
            byte = file.read(1)[0]
            file.seek(offset + RECORD_HEAD)
            file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("harmed", [0, 1])
def test_the_other_copy_is_found(
    twice: tuple[Workbench, Path, list[str]], tmp_path: Path, harmed: int
) -> None:
    """Whichever of the two packs is hurt, and in whatever order the index names them."""
    place, image, sets = twice
    harm_every_block(place, sets[harmed])
    for set_id in sets:
        place.restore(set_id, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == image.read_bytes()
        (tmp_path / "out").unlink()
        place.reference(set_id, tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == image.read_bytes()
        (tmp_path / "out").unlink()
        with place.open(writing=False) as repository:
            assert verify(repository, set_id, Silent()).ok
    with place.open() as repository:
        (problem,) = check(repository, Silent(), read_data="all").problems
        assert problem.kind == "pack" and not problem.hurt


def test_two_damaged_copies_are_none(twice: tuple[Workbench, Path, list[str]], tmp_path: Path) -> None:
    place, _, sets = twice
    for set_id in sets:
        harm_every_block(place, set_id)
    for set_id in sets:
        with place.open(writing=False) as repository:
            summary = verify(repository, set_id, Silent())
        assert sum(one.length for one in summary.damage) == 300 * BLOCK
