"""Every interleaving of some agents with few preemptions, in order; and random ones with many.

Most defects of protocols show with two or three preemptions at the right places, so all
schedules with so many are tried. An agent that is preempted and resumed when all others have
ended is one that slept for days; whatever it has done until then is what a killed one leaves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tests.model.protocol import (
    Flaws,
    Make,
    Store,
    fencer,
    forgetter,
    merger,
    pruner,
    syncer,
    tardy,
    writer,
)  # fmt: skip

MOST_STEPS = 2000


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is there before (run one after the other), and who then works at the same time."""

    name: str
    before: tuple[Make, ...]
    agents: tuple[Make, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """A schedule that does harm: (step, agent) of each switch."""

    scenario: str
    switches: tuple[tuple[int, int], ...]
    harm: str


def alone(store: Store, make: Make) -> None:
    """Run one agent from its begin to its end."""
    for _ in make(store):
        pass


def start(scenario: Scenario, flaws: Flaws) -> Store:
    """The store that the agents of a scenario find."""
    store = Store(flaws)
    for make in scenario.before:
        alone(store, make)
    return store


def play(
    scenario: Scenario, flaws: Flaws, pick: Callable[[int, int | None, Sequence[int]], int]
) -> tuple[Store, str | None, list[tuple[int | None, tuple[int, ...]]]]:
    """Run the agents; `pick(step, the one that ran last, those that can)` says who is next.

    The store, the harm done, and at each step who ran last and who could run.
    """
    store = start(scenario, flaws)
    agents = {at: make(store) for at, make in enumerate(scenario.agents)}
    trace: list[tuple[int | None, tuple[int, ...]]] = []
    last: int | None = None
    for step in range(MOST_STEPS):
        able = tuple(agents)
        if not able:
            return store, store.harm(), trace
        trace.append((last if last in agents else None, able))
        last = pick(step, last if last in agents else None, able)
        try:
            next(agents[last])
        except StopIteration:
            del agents[last]
        if (harm := store.harm()) is not None:
            return store, harm, trace
    raise AssertionError("agents that never end")


def litter(store: Store) -> str | None:
    """What is left of everything after the sessions are fenced and prune has run: nothing but live packs."""
    store.flaws = Flaws()
    alone(store, fencer)
    for number in range(2):
        alone(store, lambda store, number=number: pruner(store, f"z{number}"))  # type: ignore[misc]
        while store.late:
            alone(store, tardy)
    if (harm := store.harm()) is not None:
        return f"after the last prune: {harm}"
    live = {block for refs in store.manifests().values() for block, _ in refs}
    held = [block for blocks in store.packs.values() for block in blocks]
    if store.condemned or set(held) != live:
        return f"left behind: {store.condemned} {store.packs}"
    return None


def exhaust(scenario: Scenario, flaws: Flaws, preemptions: int) -> Iterator[Found | None]:
    """Try every schedule with at most so many preemptions; None for each that does no harm."""
    waiting: list[tuple[tuple[tuple[int, int], ...], int]] = [((), 0)]
    while waiting:
        switches, used = waiting.pop()
        wanted = dict(switches)

        def pick(step: int, last: int | None, able: Sequence[int], wanted: dict[int, int] = wanted) -> int:
            return wanted.get(step, able[0] if last is None else last)

        store, harm, trace = play(scenario, flaws, pick)
        harm = harm or litter(store)
        yield Found(scenario.name, switches, harm) if harm else None
        first = switches[-1][0] + 1 if switches else 0
        for step in range(first, len(trace)):
            last, able = trace[step]
            cost = used + (last is not None)
            if cost <= preemptions:
                usual = able[0] if last is None else last
                waiting += [((*switches, (step, other)), cost) for other in able if other != usual]


def wander(scenario: Scenario, flaws: Flaws, seed: int) -> Found | None:
    """One random schedule; some agents are slow, so that they are overtaken again and again."""
    chance = random.Random(seed)
    pace = [chance.choice((1, 1, 4, 30)) for _ in scenario.agents]
    switches: list[tuple[int, int]] = []

    def pick(step: int, last: int | None, able: Sequence[int]) -> int:
        chosen = chance.choices(able, [1 / pace[at] for at in able])[0]
        switches.append((step, chosen))
        return chosen

    store, harm, _ = play(scenario, flaws, pick)
    harm = harm or litter(store)
    return Found(scenario.name, tuple(switches), harm) if harm else None


def _writer(name: str, blocks: str, *, ignorant: bool = False, far: bool = False) -> Make:
    return lambda store: writer(store, name, blocks, ignorant=ignorant, far=far)


def _pruner(name: str, *, lazy: bool = False, late: bool = False) -> Make:
    return lambda store: pruner(store, name, lazy=lazy, late=late)


def _sync(name: str) -> Make:
    return lambda store: syncer(store, name)


def _forget(name: str) -> Make:
    return lambda store: forgetter(store, name)


_BEFORE = (_writer("w0", "abc"), _writer("w1", "bcd"), _forget("w0"))
"Pack w0.0 is sparse: of its blocks a, b and c nobody wants a any more."

_MOVED = (*_BEFORE, _pruner("p0"), _writer("w2", "bc", ignorant=True))
"A prune has moved b and c, which w1 refers to where they were; and w2 has stored them once more."
_COPIED = (_sync("c"), _forget("s0"))
"A copied set was forgotten; its pack is still there, under the name that it has in the original."

SCENARIOS = (
    Scenario("a writer and a prune", _BEFORE, (_writer("w2", "abd"), _pruner("p1"))),
    Scenario(
        "a writer that lists all at once and a prune",
        _BEFORE,
        (_writer("w2", "abd", far=True), _pruner("p1")),
    ),
    Scenario("a writer, a prune and a fencer", _BEFORE, (_pruner("p1"), fencer, _writer("w2", "abd"))),
    Scenario("two prunes", _BEFORE, (_pruner("p1"), _pruner("p2"))),
    Scenario("two prunes that are fenced", _BEFORE, (_pruner("p1"), _pruner("p2"), fencer)),
    Scenario(
        "a prune that moves and one that only drops, fenced",
        _BEFORE,
        (_pruner("p1"), _pruner("p2", lazy=True), fencer),
    ),
    Scenario("forget between", _BEFORE, (_pruner("p1"), _forget("w1"), _writer("w2", "abcd"))),
    Scenario("two prunes and a writer", _BEFORE, (_pruner("p1"), _writer("w2", "ad"), _pruner("p2"))),
    Scenario("a merge of the index and a prune", _MOVED, (_pruner("p1"), merger, _forget("w2"))),
    Scenario("a sync and a prune", _COPIED, (_pruner("p1"), _sync("c"))),
    Scenario("a deletion that comes late", _BEFORE, (_pruner("p1", late=True), tardy, _writer("w2", "abd"))),
    Scenario(
        "a sync, two prunes and forget", _COPIED, (_pruner("p1"), _sync("c"), _pruner("p2"), _forget("s0"))
    ),
    Scenario(
        "late deletions and everybody",
        _MOVED,
        (
            _pruner("p1", late=True),
            tardy,
            _writer("w3", "abd"),
            _pruner("p2"),
            fencer,
            merger,
            _forget("w1"),
            _writer("w4", "ac"),
        ),  # fmt: skip
    ),
    Scenario(
        "everybody",
        _BEFORE,
        (_writer("w2", "abd"), _pruner("p1"), fencer, _forget("w1"), _pruner("p2"), _writer("w3", "ae")),
    ),
)
