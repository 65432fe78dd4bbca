"""Which image sets the rules keep, and why.

Invariant: rules only ever choose among sets whose time fits their place in the
chain; a set from the future, or out of order, is kept and told of, and counts for
no rule. So whoever can add sets but not delete any can't make the rules drop
more than one set for each that was added in truth.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from datetime import datetime

from msgspec import Struct, field


class Rules(Struct, frozen=True):
    """How many sets to keep of each kind, within one lineage. `within` in microseconds; 0: no such rule."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: int = 0
    tags: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether there is no rule at all."""
        return self == Rules()


class Candidate(Struct, frozen=True):
    """An image set, as far as the rules look at it. `created` in microseconds since 1970 UTC."""

    id: str
    sequence: int
    created: int
    tags: frozenset[str] = frozenset()


class Verdict(Struct, frozen=True):
    """What the rules say of one set: `reasons` to keep it, none where it is to be forgotten.

    `doubt`: why its time is not believed; such a set is always kept.
    """

    set: str
    reasons: tuple[str, ...]
    doubt: str | None = None

    @property
    def kept(self) -> bool:
        """Whether the set stays."""
        return bool(self.reasons)


class _Work(Struct):
    kept: dict[str, list[str]] = field(default_factory=dict)

    def keep(self, candidate: Candidate, reason: str) -> None:
        self.kept.setdefault(candidate.id, []).append(reason)


def judge(
    candidates: Sequence[Candidate], rules: Rules, *, pinned: Collection[str] = (), now: int
) -> list[Verdict]:
    """What the rules say of all sets of one lineage, the newest first.

    Rules go in the order last, within, hourly, daily, weekly, monthly, yearly. Each walks from the
    newest set to the oldest, and keeps the newest of each period (in local time) in which no rule
    before it keeps one, until it has kept as many as it may. Pinned sets, those with a tag of
    `rules.tags`, and those in doubt are kept besides, and take no rule's place.
    `now`: sets beyond it are in doubt; a clock that is wrong makes more sets stay, never fewer.
    """
    order = sorted(candidates, key=lambda one: (one.sequence, one.created, one.id), reverse=True)
    doubts = _doubts(order, now)
    work = _Work()
    trusted: list[Candidate] = []
    for one in order:
        if one.id in doubts:
            work.keep(one, "its time is in doubt")
        if one.id in pinned:
            work.keep(one, "pinned")
        for tag in sorted(one.tags.intersection(rules.tags)):
            work.keep(one, f"tag {tag}")
        if one.id not in work.kept:
            trusted.append(one)
    _apply(trusted, rules, work)
    return [Verdict(one.id, tuple(work.kept.get(one.id, ())), doubts.get(one.id)) for one in order]


def _doubts(order: Sequence[Candidate], now: int) -> dict[str, str]:
    """Sets whose time does not fit, by id: as few as can be left out so that the others are in order."""
    doubts = {
        one.id: "it was made in the future, as this machine's clock has it"
        for one in order
        if one.created > now
    }
    rest = [one for one in reversed(order) if one.id not in doubts]
    # The longest part of the chain in which times increase.
    ends: list[int] = []
    places: list[int] = []
    for one in rest:
        at = bisect.bisect_left(ends, one.created)
        ends[at : at + 1] = [one.created]
        places.append(at)
    wanted = len(ends) - 1
    for one, at in zip(reversed(rest), reversed(places), strict=True):
        if at == wanted:
            wanted -= 1
        else:
            doubts[one.id] = "its time does not fit its place in the chain of its lineage"
    return doubts


def _apply(trusted: Sequence[Candidate], rules: Rules, work: _Work) -> None:
    for number, one in enumerate(trusted[: rules.last], 1):
        work.keep(one, f"last {number}")
    if rules.within and trusted:
        oldest = trusted[0].created - rules.within
        for one in trusted:
            if one.created >= oldest and one.id not in work.kept:
                work.keep(one, "within")
    for count, period in (
        (rules.hourly, "hourly"),
        (rules.daily, "daily"),
        (rules.weekly, "weekly"),
        (rules.monthly, "monthly"),
        (rules.yearly, "yearly"),
    ):
        _periods(trusted, count, period, work)


def _periods(trusted: Sequence[Candidate], count: int, period: str, work: _Work) -> None:
    if not count:
        return
    taken = {_period(one.created, period) for one in trusted if one.id in work.kept}
    number = 0
    for one in trusted:
        key = _period(one.created, period)
        if key in taken:
            continue
        taken.add(key)
        number += 1
        work.keep(one, f"{period} {number}")
        if number == count:
            return


def _period(created: int, period: str) -> tuple[int, ...]:
    # Whole seconds: the reading of a clock must not hang on how a fraction rounds.
    local = datetime.fromtimestamp(created // 1_000_000).astimezone()
    if period == "hourly":
        # An hour that a clock repeats in autumn is two hours.
        offset = local.utcoffset()
        return local.year, local.month, local.day, local.hour, offset.seconds if offset else 0
    if period == "daily":
        return local.year, local.month, local.day
    if period == "weekly":
        year, week, _ = local.isocalendar()
        return year, week
    return (local.year, local.month) if period == "monthly" else (local.year,)
