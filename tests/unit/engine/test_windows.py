"""Windows: every block of a walk exactly once, whatever the cuts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imager._native import DATA, ZERO, Slots
from imager.engine.windows import Piece, Window, pieces, runs_of, windows
from imager.extents import Extents


def slots_of(kinds: list[bool], first: int) -> Slots:
    slots = Slots(len(kinds), ZERO)
    for at, data in enumerate(kinds):
        if data:
            slots.set_data(at, (first + at).to_bytes(32, "little"), 0, first + at, 100)
    return slots


@st.composite
def walks(draw: st.DrawFn) -> tuple[list[Piece], list[bool | None]]:
    """A walk, and what each block is: data, zero by its slot, or None: zero by a page."""
    walk: list[Piece] = []
    truth: list[bool | None] = []
    for _ in range(draw(st.integers(0, 8))):
        first = len(truth)
        if draw(st.booleans()):
            count = draw(st.integers(1, 30))
            walk.append((first, count, ZERO))
            truth += [None] * count
        else:
            kinds = draw(st.lists(st.booleans(), min_size=1, max_size=12))
            walk.append((first, len(kinds), slots_of(kinds, first)))
            truth += kinds
    return walk, truth


@given(walks(), st.integers(1, 30), st.integers(1, 9))
def test_every_block_once(made: tuple[list[Piece], list[bool | None]], limit: int, segment: int) -> None:
    walk, truth = made
    found = list(windows(walk, limit))
    seen: dict[int, bool | None] = {}
    at = 0
    for window in found:
        assert window.first == at
        at = window.end
        for start, end in window.runs:
            seen.update(dict.fromkeys(range(start, end)))
        for part, slots in window.segments(segment):
            assert sum(end - start for start, end in part) == len(slots) <= segment
            numbers = [block for start, end in part for block in range(start, end)]
            for index, block in enumerate(numbers):
                kind, id_, *_ = slots.get(index)
                seen[block] = kind == DATA
                assert kind != DATA or int.from_bytes(id_, "little") == block
        data, zero = window.data()
        assert data + zero == window.end - window.first
        assert [first for first, _ in pieces(window)] == [start for start, _ in window.ranges]
    assert at == len(truth)
    assert [seen[block] for block in range(len(truth))] == truth
    zeroes = Extents.of(extent for window in found for extent in window.zeroes())
    assert zeroes == Extents.of((block, block + 1) for block, what in enumerate(truth) if not what)


@given(walks(), st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=6), st.integers(1, 9))
def test_select(
    made: tuple[list[Piece], list[bool | None]], pairs: list[tuple[int, int]], segment: int
) -> None:
    walk, truth = made
    wanted = Extents.of((min(pair), max(pair)) for pair in pairs)
    found: list[int] = []
    for window in windows(walk, 1000):
        for part, slots in window.select(wanted, segment):
            numbers = [block for start, end in part for block in range(start, end)]
            assert len(numbers) == len(slots) <= segment
            for index, block in enumerate(numbers):
                assert (slots.get(index)[0] == DATA) == truth[block]
            found += numbers
    assert found == [block for block, what in enumerate(truth) if what is not None and block in wanted]


@given(walks(), st.booleans())
def test_runs(made: tuple[list[Piece], list[bool | None]], data: bool) -> None:
    walk, truth = made
    for window in windows(walk, 1000):
        runs = list(runs_of(window.ranges, window.slots, data=data))
        assert all(start < end for start, end in runs)
        assert all(a[1] < b[0] for a, b in zip(runs, runs[1:], strict=False))
        blocks = [block for start, end in runs for block in range(start, end)]
        assert blocks == [block for block, what in enumerate(truth) if what is data]


def test_an_empty_walk_has_no_window() -> None:
    assert list(windows([])) == []
    assert list(Window(0, 0).segments(10)) == []
