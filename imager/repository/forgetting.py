"""Forgetting image sets: by rules, or by name.

Invariant: a plan says of every set that it concerns why it stays or that it goes,
and nothing is forgotten that the plan did not show. A lineage never loses
its last set unless a person names that lineage; a pinned set never goes. Rules leave a
lineage alone while one of its sets says that it was taken in the future.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from msgspec import Struct

from imager.errors import NotConfirmed, UsageError
from imager.events import Reporter
from imager.repository import imageset, tombstones
from imager.repository.format import now
from imager.repository.imageset import Manifest
from imager.repository.repository import Repository
from imager.repository.retention import Candidate, Rules, judge
from imager.units import format_time

_AHEAD = "left alone: a set of it says that it was taken in the future"

__all__ = ["Choice", "ForgetPlan", "ForgetSummary", "Lineage", "execute", "plan_rules", "plan_sets"]


class Choice(Struct, frozen=True):
    """What becomes of a set. `reasons`: why it stays; none: it is forgotten. `doubt`: about its time."""

    set: str
    created: int
    reasons: tuple[str, ...]
    doubt: str | None = None

    @property
    def forget(self) -> bool:
        """Whether the set goes."""
        return not self.reasons


class Lineage(Struct, frozen=True):
    """What becomes of the sets of one lineage, the newest first."""

    name: str
    host: str
    choices: tuple[Choice, ...]


class ForgetPlan(Struct, frozen=True):
    """What is going to be forgotten, and why the rest stays."""

    lineages: tuple[Lineage, ...]
    doomed: tuple[Manifest, ...]
    reason: str
    damaged: tuple[str, ...]
    "Sets whose manifests are damaged; nobody can tell where they belong, so they stay."

    def describe(self) -> list[str]:
        """The plan in lines for a person."""
        lines: list[str] = []
        for lineage in self.lineages:
            lines.append(f"{lineage.name} of {lineage.host}:")
            for choice in lineage.choices:
                what = "forget" if choice.forget else f"keep   ({', '.join(choice.reasons)})"
                lines.append(f"  {choice.set[:8]}  {format_time(choice.created / 1e6)}  {what}")
        kept = sum(not choice.forget for lineage in self.lineages for choice in lineage.choices)
        lines.append(f"{len(self.doomed)} to forget, {kept} to keep")
        return lines


class ForgetSummary(Struct, frozen=True):
    """What was forgotten. `kept`: how many sets of the same lineages are left."""

    forgotten: tuple[str, ...]
    kept: int
    seconds: float


def plan_rules(
    repository: Repository,
    rules: Rules,
    reporter: Reporter,
    *,
    names: Collection[str] = (),
    hosts: Collection[str] = (),
) -> ForgetPlan:
    """What the rules forget in each lineage, or in those of these names and hosts.

    Of a lineage with a set that is more than a day ahead of this machine's clock nothing goes: a person
    looks first. Raises `UsageError` where there are no rules or nothing would be left of a lineage,
    `WrongKey`, `StorageError`.
    """
    if rules.empty:
        raise UsageError(
            "no rule says which image sets to keep", hint="give --keep-daily 7 and so on, or name the sets"
        )
    listing, pinned = _look(repository, reporter)
    known = [(one.content.name, one.content.host) for one in listing.sets]
    for kind, wanted, there in (
        ("called", names, {name for name, _ in known}),
        ("of host", hosts, {host for _, host in known}),
    ):
        if missing := sorted(set(wanted) - there):
            raise UsageError(
                f"there is no image set {kind} {missing[0]!r}", hint="imager list shows what there is"
            )
    lineages: list[Lineage] = []
    doomed: list[Manifest] = []
    moment = now()
    for members in _by_lineage(listing.sets):
        body = members[0].content
        if (names and body.name not in names) or (hosts and body.host not in hosts):
            continue
        if ahead := imageset.ahead(members, at=moment):
            reporter.warn(
                f"no set of {body.name} of {body.host} is forgotten: set {ahead[0][:8]}"
                + (f" and {len(ahead) - 1} more say" if len(ahead) > 1 else " says")
                + " that it was taken in the future",
                hint="look at that machine and its clock; then forget what you do not trust by name: "
                f"imager forget {ahead[0][:8]}",
            )
            choices = tuple(Choice(one.id, one.created, (_AHEAD,)) for one in members)
            lineages.append(Lineage(body.name, body.host, choices))
            continue
        candidates = [
            Candidate(one.id, one.sequence, one.created, frozenset(one.content.tags)) for one in members
        ]
        verdicts = judge(candidates, rules, pinned=pinned, now=moment)
        created = {one.id: one.created for one in members}
        choices = tuple(Choice(v.set, created[v.set], v.reasons, v.doubt) for v in verdicts)
        if all(choice.forget for choice in choices):
            raise UsageError(
                f"the rules keep no image set of {body.name} of {body.host}",
                hint="add a rule such as --keep-last 1; to forget a whole lineage, name its sets",
            )
        for choice in choices:
            if choice.doubt is not None:
                reporter.warn(
                    f"set {choice.set[:8]} of {body.name} is kept, and counts for no rule: {choice.doubt}",
                    hint="check the clocks of the machine that wrote it; to forget it, name it",
                )
        lineages.append(Lineage(body.name, body.host, choices))
        gone = {choice.set for choice in choices if choice.forget}
        doomed += [one for one in members if one.id in gone]
    return _plan(lineages, doomed, "by rules", listing)


def plan_sets(
    repository: Repository, texts: Sequence[str], reporter: Reporter, *, last_of: Collection[str] = ()
) -> ForgetPlan:
    """Forget the sets named. `last_of`: names of lineages that may lose their last set.

    Raises `NotConfirmed` where a lineage would lose its last set, `UsageError` for a pinned
    set, `NoSuchSet`, `WrongKey`, `StorageError`.
    """
    listing, pinned = _look(repository, reporter)
    wanted = {imageset.resolve(repository, text).id for text in texts}
    for set_id in sorted(wanted & pinned):
        raise UsageError(
            f"image set {set_id[:8]} is pinned",
            hint=f"imager pin --remove {set_id[:8]} leaves it to its fate",
        )
    lineages: list[Lineage] = []
    doomed: list[Manifest] = []
    for members in _by_lineage(listing.sets):
        gone = [one for one in members if one.id in wanted]
        if not gone:
            continue
        body = members[0].content
        if len(gone) == len(members) and body.name not in last_of:
            raise NotConfirmed(
                f"no image set of {body.name} of {body.host} would be left",
                hint=f"if that is what you want, say --last-of {body.name}",
            )
        choices = tuple(
            Choice(one.id, one.created, () if one.id in wanted else ("not named",)) for one in members
        )
        lineages.append(Lineage(body.name, body.host, choices))
        doomed += gone
    return _plan(lineages, doomed, "by name", listing)


def _look(repository: Repository, reporter: Reporter) -> tuple[imageset.Listing, frozenset[str]]:
    tombstones.check_may_forget(repository)
    listing = imageset.list_sets(repository)
    for damaged in listing.problems:
        reporter.warn(f"image set {damaged.id[:8]} stays: {damaged.reason}", hint="imager check tells more")
    return listing, tombstones.pinned(repository)


def _by_lineage(sets: Sequence[Manifest]) -> list[list[Manifest]]:
    """The sets of each lineage, the newest first; lineages by name and host."""
    found: dict[str, list[Manifest]] = {}
    for one in sets:
        found.setdefault(one.lineage, []).append(one)
    for members in found.values():
        members.sort(key=lambda one: (one.sequence, one.created, one.id), reverse=True)
    return sorted(found.values(), key=lambda members: (members[0].content.name, members[0].content.host))


def _plan(
    lineages: list[Lineage], doomed: list[Manifest], reason: str, listing: imageset.Listing
) -> ForgetPlan:
    return ForgetPlan(tuple(lineages), tuple(doomed), reason, tuple(one.id for one in listing.problems))


def execute(repository: Repository, plan: ForgetPlan, reporter: Reporter) -> ForgetSummary:
    """Forget what the plan says, the oldest first. Can be interrupted and done again.

    Raises `WrongKey`, `StorageError`; what was forgotten until then stays forgotten.
    """
    begun = time.monotonic()
    done: list[str] = []
    reporter.phase("forgetting", None)
    for manifest in sorted(plan.doomed, key=lambda one: (one.lineage, one.sequence)):
        tombstones.forget(repository, manifest, host=imageset.this_host(), reason=plan.reason)
        done.append(manifest.id)
    reporter.end()
    kept = sum(not choice.forget for lineage in plan.lineages for choice in lineage.choices)
    return ForgetSummary(tuple(done), kept, round(time.monotonic() - begun, 3))
