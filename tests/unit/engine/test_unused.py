"""Backups by used blocks: what is left out, what comes back, and what incrementals make of it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager import _native, command
from imager._native import DATA, UNUSED, ZERO, Slots
from imager.engine.diff import diff
from imager.engine.imaging import Imaging, Settings
from imager.engine.source import open_source, plan_sources
from imager.engine.verify import verify
from imager.events import Silent
from imager.extents import Extents
from imager.filesystem import maps
from imager.filesystem.used import Used
from imager.repository.blockmap import MapReader
from imager.repository.imageset import Image
from imager.repository.session import Session
from tests.workbench import Workbench, json_map, state_in

BLOCK = 4096
SIZE = 48 << 20


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workbench]:
    with state_in(tmp_path / "state"):
        yield Workbench(tmp_path, encryption="keyfile", block_size=BLOCK)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """An ext2 over noise: whatever is not in use holds old bytes."""
    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    command.run(["mke2fs", "-q", "-F", "-t", "ext2", "-b", "1024", "-E", "nodiscard", str(path)])
    add(path, "first", 3 << 20)
    return path


def add(disk: Path, name: str, size: int) -> None:
    content = disk.with_name(name)
    content.write_bytes(random.Random(name).randbytes(size))
    command.run(["debugfs", "-w", "-R", f"write {content} {name}", str(disk)])


def remove(disk: Path, name: str) -> None:
    command.run(["debugfs", "-w", "-R", f"rm {name}", str(disk)])


def in_use(disk: Path) -> Extents:
    """Blocks of the image that the filesystem uses some of."""
    fd = os.open(disk, os.O_RDONLY)
    answer = maps.used_blocks(fd, 0, SIZE)
    os.close(fd)
    assert isinstance(answer, Used)
    return answer.extents.blocks(BLOCK)


def left(disk: Path) -> bytes:
    """What a restore gives: the blocks in use, zeroes elsewhere."""
    raw = disk.read_bytes()
    out = bytearray(SIZE)
    for start, end in in_use(disk).scale(BLOCK):
        out[start:end] = raw[start:end]
    return bytes(out)


def kinds(place: Workbench, text: str) -> dict[int, Extents]:
    """Blocks of a set's image by type."""
    found: dict[int, list[tuple[int, int]]] = {}
    with place.reading(text) as (_, _, reader):
        for first, count, part in reader.walk():
            runs = [(part, 0, count)] if isinstance(part, int) else part.runs()
            for kind, low, high in runs:
                found.setdefault(kind, []).append((first + low, first + high))
    return {kind: Extents.of(ranges) for kind, ranges in found.items()}


def holds(place: Workbench, text: str, disk: Path) -> None:
    """The set is the disk's used blocks, for every reader, and the disk itself shows no difference."""
    place.gives(text, {disk.name: left(disk)}, old=disk.read_bytes())
    assert kinds(place, text)[UNUSED] == in_use(disk).complement(SIZE // BLOCK)
    with place.open(writing=False) as repository:
        assert verify(repository, text, Silent(), against=str(disk)).ok
        assert not diff(repository, text, str(disk), Silent()).differs


def test_only_what_is_used_is_read(place: Workbench, disk: Path) -> None:
    summary = place.backup(disk, used_blocks=True)
    [image] = summary.images
    # mke2fs left holes, too
    assert in_use(disk).total * BLOCK // 2 < image.bytes_read <= in_use(disk).total * BLOCK
    assert image.blocks_unused == SIZE // BLOCK - in_use(disk).total
    holds(place, summary.set, disk)
    place.is_whole([summary.set])
    [how] = place.manifest(summary.set).content.changes
    [part] = how["parts"]
    assert (part["number"], part["kind"], part["note"]) == (None, "ext2", "")
    assert summary.images[0].change_source == how["source"]


def test_without_the_option_all_is_read(place: Workbench, disk: Path) -> None:
    summary = place.backup(disk)
    assert summary.images[0].blocks_unused == 0 and summary.images[0].bytes_read > 0.9 * SIZE
    place.gives(summary.set, {disk.name: disk})


def test_a_filesystem_in_doubt_is_imaged_whole(place: Workbench, disk: Path) -> None:
    with open(disk, "r+b") as file:
        file.seek(1024 + 0x3A)
        file.write(b"\0\0")
    reporter = Silent()
    summary = place.backup(disk, used_blocks=True, reporter=reporter)
    said = "every block is imaged: it was not unmounted cleanly, or is mounted"
    assert any(said in note for note in reporter.notes)
    [how] = place.manifest(summary.set).content.changes
    assert how["parts"][0]["every_block"] == "it was not unmounted cleanly, or is mounted"
    place.gives(summary.set, {disk.name: disk})


@pytest.mark.parametrize("mapped", [False, True])
def test_what_became_used_and_unused(mapped: bool, place: Workbench, disk: Path, tmp_path: Path) -> None:
    """Also with a map of changes that knows nothing of what the base left out."""
    for number in range(4):
        one = place.backup(disk, used_blocks=True)
        before, old = disk.read_bytes(), in_use(disk)
        add(disk, f"more-{number}", 2 << 20)
        if number:
            remove(disk, f"more-{number - 1}" if number > 1 else "first")
        after = disk.read_bytes()
        changed = None
        if mapped:
            pages = [at for at in range(0, SIZE, BLOCK) if before[at : at + BLOCK] != after[at : at + BLOCK]]
            known = [(at, BLOCK) for at in pages if at // BLOCK in old]
            changed = str(json_map(tmp_path / "map", known, size=SIZE))
        reporter = Silent()
        two = place.backup(disk, used_blocks=True, changed=changed, reporter=reporter)
        assert not reporter.warnings
        assert two.base == one.set
        assert two.images[0].change_source == ("given:json" if mapped else "holes")
        if mapped:
            assert two.images[0].bytes_read < in_use(disk).total * BLOCK
        holds(place, two.set, disk)
    whole = place.backup(disk)
    place.gives(whole.set, {disk.name: disk})
    holds(place, place.backup(disk, used_blocks=True).set, disk)


BLOCKS = 256 * 258 + 7  # two levels above the leaves
RANGES = st.lists(
    st.tuples(
        st.one_of(st.integers(0, BLOCKS), st.sampled_from([0, 255, 256, 512, 65536, BLOCKS - 7])),
        st.sampled_from([1, 3, 256, 300, 2000, 65536, BLOCKS]),
    ).map(lambda pair: (pair[0], min(BLOCKS, pair[0] + pair[1]))),
    max_size=6,
).map(Extents.of)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(RANGES, RANGES, st.booleans()), min_size=1, max_size=3))
def test_maps_are_as_they_should_be(
    tmp_path_factory: pytest.TempPathFactory, rounds: list[tuple[Extents, Extents, bool]]
) -> None:
    """Any blocks out of use, any others wanted, holes or the base elsewhere: each has the right type."""
    folder = tmp_path_factory.mktemp("maps")
    with state_in(folder / "state"):
        place = Workbench(folder, block_size=BLOCK)
        path = folder / "disk"
        with open(path, "wb") as file:
            file.truncate(BLOCKS * BLOCK)
            for block in range(0, BLOCKS, 97):
                file.seek(block * BLOCK)
                file.write(b"x" + block.to_bytes(8, "big"))
        [source] = plan_sources([str(path)], "d")
        data = Extents.of((block, block + 1) for block in range(0, BLOCKS, 97))
        base: Image | None = None
        model = [ZERO] * BLOCKS
        for unused, wanted, holes in rounds:
            if base is None:
                holes = True
            wanted -= unused
            with place.open() as repository, Session.begin(repository, host="h") as session:
                reader = MapReader(repository, base) if base else None
                opened = open_source(source)
                how = Settings(BLOCK, 1, 1, 1, False)
                imaging = Imaging(
                    session, _native.Known(repository.names), how, reader, Silent(), opened.size
                )
                imaging.read(opened, wanted, ZERO if holes else None, unused)
                opened.close()
                root = imaging.write_map()
                session.drain()
                base = Image("d", opened.size, BLOCK, root=root)
                if holes:
                    model = [ZERO] * BLOCKS
                for start, end in wanted:
                    model[start:end] = [ZERO] * (end - start)
                for start, end in data & wanted:
                    model[start:end] = [DATA] * (end - start)
                for start, end in unused:
                    model[start:end] = [UNUSED] * (end - start)
                found = [-1] * BLOCKS
                for first, count, part in MapReader(repository, base).walk():
                    slots = Slots(count, part) if isinstance(part, int) else part
                    for kind, low, high in slots.runs():
                        found[first + low : first + high] = [kind] * (high - low)
                assert found == model
