"""The protocol of docs/design/locking.md keeps its promises; and the search would notice if it did not.

IMAGER_MODEL_PREEMPTIONS and IMAGER_MODEL_SEEDS make it look further.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.explore import SCENARIOS, Found, Scenario, exhaust, play, wander
from tests.model.protocol import Flaws, Store

PREEMPTIONS = int(os.environ.get("IMAGER_MODEL_PREEMPTIONS", "2"))
SEEDS = int(os.environ.get("IMAGER_MODEL_SEEDS", "300"))
LARGE = (
    "two prunes and a writer", "a sync, two prunes and forget", "late deletions and everybody", "everybody",
)  # fmt: skip
"So many schedules that only random ones are tried."
SMALL = tuple(one for one in SCENARIOS if one.name not in LARGE)


def first_harm(scenarios: tuple[Scenario, ...], flaws: Flaws, preemptions: int) -> Found | None:
    return next((f for one in scenarios for f in exhaust(one, flaws, preemptions) if f is not None), None)


@pytest.mark.parametrize("scenario", SMALL, ids=lambda one: one.name)
def test_no_schedule_with_few_preemptions_does_harm(scenario: Scenario) -> None:
    tried = list(exhaust(scenario, Flaws(), PREEMPTIONS))
    assert not [found for found in tried if found is not None]
    assert len(tried) > 100


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda one: one.name)
def test_no_random_schedule_does_harm(scenario: Scenario) -> None:
    assert not [found for seed in range(SEEDS) if (found := wander(scenario, Flaws(), seed)) is not None]


SHOWN_BY = {
    "believing": "a merge of the index and a prune", "keeping": "a sync and a prune",
    "careless": "a sync and a prune", "backwards": "a sync and a prune",
    "hurried": "a writer that lists all at once and a prune", "forgetful": "two prunes that are fenced",
}  # fmt: skip
"Where to look first for the harm that a flaw does."


@pytest.mark.parametrize("flaw", [field.name for field in dataclasses.fields(Flaws)])
def test_a_broken_rule_is_found(flaw: str) -> None:
    scenarios = sorted(SMALL, key=lambda one: one.name != SHOWN_BY.get(flaw))
    found = first_harm(tuple(scenarios), Flaws(**{flaw: True}), 2)
    assert found is not None and "lost" in found.harm, f"nobody would notice: {flaw}"


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_hypothesis_finds_no_harm_among_everybody(data: st.DataObject) -> None:
    # Choices that hypothesis can shrink: where this fails, it shows the shortest schedule.
    _, harm, _ = play(
        SCENARIOS[-1],
        Flaws(),
        lambda step, last, able: data.draw(st.sampled_from(able), label=f"step {step}"),
    )
    assert harm is None


def test_prunes_do_their_work() -> None:
    """The search would be worth nothing if prunes never deleted anything."""
    deleted = 0

    def pick(step: int, last: int | None, able: tuple[int, ...]) -> int:
        return able[-1] if last is None else last

    for scenario in SCENARIOS:
        store, harm, _ = play(scenario, Flaws(), pick)  # type: ignore[arg-type]
        assert harm is None and isinstance(store, Store)
        deleted += store.deletes
    assert deleted >= 5
