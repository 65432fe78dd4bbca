"""Block maps against a plain list of what each block is: reading, writing on a base, sharing, comparing."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager._native import DATA, UNKNOWN, UNREADABLE, UNUSED, ZERO, Slots
from imager.extents import Extents
from imager.repository.blockmap import DamagedPage, MapReader, Page, diff, slots_of, span
from imager.repository.credentials import Credentials
from imager.repository.format import KIND_MAP, pack_object
from imager.repository.manifest import Image, root_level
from imager.repository.mapwriter import MapWriter
from imager.repository.repository import Repository
from imager.repository.session import Session
from imager.storage.folder import FolderStorage
from tests.workbench import MEMORY, state_in

EXAMPLES = int(os.environ.get("IMAGER_TEST_EXAMPLES", "100"))
FEW = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PACK = bytes(range(32))
"A data pack that nothing here ever opens."

Block = int | tuple[int, int]
"A type, or (DATA, seed of the id)."
Model = list[Block]


@contextmanager
def repository() -> Iterator[Repository]:
    folder = tempfile.mkdtemp(dir=MEMORY, prefix="imager-blockmap-")
    try:
        with state_in(Path(folder) / "state"):
            storage = FolderStorage(os.path.join(folder, "repo"))
            with Repository.init(storage, Credentials(), encryption="none") as opened:
                yield opened
    finally:
        shutil.rmtree(folder)


@dataclass
class Written:
    """A map that was written, the number of pages that it took, and the bytes of its pack."""

    image: Image
    pages: int
    stored: int

    def reader(self, repository: Repository) -> MapReader:
        return MapReader(repository, self.image)


def identity(seed: int) -> bytes:
    return seed.to_bytes(8, "big") * 4


def put(slots: Slots, at: int, block: Block, pack: int) -> None:
    if isinstance(block, int):
        slots.fill(at, at + 1, block)
    else:
        slots.set_data(at, identity(block[1]), pack, 1000 + block[1], 64)


def write(
    repository: Repository,
    model: Sequence[Block],
    base: Written | None = None,
    *,
    touched: Sequence[int] | None = None,
) -> Written:
    """Write `model` as the engine does: only the leaves `touched`, or all, uniform ones as stretches."""
    pack = repository.names.intern(PACK)
    with Session.begin(repository) as session:
        writer = MapWriter(session, len(model), base.reader(repository) if base else None)
        leaves = range(-(-len(model) // 256)) if touched is None else touched
        for index in leaves:
            part = model[index * 256 : (index + 1) * 256]
            if touched is None and isinstance(part[0], int) and part.count(part[0]) == len(part):
                writer.uniform(index, index + 1, part[0])
                continue
            leaf = writer.leaf(index)
            assert len(leaf.slots) == len(part) == writer.length(index)
            for at, block in enumerate(part):
                put(leaf.slots, at, block, pack)
            writer.put(leaf)
            if index % 7 == 0:
                writer.flush()
        root = writer.finish()
        assert writer.pending == 0
        session.drain()
        image = Image("disk", len(model) * 4096, 4096, root=root)
        return Written(image, writer.pages, session.stored)


def read(reader: MapReader, ranges: Sequence[tuple[int, int]] | None = None) -> Model:
    out: Model = []
    position = None
    for first, count, part in reader.walk(ranges):
        assert position is None or first >= position, "the walk goes back"
        position = first + count
        if isinstance(part, int):
            out += [part] * count
            continue
        assert len(part) == count
        for at in range(count):
            kind, id_, pack, offset, length = part.get(at)
            if kind == DATA:
                seed = int.from_bytes(id_[:8], "big")
                assert (id_, offset, length) == (identity(seed), 1000 + seed, 64)
                assert reader.repository.names.name(pack) == PACK
                out.append((DATA, seed))
            else:
                out.append(kind)
    return out


def differing(a: Sequence[Block], b: Sequence[Block]) -> Extents:
    common = min(len(a), len(b))
    changed = [(at, at + 1) for at in range(common) if a[at] != b[at]]
    return Extents.of([*changed, (common, max(len(a), len(b)))])


def pages_over(leaves: set[int], top: int) -> int:
    """How many pages there are on the way from the root to these leaves."""
    total = 0
    for _ in range(top + 1):
        total += len(leaves)
        leaves = {index // 256 for index in leaves}
    return total


# --- against the model -----------------------------------------------------------------------------

COUNTS = st.one_of(
    st.sampled_from([0, 1, 255, 256, 257, 511, 512, 513]),
    st.integers(0, 3000),
    st.sampled_from([1000, 2000, 65535, 65536, 65537]),
)
KINDS = st.sampled_from([ZERO, ZERO, UNUSED, UNREADABLE, DATA, DATA, DATA])


@dataclass(frozen=True)
class Stretch:
    """Blocks of one kind; `at` and `length` in 1/1000 of the image, or single blocks where `short`."""

    kind: int
    at: int
    length: int
    short: bool
    seed: int


STRETCHES = st.lists(
    st.builds(
        Stretch,
        kind=KINDS,
        at=st.integers(0, 999),
        length=st.integers(0, 1000),
        short=st.booleans(),
        seed=st.integers(0, 50),
    ),
    max_size=6,
)


def apply(model: Model, stretch: Stretch) -> set[int]:
    """Change the model; the leaves that were touched."""
    start = len(model) * stretch.at // 1000
    count = stretch.length // 100 + 1 if stretch.short else len(model) * stretch.length // 1000
    end = min(len(model), start + count)
    for at in range(start, end):
        model[at] = (DATA, stretch.seed * 1000 + at % 7) if stretch.kind == DATA else stretch.kind
    return set(range(start // 256, -(-end // 256))) if start < end else set()


@FEW
@given(
    count=COUNTS,
    first=STRETCHES,
    steps=st.lists(st.tuples(st.one_of(st.none(), COUNTS), STRETCHES), max_size=4),
)
def test_any_sequence_of_maps(
    count: int, first: list[Stretch], steps: list[tuple[int | None, list[Stretch]]]
) -> None:
    with repository() as opened:
        model: Model = [ZERO] * count
        for stretch in first:
            apply(model, stretch)
        history = [(list(model), write(opened, model))]
        for blocks, stretches in steps:
            resized = blocks is not None and blocks != len(model)
            if blocks is not None:
                model = model[:blocks] + [ZERO] * (blocks - len(model))
            touched: set[int] = set()
            for stretch in stretches:
                touched |= apply(model, stretch)
            before, base = history[-1]
            one = write(opened, model, base, touched=None if resized else sorted(touched))
            if not resized:
                changed = {at // 256 for low, high in differing(before, model) for at in range(low, high)}
                assert one.pages <= pages_over(changed, root_level(len(model)) if model else 0)
                if before == model:
                    assert one.image.root == base.image.root and one.stored == 0
            history.append((list(model), one))
        for (old, a), (new, b) in zip(history, history[1:], strict=False):
            for left, right, wanted in ((a, b, differing(old, new)), (b, a, differing(new, old))):
                got = list(diff(left.reader(opened), right.reader(opened)))
                assert got == list(wanted)
        for wanted, one in history:
            assert read(one.reader(opened)) == wanted
        again = write(opened, model)
        assert not list(diff(again.reader(opened), history[-1][1].reader(opened)))


@FEW
@given(
    count=COUNTS,
    stretches=STRETCHES,
    ranges=st.lists(st.tuples(st.integers(0, 70000), st.integers(0, 600)), max_size=6),
)
def test_walks_of_ranges(count: int, stretches: list[Stretch], ranges: list[tuple[int, int]]) -> None:
    model: Model = [ZERO] * count
    for stretch in stretches:
        apply(model, stretch)
    wanted = Extents.of((start, start + length) for start, length in ranges)
    with repository() as opened:
        reader = write(opened, model).reader(opened)
        assert read(reader, wanted.ranges) == [
            model[at] for low, high in wanted.clip(count) for at in range(low, high)
        ]


# --- counted ------------------------------------------------------------------------------------------


def dense(count: int) -> Model:
    return [(DATA, at) for at in range(count)]


@pytest.mark.parametrize(("blocks", "level"), [(1, 0), (256, 0), (257, 1), (65536, 1), (65537, 2)])
def test_one_change_writes_one_page_a_level(blocks: int, level: int) -> None:
    with repository() as opened:
        model = dense(blocks)
        base = write(opened, model)
        assert base.image.root is not None and base.image.root.level == level
        leaves = -(-blocks // 256)
        assert base.pages == pages_over(set(range(leaves)), level)
        last = blocks - 1
        model[last] = (DATA, 1 << 30)
        one = write(opened, model, base, touched=[last // 256])
        assert one.pages == level + 1
        assert read(one.reader(opened), [(last, blocks)]) == [(DATA, 1 << 30)]
        assert list(diff(base.reader(opened), one.reader(opened))) == [(last, blocks)]


def test_a_map_that_is_read_again_unchanged_writes_nothing() -> None:
    with repository() as opened:
        model: Model = [*dense(70000), *[ZERO] * 3000]
        base = write(opened, model)
        before = set(opened.storage.list_names("maps/"))
        again = write(opened, model, base)
        assert (again.pages, again.stored, again.image.root) == (0, 0, base.image.root)
        assert set(opened.storage.list_names("maps/")) == before


@pytest.mark.parametrize(
    "blocks", [(256, 257), (257, 256), (65536, 65537), (65537, 65536), (300, 70000), (70000, 300)]
)
def test_leaves_are_shared_across_sizes(blocks: tuple[int, int]) -> None:
    """Another size writes the pages above anew; of the leaves only those at the end."""
    old, new = blocks
    with repository() as opened:
        base = write(opened, dense(old))
        one = write(opened, dense(new), base)
        top = root_level(new)
        fresh = set(range(-(-new // 256))) - set(range(min(old, new) // 256))
        above = pages_over({index // 256 for index in range(-(-new // 256))}, top - 1) if top else 0
        assert one.pages <= len(fresh) + above
        assert read(one.reader(opened)) == dense(new)


def test_growing_over_the_size_of_the_base() -> None:
    """A stream passes the base's size on its way: nothing handed in till then may be forgotten."""
    with repository() as opened:
        pack = opened.names.intern(PACK)
        model = dense(1000)
        base = write(opened, dense(512))
        with Session.begin(opened) as session:
            writer = MapWriter(session, 0, base.reader(opened))
            writer.growing = True
            for index, blocks in enumerate((256, 512, 768, 1000)):
                writer.blocks = blocks
                leaf = writer.leaf(index)
                for at in range(len(leaf.slots)):
                    put(leaf.slots, at, model[index * 256 + at], pack)
                writer.put(leaf)
            writer.growing = False
            root = writer.finish()
            session.drain()
        image = Image("disk", 1000 * 4096, 4096, root=root)
        assert read(MapReader(opened, image)) == model


def test_a_sparse_terabyte() -> None:
    """16 million blocks, 1600 of them data: a page for each leaf in use and each page above, no more."""
    blocks = (1 << 40) // (64 << 10)
    with repository() as opened:
        pack = opened.names.intern(PACK)
        chance = random.Random(1)
        places = {chance.randrange(blocks // 16) * 16 for _ in range(100)}
        places = {at + more for at in places for more in range(16)}
        leaves = sorted({at // 256 for at in places})
        with Session.begin(opened) as session:
            writer = MapWriter(session, blocks, None)
            position = 0
            for index in leaves:
                writer.uniform(position, index, ZERO)
                leaf = writer.leaf(index)
                leaf.slots.fill(0, 256, ZERO)
                for at in range(256):
                    if index * 256 + at in places:
                        put(leaf.slots, at, (DATA, index * 256 + at), pack)
                writer.put(leaf)
                position = index + 1
            writer.uniform(position, blocks // 256, ZERO)
            root = writer.finish()
            session.drain()
            assert writer.pages == pages_over(set(leaves), 2)
            assert session.stored <= 256 << 10
        reader = MapReader(opened, Image("disk", 1 << 40, 64 << 10, root=root))
        steps = list(reader.walk())
        assert sum(count for _, count, _ in steps) == blocks
        assert len(steps) <= 256 * 3 + 2 * len(leaves)
        found = {first + at for first, count, part in steps if not isinstance(part, int)
                 for at in range(count) if part.get(at)[0] == DATA}  # fmt: skip
        assert found == places


# --- damage --------------------------------------------------------------------------------------------


def harm(opened: Repository, page: Page) -> None:
    """Flip a bit in a page's payload, and forget what was read."""
    name = opened.names.name(page.pack)
    assert name is not None
    path = os.path.join(opened.storage.url, pack_object(KIND_MAP, name))
    with open(path, "r+b") as file:
        file.seek(page.offset + page.length - 1)
        byte = file.read(1)[0]
        file.seek(page.offset + page.length - 1)
        file.write(bytes([byte ^ 1]))
    opened.close()


@pytest.mark.parametrize(
    ("level", "index", "count"), [(0, 3, 256), (1, 0, 65536), (1, 1, 4464), (2, 0, 70000)]
)
def test_a_damaged_page_tells_what_it_hides(level: int, index: int, count: int) -> None:
    with repository() as opened:
        model = dense(70000)
        written = write(opened, model)
        page = written.reader(opened).find(level, index)
        assert isinstance(page, Page)
        harm(opened, page)
        first = index * span(level)
        with pytest.raises(DamagedPage) as caught:
            read(written.reader(opened))
        assert (caught.value.first_block, caught.value.count) == (first, count)
        told: list[tuple[int, int]] = []
        seen = 0
        for _, blocks, _ in written.reader(opened).walk(on_damage=lambda *what: told.append(what[:2])):
            seen += blocks
        assert told == [(first, count)] and seen == 70000 - count
        # What is written on top of it is whole, where all that it hides is given anew.
        with Session.begin(opened) as session:
            writer = MapWriter(session, 70000, written.reader(opened))
            untold = writer.untold(Extents.of([(first, first + 1)]))
            assert untold == (Extents.of([(first, first + count)]) if level else Extents())
        leaves = range(first // 256, -(-(first + count) // 256))
        one = write(opened, model, written, touched=list(leaves))
        assert read(one.reader(opened)) == model
        assert one.pages >= len(leaves) + level


def test_unknown_slots_are_never_written() -> None:
    with repository() as opened, Session.begin(opened) as session:
        writer = MapWriter(session, 300, None)
        leaf = writer.leaf(0)
        assert leaf.slots.counts() == (0, 0, 0, 0) and not leaf.known
        writer.put(leaf)
        writer.uniform(1, 2, ZERO)
        with pytest.raises(ValueError):
            writer.finish()


def test_a_map_without_a_base_needs_every_leaf() -> None:
    with repository() as opened, Session.begin(opened) as session:
        writer = MapWriter(session, 70000, None)
        writer.uniform(0, 100, ZERO)
        with pytest.raises(ValueError):
            writer.finish()


def test_geometry() -> None:
    assert [root_level(blocks) for blocks in (1, 256, 257, 65536, 65537, 1 << 24)] == [0, 0, 1, 1, 2, 2]
    assert (span(0), span(1), span(2)) == (256, 65536, 1 << 24)
    assert [slots_of(0, index, 300) for index in (0, 1, 2)] == [256, 44, -212]
    assert slots_of(1, 0, 300) == 2
    assert UNKNOWN not in (ZERO, UNUSED, UNREADABLE, DATA)
