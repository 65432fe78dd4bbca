"""Backups by used blocks: what is left out, what comes back, and what incrementals make of it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager import _native, command
from imager._native import DATA, UNUSED, ZERO, Slots
from imager.engine import unused
from imager.engine.diff import diff
from imager.engine.images import select_one
from imager.engine.imaging import Imaging, Settings
from imager.engine.restore import RestoreOptions, RestoreSummary, execute, plan
from imager.engine.source import open_source, plan_sources
from imager.engine.unused import EDGE
from imager.engine.verify import verify
from imager.errors import Interrupted
from imager.events import Silent
from imager.extents import Extents
from imager.filesystem import maps
from imager.filesystem.used import Used
from imager.repository.blockmap import MapReader
from imager.repository.imageset import Image
from imager.repository.session import Session
from tests.workbench import Workbench, json_map, same, state_in

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
    """Blocks of the image that are imaged: the filesystem uses some of them, or they are at its ends."""
    fd = os.open(disk, os.O_RDONLY)
    answer = maps.used_blocks(fd, 0, SIZE)
    os.close(fd)
    assert isinstance(answer, Used)
    return (answer.extents | Extents.of([(0, EDGE), (SIZE - EDGE, SIZE)])).blocks(BLOCK)


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
        verified = verify(repository, text, Silent(), against=str(disk))
        assert verified.ok and verified.unused == SIZE - in_use(disk).total * BLOCK
        assert not diff(repository, text, str(disk), Silent()).differs


def test_only_what_is_used_is_read(place: Workbench, disk: Path) -> None:
    summary = place.backup(disk)
    [image] = summary.images
    # mke2fs left holes, too
    assert in_use(disk).total * BLOCK // 2 < image.bytes_read <= in_use(disk).total * BLOCK
    assert image.blocks_unused == SIZE // BLOCK - in_use(disk).total
    holds(place, summary.set, disk)
    place.is_whole([summary.set])
    [how] = place.manifest(summary.set).content.changes
    [part] = how["parts"]
    assert (part["number"], part["kind"], part["note"], part["every_block"]) == (None, "ext2", "", "")
    assert part["used"] == image.bytes_used == in_use(disk).total * BLOCK
    assert image.bytes_read <= part["read"] <= part["used"]
    assert image.change_source == how["source"]
    manifest = place.manifest(summary.set)
    assert unused.recorded(manifest, 0) == (SIZE - image.bytes_used, image.parts)


def test_all_blocks_where_they_are_asked_for(place: Workbench, disk: Path) -> None:
    summary = place.backup(disk, used_blocks=False)
    assert place.manifest(summary.set).content.changes == ["holes"]
    assert summary.images[0].blocks_unused == 0 and summary.images[0].bytes_read > 0.9 * SIZE
    place.gives(summary.set, {disk.name: disk})


def test_a_filesystem_in_doubt_is_imaged_whole(place: Workbench, disk: Path) -> None:
    with open(disk, "r+b") as file:
        file.seek(1024 + 0x3A)
        file.write(b"\0\0")
    summary = place.backup(disk)
    [part] = summary.images[0].parts
    assert part.every_block == "it was not unmounted cleanly, or is mounted" and part.used == SIZE
    assert "read, every block of 48.0 MiB: it was not unmounted cleanly" in part.describe()
    [how] = place.manifest(summary.set).content.changes
    assert how["parts"][0]["every_block"] == "it was not unmounted cleanly, or is mounted"
    place.gives(summary.set, {disk.name: disk})


@pytest.mark.parametrize("mapped", [False, True])
def test_what_became_used_and_unused(mapped: bool, place: Workbench, disk: Path, tmp_path: Path) -> None:
    """Also with a map of changes that knows nothing of what the base left out."""
    for number in range(3):
        one = place.backup(disk)
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
        two = place.backup(disk, changed=changed, reporter=reporter)
        assert not reporter.warnings
        assert two.base == one.set
        assert two.images[0].change_source == ("given:json" if mapped else "holes")
        if mapped:
            assert two.images[0].bytes_read < in_use(disk).total * BLOCK
        holds(place, two.set, disk)
    whole = place.backup(disk, used_blocks=False)
    place.gives(whole.set, {disk.name: disk})
    holds(place, place.backup(disk).set, disk)


class Meddler(Silent):
    """Does something to the source, once, while it is read."""

    def __init__(self, what: Callable[[], None]) -> None:
        super().__init__()
        self.what: Callable[[], None] | None = what

    def advance(self, done: int, *, stored: int = 0) -> None:
        if self.what is not None:
            what, self.what = self.what, None
            what()


@pytest.mark.parametrize("what", ["a file", "a mount count", "nothing"])
def test_what_is_written_to_meanwhile_is_imaged_whole(place: Workbench, disk: Path, what: str) -> None:
    """A map is believed only where it is the same when all is read."""

    def meddle() -> None:
        if what == "a file":
            add(disk, "late", 2 << 20)
        elif what == "a mount count":
            command.run(["tune2fs", "-C", "7", str(disk)])

    reporter = Meddler(meddle)
    summary = place.backup(disk, reporter=reporter)
    assert reporter.what is None
    [part] = summary.images[0].parts
    if what == "nothing":
        assert not reporter.warnings and not part.every_block and part.used < SIZE // 2
        return
    assert "was written to while it was read" in reporter.warnings[0]
    assert (part.every_block, part.used, summary.images[0].blocks_unused) == (unused.WRITTEN, SIZE, 0)
    assert summary.images[0].bytes_read > SIZE
    place.gives(summary.set, {disk.name: disk})
    place.is_whole([summary.set])


def test_swap_space_may_be_in_use_all_the_while(place: Workbench, tmp_path: Path) -> None:
    """Its pages come and go, and none of them is ever read again."""
    swap = tmp_path / "swap"
    swap.write_bytes(random.Random(3).randbytes(8 << 20))
    command.run(["mkswap", "-q", str(swap)])

    def meddle() -> None:
        with open(swap, "r+b") as file:
            file.seek(4096)
            file.write(bytes(range(256)) * 1024)

    reporter = Meddler(meddle)
    [image] = place.backup(swap, reporter=reporter).images
    assert reporter.what is None and not reporter.warnings
    assert (image.parts[0].kind, image.parts[0].every_block) == ("swap", "")
    assert image.bytes_used == 2 * EDGE


def test_one_of_several_sources_that_is_written_to(place: Workbench, disk: Path, tmp_path: Path) -> None:
    """The others keep their maps."""
    other = tmp_path / "other"
    other.write_bytes(disk.read_bytes())
    summary = place.backup(disk, other, name="both", reporter=Meddler(lambda: add(other, "second", 2 << 20)))
    one, two = summary.images
    assert not one.parts[0].every_block and two.parts[0].every_block == unused.WRITTEN
    place.gives(summary.set, {"disk": left(disk), "other": other})


NOISE = random.Random(2).randbytes(SIZE)


@pytest.mark.parametrize("how", ["discard", "zero", "leave"])
@pytest.mark.parametrize("delta", [False, True])
def test_what_a_restore_makes_of_unused_blocks(
    place: Workbench, disk: Path, tmp_path: Path, how: str, delta: bool
) -> None:
    one = place.backup(disk)
    target = tmp_path / "target"
    target.write_bytes(NOISE)
    free = in_use(disk).complement(SIZE // BLOCK).scale(BLOCK)
    summary = place.restore(one.set, target, delta=delta, overwrite=True, unused=how)
    assert summary.verified
    wanted = bytearray(left(disk))
    if delta and how == "leave":
        for start, end in free:
            wanted[start:end] = NOISE[start:end]
    same(target, bytes(wanted), f"{how} {delta}")
    parts = summary.bytes_written + summary.bytes_zeroed + summary.bytes_kept + summary.bytes_unused
    assert (parts, summary.unused) == (SIZE, how)
    assert summary.bytes_unused == (0 if how == "zero" else free.total)
    if how != "leave":
        assert target.stat().st_blocks * 512 < SIZE // 2
    with place.open(writing=False) as repository:
        assert verify(repository, one.set, Silent(), against=str(target)).ok
        assert not diff(repository, one.set, str(target), Silent()).differs


def test_a_delta_that_finds_no_difference_leaves_all_as_it_is(place: Workbench, disk: Path) -> None:
    one = place.backup(disk)
    before = disk.read_bytes()
    summary = place.restore(one.set, disk, delta=True, overwrite=True)
    assert (summary.bytes_written, summary.unused, disk.read_bytes()) == (0, "leave", before)
    summary = place.restore(one.set, disk, delta=True, overwrite=True, unused="zero")
    assert summary.bytes_zeroed
    assert disk.read_bytes() == left(disk)


def test_a_delta_discards_before_its_first_difference_too(tmp_path: Path) -> None:
    """The difference is in the last window of the map, what is unused in the first."""
    size, reserved = 1200 << 20, 32 * 512
    disk, target = tmp_path / "large", tmp_path / "target"
    with open(disk, "wb") as file:
        file.truncate(size)
    command.run(["mkfs.fat", "-F", "32", "-f", "1", "-s", "8", "-R", "32", str(disk)])
    with open(disk, "r+b") as file:
        table = int.from_bytes(file.read(64)[36:40], "little") * 512
        clusters = (size - reserved - table) // 4096
        free = range(20_000, 20_100)
        entries = b"".join(b"\0\0\0\0" if n in free else b"\xff\xff\xff\x0f" for n in range(3, clusters + 2))
        file.seek(reserved + 3 * 4)
        file.write(entries)
        for at in range(8 << 20, size, 1 << 20):  # no page of the map is of one type
            file.seek(at)
            file.write(b"something")
    spot = (reserved + table + 20_050 * 4096) // BLOCK * BLOCK
    with state_in(tmp_path / "state"):
        place = Workbench(tmp_path, block_size=BLOCK)
        one = place.backup(disk)
        assert 98 <= one.images[0].blocks_unused <= 100
        place.restore(one.set, target)
        with place.open(writing=False) as repository:
            first, last = select_one(repository, one.set).windows()
        assert spot // BLOCK < first.end < last.end == size // BLOCK
        with open(target, "r+b") as file:

            def delta(at: int) -> bytes:
                file.seek(at)
                file.write(NOISE[:BLOCK])
                file.flush()
                place.restore(one.set, target, delta=True, overwrite=True)
                file.seek(spot)
                return file.read(BLOCK)

            assert delta(spot) == NOISE[:BLOCK]
            assert delta(size - BLOCK) == bytes(BLOCK)
        with place.open(writing=False) as repository:
            assert verify(repository, one.set, Silent(), against=str(target)).ok


def test_resume_minds_whether_unused_blocks_are_zeroed(place: Workbench, disk: Path, tmp_path: Path) -> None:
    """What an earlier run left as it was must not count as zeroed."""
    one = place.backup(disk)
    target = tmp_path / "target"
    with place.open(writing=False) as repository:

        def run(how: str, reporter: Silent, **more: bool) -> RestoreSummary:
            wanted = RestoreOptions(unused=how, **more)
            return execute(repository, plan(repository, one.set, str(target), wanted, reporter), reporter)

        for how, mode in (("leave", "resume"), ("zero", "delta")):
            target.write_bytes(NOISE)

            class Stopper(Silent):
                def phase(self, name: str, total: int | None) -> None:
                    if name == "reading back":
                        raise KeyboardInterrupt

            with pytest.raises(Interrupted):
                run("leave", Stopper(), delta=True, overwrite=True)
            summary = run(how, Silent(), resume=True, delta=True, overwrite=True)
            assert summary.mode == mode
            assert (target.read_bytes() == left(disk)) == (how == "zero")


CLUSTERS = 4 << 10
RUNS = st.lists(
    st.tuples(st.integers(2, CLUSTERS), st.sampled_from([1, 2, 3, 500, 1500, 4000])).map(
        lambda run: (run[0], min(CLUSTERS, sum(run)))
    ),
    max_size=5,
).map(Extents.of)
STEP = st.tuples(RUNS, RUNS, st.sampled_from(["auto", "full", "incremental", "differential"]), st.booleans())


class Allocated:
    """A FAT of which any clusters can be in use, as no files: nothing but its table says what is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.chance = random.Random(7)
        path.write_bytes(self.chance.randbytes(9 << 20))
        command.run(["mkfs.fat", "-F", "16", "-s", "4", "-R", "4", str(path)])
        self.raw = bytearray(path.read_bytes())
        table = int.from_bytes(self.raw[22:24], "little") * 512
        self.tables = (4 * 512, 4 * 512 + table)
        self.data = 4 * 512 + 2 * table + 512 * 32

    def place(self, clusters: Extents) -> Extents:
        return Extents.of((self.data + (a - 2) * 2048, self.data + (b - 2) * 2048) for a, b in clusters)

    def step(self, taken: Extents, rewritten: Extents) -> None:
        """Other clusters are in use; of them some have other content, and so has all that is not in use."""
        entries = bytearray(2 * CLUSTERS)
        for start, end in taken:
            entries[2 * start : 2 * end] = bytes([0xFF]) * (2 * (end - start))
        for at in self.tables:
            self.raw[at + 4 : at + len(entries)] = entries[4:]
        whole = Extents.of([(2, CLUSTERS)])
        for start, end in self.place(taken & rewritten | whole - taken):
            self.raw[start:end] = self.chance.randbytes(end - start)
        self.path.write_bytes(self.raw)

    def blocks(self) -> Extents:
        """Blocks that are imaged, by what the reader of the filesystem says."""
        fd = os.open(self.path, os.O_RDONLY)
        answer = maps.used_blocks(fd, 0, len(self.raw))
        os.close(fd)
        assert isinstance(answer, Used)
        edges = Extents.of([(0, EDGE), (len(self.raw) - EDGE, len(self.raw))])
        return (answer.extents | edges).blocks(BLOCK)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(STEP, min_size=2, max_size=5))
def test_any_sequence_gives_back_what_was_in_use(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Extents, Extents, str, bool]]
) -> None:
    """Whatever is in use, is changed, is mapped, and is the base: each set is right.

    The map of changes names only what was in use before and is now, and what becomes used is
    not named by it; what is not in use changes all the time, unnamed.
    """
    folder = tmp_path_factory.mktemp("sequence")
    with state_in(folder / "state"):
        place = Workbench(folder, block_size=BLOCK)
        disk = Allocated(folder / "disk")
        size = len(disk.raw)
        made: list[tuple[str, str, bytes, Extents]] = []
        for taken, rewritten, strategy, mapped in steps:
            disk.step(taken, rewritten)
            used = disk.blocks()
            bases = [one for one in made if strategy != "differential" or one[1] == "full"]
            base = bases[-1] if bases else None
            changed = None
            if mapped and base is not None and strategy != "full":
                _, _, before, old = base
                known = (
                    (block * BLOCK, BLOCK)
                    for start, end in used & old
                    for block in range(start, end)
                    if disk.raw[block * BLOCK : (block + 1) * BLOCK]
                    != before[block * BLOCK : (block + 1) * BLOCK]
                )
                changed = str(json_map(folder / "map", list(known), size=size))
            reporter = Silent()
            done = place.backup(disk.path, name="d", strategy=strategy, changed=changed, reporter=reporter)
            assert not reporter.warnings
            assert done.base == (base[0] if base and strategy != "full" else None)
            assert done.images[0].change_source == ("given:json" if changed else "holes")
            assert done.images[0].bytes_read <= (used.total + 16) * BLOCK
            wanted = bytearray(size)
            for start, end in used.scale(BLOCK):
                wanted[start:end] = disk.raw[start:end]
            made.append((done.set, done.strategy, bytes(wanted), used))
        for one, _, content, used in made:
            place.gives(one, {"disk": content}, old=bytes(disk.raw), reference=one == made[-1][0])
            assert kinds(place, one).get(UNUSED, Extents()) == used.complement(-(-size // BLOCK))
        place.is_whole(one for one, *_ in made)


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
