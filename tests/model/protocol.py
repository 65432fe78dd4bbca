"""The protocol of docs/design/locking.md, one storage call a step, in a store of a few dictionaries.

An agent is a generator: between two `yield`s it makes exactly one call of the
storage, so that whoever resumes agents decides how their calls interleave. An
agent that is never resumed was killed, one that is resumed last slept for days.
`Flaws` breaks a rule on purpose, to prove that the search notices.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

Refs = tuple[tuple[str, str], ...]
"What a set refers to: (block id, pack in which its map says that the block lies)."
ABORT: Refs = (("abort", ""),)
Agent = Generator[None, None, None]


@dataclass(frozen=True, slots=True)
class Flaws:
    """Rules to break."""

    overwriting: bool = False
    "A commit replaces an abort mark instead of losing to it."
    ignoring: bool = False
    "A writer treats condemned packs as present."
    late: bool = False
    "A writer looks around before it has announced itself."
    impatient: bool = False
    "A prune sweeps while older sessions have no outcome."
    blind: bool = False
    "A prune does not look for new condemnations, nor mark again, before it sweeps."
    trusting: bool = False
    "A prune takes a condemned pack for a safe place of a record."
    stale: bool = False
    "A prune does not look whether the packs that it relies on are still there."
    forgetful: bool = False
    "A prune takes for granted that the packs that it has written are still there."
    hasty: bool = False
    "A prune deletes before the index knows where the records went."
    reusing: bool = False
    "Condemnations are withdrawn while some of their packs are still there."
    believing: bool = False
    "What neither a map's hint nor the index tells counts as lost, though some pack has it."
    keeping: bool = False
    "A sync stores packs under the names that they had, though a prune may be about to delete them."
    careless: bool = False
    "A sync counts on condemned packs."
    backwards: bool = False
    "A sync lists the packs before it lists what is condemned."
    hurried: bool = False
    "A writer that listed all at once takes a condemnation that has gone since for none."


@dataclass(slots=True)
class Store:
    """What is durable."""

    flaws: Flaws = Flaws()
    sessions: dict[str, frozenset[str]] = field(default_factory=dict)
    "session -> condemnations that it saw before it announced itself"
    sets: dict[str, Refs] = field(default_factory=dict)
    "session -> manifest or abort mark"
    packs: dict[str, frozenset[str]] = field(default_factory=dict)
    "pack -> block ids; the part of its name before the dot is the session of its writer"
    index: frozenset[tuple[str, str]] = frozenset()
    condemned: dict[str, frozenset[str]] = field(default_factory=dict)
    deletes: int = 0
    "Packs that were deleted."
    late: list[str] = field(default_factory=list)
    "Packs whose deletion was asked for, and has not been carried out yet."

    def manifests(self) -> dict[str, Refs]:
        """The sets that exist."""
        return {name: refs for name, refs in self.sets.items() if refs != ABORT}

    def harm(self) -> str | None:
        """A block of a set that nobody can find any more."""
        for name, refs in self.manifests().items():
            for block, hint in refs:
                places = {hint} | {pack for known, pack in self.index if known == block}
                if not self.flaws.believing:
                    places |= self.packs.keys()  # The trailers tell in the end.
                if not any(block in self.packs.get(pack, ()) for pack in places):
                    return f"block {block} of set {name} is lost"
        return None


def writer(store: Store, me: str, blocks: str, *, ignorant: bool = False, far: bool = False) -> Agent:
    """A backup of these blocks, on top of some set that is there when it plans.

    `ignorant`: it finds nothing of what is there, so it stores again what others store at the same time.
    `far`: it lists everything in one call.
    """
    yield
    base = dict(next(iter(sorted(store.manifests().items(), reverse=True)), ("", ()))[1])
    if ignorant:
        base = {}
    yield
    seen = frozenset(store.condemned)
    if not store.flaws.late:
        yield
        store.sessions[me] = seen
    if far:
        bad, packs = yield from _listed_at_once(store)
    else:
        yield
        bad = frozenset[str]().union(*store.condemned.values())
        yield
        packs = frozenset(store.packs)
    present = packs - (bad if not store.flaws.ignoring else frozenset())
    yield
    index = dict(sorted(pair for pair in store.index if pair[1] in present and not ignorant))
    if store.flaws.late:
        yield
        store.sessions[me] = seen
    refs = {block: base[block] for block in blocks if base.get(block) in present}
    refs |= {block: index[block] for block in blocks if block not in refs and block in index}
    new = frozenset(blocks) - frozenset(refs)
    if new:
        pack = f"{me}.0"
        yield
        store.packs[pack] = new
        yield
        store.index |= {(block, pack) for block in new}
        refs |= dict.fromkeys(new, pack)
    yield
    if me not in store.sets or store.flaws.overwriting:
        store.sets[me] = tuple(sorted(refs.items()))


def forgetter(store: Store, name: str) -> Agent:
    """Forget a set: the announcement goes first, so that no session without an outcome is left."""
    yield
    if name in store.manifests():
        yield
        store.sessions.pop(name, None)
        yield
        store.sets.pop(name, None)


def fencer(store: Store) -> Agent:
    """Declare every session dead that has no outcome, whether it lives or not."""
    yield
    for session in sorted(store.sessions):
        yield
        store.sets.setdefault(session, ABORT)


def _listed_at_once(store: Store) -> Generator[None, None, tuple[frozenset[str], frozenset[str]]]:
    """(packs that are condemned, packs) by one listing, and a read of each condemnation."""
    while True:
        yield
        names, packs = sorted(store.condemned), frozenset(store.packs)
        found: dict[str, frozenset[str]] = {}
        for name in names:
            yield
            if name in store.condemned:
                found[name] = store.condemned[name]
        if len(found) == len(names) or store.flaws.hurried:
            return frozenset[str]().union(*found.values()), packs


ORIGIN: Refs = (("a", "o.0"), ("b", "o.0"), ("e", "o.0"))
"A set of another repository, of which this one is a copy."


def syncer(store: Store, me: str, name: str = "s0") -> Agent:
    """Copy a set, its packs under their own names where nobody may delete those."""
    made = 0
    for attempt in range(4):
        session = f"{me}{attempt}"
        yield
        seen = frozenset(store.condemned)
        yield
        store.sessions[session] = seen
        yield
        packs = frozenset(store.packs)
        bad = frozenset[str]().union(*store.condemned.values()) if not store.flaws.careless else frozenset()
        yield
        if store.flaws.backwards:
            bad = frozenset[str]().union(*store.condemned.values())
        else:
            packs = frozenset(store.packs)
        yield
        pruning = any(is_prune(one) and one not in store.sets for one in store.sessions)
        if name in store.sets and not made:
            break
        known = frozenset(block for block, _ in ORIGIN)
        if "o.0" not in packs - bad:
            renamed = (pruning or "o.0" in bad) and not store.flaws.keeping
            pack = f"{session}.0" if renamed else "o.0"
            yield
            store.packs[pack] = known
            yield
            store.index |= {(block, pack) for block in known}
        yield
        if session not in store.sets:
            yield
            store.sets[name] = ORIGIN
            made += 1
            yield
            if session not in store.sets:
                break  # Whoever fences it from now on, marks after the set is there.
    yield
    store.sessions.pop(session, None)


def is_prune(session: str) -> bool:
    """Whether a session says that it is a prune's."""
    return session[0] in "pz"


def merger(store: Store) -> Agent:
    """Merge the index: of the places of a block that are there one stays."""
    yield
    index = store.index
    yield
    packs = frozenset(store.packs)
    kept = frozenset(dict(sorted(pair for pair in index if pair[1] in packs)).items())
    yield
    store.index |= kept
    yield
    store.index -= index - kept


def tardy(store: Store) -> Agent:
    """The storage carries out deletions that it was asked for long ago."""
    for _ in range(4):
        yield
        if store.late:
            store.deletes += store.packs.pop(store.late.pop(), None) is not None


@dataclass(slots=True)
class _View:
    condemned: dict[str, frozenset[str]]
    packs: dict[str, frozenset[str]]
    sessions: frozenset[str]
    sets: dict[str, Refs]
    index: frozenset[tuple[str, str]]

    def bad(self) -> frozenset[str]:
        return frozenset[str]().union(*self.condemned.values())


class _Prune:
    """One run of prune, as `imager/repository/prune.py` does it."""

    def __init__(self, store: Store, me: str, lazy: bool, late: bool) -> None:
        self.store = store
        self.me = me
        self.lazy = lazy
        self.late = late
        self.made = 0
        self.own: set[str] = set()
        self.copied: set[tuple[str, str]] = set()
        "(pack, block): moved out of that pack by this run."
        self.marks: dict[str, set[str]] = {}
        self.unknown = False

    def run(self) -> Agent:
        store = self.store
        yield
        seen = frozenset(store.condemned)
        yield
        store.sessions[self.me] = seen
        for _ in range(3):
            view = yield from self.look()
            self.mark(view)
            if not self.unknown:
                break
        else:
            return
        yield from self.condemn(view)
        yield from self.sweep(view)
        yield
        store.sessions.pop(self.me, None)

    def look(self) -> Generator[None, None, _View]:
        store = self.store
        yield
        condemned = dict(store.condemned)
        yield
        packs = dict(store.packs)
        yield
        sessions = frozenset(store.sessions)
        yield
        sets = dict(store.sets)
        yield
        return _View(condemned, packs, sessions, sets, store.index)

    def mark(self, view: _View) -> None:
        """Where every live block lies: a safe place, or, where there is none, a condemned one."""
        self.marks = {}
        self.unknown = False
        bad = frozenset() if self.store.flaws.trusting else view.bad()
        for refs in view.sets.values():
            if refs != ABORT:
                self.mark_set(refs, view, bad)

    def mark_set(self, refs: Refs, view: _View, bad: frozenset[str]) -> None:
        for block, hint in refs:
            known = sorted({hint} | {pack for one, pack in view.index if one == block})
            held = [pack for pack in [hint, *known] if block in view.packs.get(pack, ())]
            held += [pack for pack in sorted(bad) if block in view.packs.get(pack, ())]
            if not held and not self.store.flaws.believing:
                held = [pack for pack, blocks in sorted(view.packs.items()) if block in blocks]
            safe = [pack for pack in held if pack not in bad]
            if not held:
                self.unknown = True  # Made, or moved, since the packs were listed: look again.
                continue
            self.marks.setdefault((safe or held)[0], set()).add(block)

    def copy(self, pack: str, blocks: set[str]) -> Agent:
        new = f"{self.me}.{self.made}"
        self.made += 1
        yield
        # What is copied was read before; a pack that is gone by now gives nothing.
        found = frozenset(blocks) & self.store.packs.get(pack, frozenset())
        if not found:
            return
        self.store.packs[new] = found
        if not self.store.flaws.hasty:
            yield
            self.store.index |= {(block, new) for block in found}
        self.own.add(new)
        self.copied |= {(pack, block) for block in found}

    def condemn(self, view: _View) -> Agent:
        chosen: set[str] = set()
        for pack, blocks in sorted(view.packs.items()):
            session = pack.split(".")[0]
            if pack in view.bad() or (session in view.sessions and session not in view.sets):
                continue  # condemned already, or its writer may still be at work
            live = self.marks.get(pack, set())
            if live == blocks:
                continue
            if live and self.lazy:
                continue
            if live:
                yield from self.copy(pack, live)
            if all((pack, block) in self.copied for block in live):
                chosen.add(pack)
        if chosen:
            yield
            self.store.condemned[f"x{self.me}"] = frozenset(chosen)
            view.condemned[f"x{self.me}"] = frozenset(chosen)

    def sweep(self, view: _View) -> Agent:
        store = self.store
        for _ in range(3):
            yield
            condemned = dict(store.condemned)
            yield
            packs_now = frozenset(store.packs)  # after the condemned: what is missing in both was swept
            yield
            sessions = dict(store.sessions)
            yield
            sets = dict(store.sets)
            relied = self.marks.keys() if store.flaws.forgetful else self.marks.keys() | self.own
            vanished = not store.flaws.stale and relied - packs_now
            grown = condemned.keys() - view.condemned.keys() or sets.keys() - view.sets.keys()
            if not (grown or vanished) or store.flaws.blind:
                break
            view = yield from self.look()
            self.mark(view)
            # Of what this run has copied nothing may be left: the marks tell.
            self.own = {pack for pack in self.own if pack in view.packs}
            if not store.flaws.forgetful:
                self.copied = set()
            if self.unknown:
                return
        else:
            return  # Too much goes on: the next prune sweeps.
        waiting = {name: seen for name, seen in sessions.items() if name not in sets and name != self.me}
        for name, packs in sorted(condemned.items()):
            if any(name not in seen for seen in waiting.values()) and not store.flaws.impatient:
                continue
            left = False
            for pack in sorted(packs):
                stranded = {b for b in self.marks.get(pack, ()) if (pack, b) not in self.copied}
                if stranded:
                    yield from self.copy(pack, stranded)
                if any((pack, block) not in self.copied for block in stranded):
                    left = True
                    continue
                if store.flaws.reusing:
                    yield
                    store.condemned.pop(name, None)
                yield
                if self.late:
                    store.late.append(pack)  # The call had no answer: this prune ends here.
                    return
                store.deletes += store.packs.pop(pack, None) is not None
            if not left:
                yield
                store.condemned.pop(name, None)


def pruner(store: Store, me: str, *, lazy: bool = False, late: bool = False) -> Agent:
    """One run of prune. `lazy`: it only drops packs in which nothing lives.

    `late`: the answer to its first deletion is lost, and the storage carries it out much later.
    """
    return _Prune(store, me, lazy, late).run()


Make = Callable[[Store], Agent]
