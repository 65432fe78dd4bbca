"""The rules against an oracle that shares no code with them; and sets whose times were forged."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imager.errors import UsageError
from imager.repository.retention import Candidate, Rules, Verdict, judge
from imager.units import parse_span

HOUR = 3_600_000_000
NOW = 1_800_000_000_000_000


@pytest.fixture(params=["UTC", "Europe/Berlin", "Asia/Kolkata", "America/St_Johns"])
def zone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


def chain(times: list[int], **more: frozenset[str]) -> list[Candidate]:
    return [
        Candidate(f"s{n}", n, created, more.get(f"s{n}", frozenset())) for n, created in enumerate(times, 1)
    ]


def kept(verdicts: list[Verdict]) -> set[str]:
    return {one.set for one in verdicts if one.kept}


# --- the oracle ---------------------------------------------------------------------------------


def oracle(times: list[int], rules: Rules) -> set[int]:
    """Positions that stay: written anew from the documented meaning, by brute force.

    A rule walks the periods from the newest to the oldest; in each period that has no set kept by
    then, it takes the newest set, until it has taken as many as it may.
    """
    stay: set[int] = set()
    order = sorted(range(len(times)), key=lambda at: -times[at])
    stay |= set(order[: rules.last])
    if rules.within:
        stay |= {at for at in order if times[order[0]] - times[at] <= rules.within}
    formats = {
        "hourly": "%Y-%m-%d %H %z",
        "daily": "%Y-%m-%d",
        "weekly": "%G-%V",
        "monthly": "%Y-%m",
        "yearly": "%Y",
    }
    for kind, form in formats.items():
        left = getattr(rules, kind)
        while left:
            covered = {name(times[at], form) for at in stay}
            free = [at for at in order if name(times[at], form) not in covered]
            if not free:
                break
            stay.add(free[0])
            left -= 1
    return stay


def name(created: int, form: str) -> str:
    return time.strftime(form, time.localtime(created // 1_000_000))


COUNTS = st.integers(0, 6)
RULES = st.builds(
    Rules,
    last=COUNTS,
    hourly=COUNTS,
    daily=COUNTS,
    weekly=COUNTS,
    monthly=COUNTS,
    yearly=COUNTS,
    within=st.sampled_from([0, HOUR, 24 * HOUR, 24 * 31 * HOUR]),
)
STEPS = st.lists(
    st.one_of(st.integers(1, HOUR), st.integers(1, 30 * HOUR), st.integers(1, 24 * 60 * HOUR)), max_size=60
)


def times_of(steps: list[int]) -> list[int]:
    """Increasing times that end now."""
    times, at = [], NOW
    for step in steps:
        times.append(at)
        at -= step
    return times[::-1]


@settings(max_examples=400, deadline=None)
@given(steps=STEPS, rules=RULES)
@example(steps=[HOUR // 3] * 40, rules=Rules(hourly=3, daily=2))
def test_the_rules_mean_what_they_say(steps: list[int], rules: Rules) -> None:
    times = times_of(steps)
    verdicts = judge(chain(times), rules, now=NOW)
    assert kept(verdicts) == {f"s{at + 1}" for at in oracle(times, rules)}
    assert not [one for one in verdicts if one.doubt]


def test_the_rules_in_other_time_zones(zone: str) -> None:
    # Across both changes of summer time, every 40 minutes.
    start = int(datetime(2026, 10, 20, tzinfo=timezone.utc).timestamp()) * 1_000_000
    times = [start + n * 40 * 60_000_000 for n in range(500)]
    for rules in (Rules(hourly=200), Rules(daily=9), Rules(hourly=30, daily=4, weekly=3)):
        assert kept(judge(chain(times), rules, now=NOW)) == {f"s{at + 1}" for at in oracle(times, rules)}
    assert zone == os.environ["TZ"]


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, rules=RULES)
def test_judged_again_nothing_more_goes(steps: list[int], rules: Rules) -> None:
    """What one run keeps, the next one keeps: nothing depends on what was forgotten before."""
    times = times_of(steps)
    first = kept(judge(chain(times), rules, now=NOW))
    left = [one for one in chain(times) if one.id in first]
    assert kept(judge(left, rules, now=NOW)) == first
    if times and rules != Rules():
        assert f"s{len(times)}" in first, "the newest stays"


# --- what is kept besides ----------------------------------------------------------------------------


def daily(count: int) -> list[int]:
    return [NOW - (count - n) * 24 * HOUR for n in range(count)]


def test_pins_and_tags_take_no_place() -> None:
    plain = judge(chain(daily(10)), Rules(last=3), now=NOW)
    assert kept(plain) == {"s10", "s9", "s8"}
    verdicts = judge(
        chain(daily(10), s9=frozenset({"gold"}), s2=frozenset({"gold", "other"})),
        Rules(last=3, tags=("gold",)),
        pinned={"s10", "s1"},
        now=NOW,
    )
    reasons = {one.set: one.reasons for one in verdicts if one.kept}
    assert reasons == {
        "s10": ("pinned",),
        "s9": ("tag gold",),
        "s8": ("last 1",),
        "s7": ("last 2",),
        "s6": ("last 3",),
        "s2": ("tag gold",),
        "s1": ("pinned",),
    }


def test_reasons_are_shown_newest_first() -> None:
    verdicts = judge(chain(daily(5)), Rules(last=1, daily=2, yearly=1), now=NOW)
    assert [(one.set, one.reasons) for one in verdicts] == [
        ("s5", ("last 1",)),
        ("s4", ("daily 1",)),
        ("s3", ("daily 2",)),
        ("s2", ()),
        ("s1", ()),
    ]


# --- forged times -----------------------------------------------------------------------------------------


def test_sets_from_the_future_push_nothing_out() -> None:
    genuine = daily(7)
    forged = [NOW + n * 24 * HOUR for n in range(1, 20)]
    verdicts = judge(chain(genuine + forged), Rules(last=3, daily=7), now=NOW)
    assert {f"s{n}" for n in range(1, 8)} <= kept(verdicts)
    doubtful = {one.set for one in verdicts if one.doubt}
    assert doubtful == {f"s{n}" for n in range(8, 27)} and doubtful <= kept(verdicts)


def test_sets_whose_clock_went_back_push_nothing_out() -> None:
    times = [*daily(8), NOW - 400 * 24 * HOUR]
    verdicts = judge(chain(times), Rules(daily=8), now=NOW)
    assert kept(verdicts) == {f"s{n}" for n in range(1, 10)}
    assert [one.set for one in verdicts if one.doubt] == ["s9"]


@settings(max_examples=300, deadline=None)
@given(steps=STEPS.filter(bool), rules=RULES, data=st.data())
def test_forged_sets_cost_at_most_one_each(steps: list[int], rules: Rules, data: st.DataObject) -> None:
    """An attacker appends sets with any times: of the genuine ones no more go than he appended.

    And none goes for a set whose time is not believed.
    """
    genuine = times_of(steps)
    count = data.draw(st.integers(1, 8))
    forged = data.draw(
        st.lists(st.integers(NOW - 24 * 400 * HOUR, NOW + 24 * 400 * HOUR), min_size=count, max_size=count)
    )
    before = kept(judge(chain(genuine), rules, now=NOW))
    verdicts = judge(chain(genuine + forged), rules, now=NOW)
    mine = {f"s{n}" for n in range(1, len(genuine) + 1)}
    after = kept(verdicts) & mine
    within = rules.within and genuine and max(NOW - genuine[-1], 0)
    assert within or len(before - after) <= count
    if all(at > NOW for at in forged):
        assert before == after


def test_equal_times_and_numbers_are_no_forgery() -> None:
    """Two machines, or two runs at once, may make sets of one number."""
    twins = [Candidate("a", 1, NOW - 3), Candidate("b", 2, NOW - 2), Candidate("c", 2, NOW - 1)]
    verdicts = judge(twins, Rules(last=1), now=NOW)
    assert kept(verdicts) == {"c"} and not [one for one in verdicts if one.doubt]


@pytest.mark.parametrize("text", ["", "1", "h", "1x", "1.5h", "-1h", "1h ", "0h", "9" * 30 + "y"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(UsageError):
        parse_span(text)


def test_durations() -> None:
    assert parse_span("12h") == 12 * HOUR
    assert parse_span("1y6m") == (366 + 6 * 31) * 24 * HOUR
    assert parse_span("2w1d") == timedelta(days=15) // timedelta(microseconds=1)
