"""Which packs were read back, and when: so that a check of a part begins with the oldest.

Invariant: the record only chooses what is read first; it never makes a
pack count as whole. Whoever tampers with it costs time, and cannot keep a pack
from being read for ever: a part of every choice falls on packs at random.
Parallel checkers never write over each other: each run is an object of its
own, made once; many become one now and then.

A *mark* of a pack is the run in which it was last read whole, or before which it
was first seen. What a pack is *owed* is the sum of the shares of all runs since
its mark; once that comes to the whole, it is read whatever else is. So a pack
that is there through M runs of `1/M` is read at least once in them, however many
others come and go.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction

import msgspec
from msgspec import Struct, field

from imager import config
from imager.errors import ImagerError, IntegrityError, NoRepository, StorageError, UsageError
from imager.repository.format import CHECKED, MAX_JSON, canonical, check_features, is_id, now, parse, shape
from imager.repository.repository import Repository
from imager.storage.errors import NotFound
from imager.units import parse_size

WHOLE = 1_000_000_000
"Shares are counted in parts of this."
_DIGITS = 16
"So many digits of a pack's name tell it from all others, as far as it matters here."
_MERGE, _MOST_RUNS = 16, 4096
_DAY = 86_400 * 1_000_000
_PART = re.compile(r"(\d+)/(\d+)")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")
_CHANCE = random.SystemRandom()


# --- what is wished for -------------------------------------------------------------------------


class Wish(Struct, frozen=True):
    """How much to read: a share of all packs, or, where that is None, so many bytes."""

    share: Fraction | None
    size: int = 0


def parse_wish(text: str) -> Wish:
    """`all`, `N/M`, `10%`, `5G`. Raises `UsageError`."""
    if text == "all":
        return Wish(Fraction(1))
    if part := _PART.fullmatch(text):
        number, parts = int(part[1]), int(part[2])
        if not 1 <= number <= parts:
            raise UsageError(
                f"{text} of the data cannot be read", hint="write 1/30: thirty such runs read all of it"
            )
        return Wish(Fraction(number, parts))
    if percent := _PERCENT.fullmatch(text):
        share = Fraction(percent[1]) / 100
        if not 0 < share <= 1:
            raise UsageError(f"{text} of the data cannot be read", hint="write a share from 1% to 100%")
        return Wish(share)
    size = parse_size(text)
    if not size:
        raise UsageError(f"{text} of the data cannot be read", hint="write an amount like 50G")
    return Wish(None, size)


# --- what is kept ---------------------------------------------------------------------------------


class _Run(msgspec.Struct, frozen=True):
    """One run, or a piece of one. `read`, `seen`: the first 16 digits of pack names, one after the other."""

    time: int
    share: int
    read: str = ""
    seen: str = ""


class _Kept(msgspec.Struct, frozen=True):
    """The object `checked/<id>` (docs/design/repository-format.md, section 9)."""

    repository: str
    runs: tuple[_Run, ...]
    version: int = 1


class Record(Struct):
    """All that is known of earlier runs. Times in microseconds since 1970 UTC."""

    repository: Repository
    time: int
    "Of the run that goes on now: all that it reads counts as read then."
    shares: dict[int, int] = field(default_factory=dict)
    "When each run was, and its share."
    read: dict[str, int] = field(default_factory=dict)
    "When a pack was last read whole, by the first digits of its name."
    seen: dict[str, int] = field(default_factory=dict)
    "Before which run a pack was first met, where no run has read it."
    notes: list[str] = field(default_factory=list)
    _objects: list[str] = field(default_factory=list)

    def last_read(self, path: str) -> int | None:
        """When a pack (by object name) was last read whole; None where nobody knows of it."""
        return self.read.get(_short(path))

    # --- choosing ---------------------------------------------------------------------------

    def choose(self, sizes: Mapping[str, int], wish: Wish) -> list[str]:
        """The packs to read, the longest unread first, out of `sizes` (bytes by object name).

        A share takes what is due, what is oldest up to the share, and an eighth more at random. An
        amount takes seven eighths from the oldest and the rest at random, and stops at the amount.
        """
        if wish.share == 1:
            return self._oldest_first(sizes)
        total = sum(sizes.values())
        order = self._oldest_first(sizes)
        if wish.share is None:
            chosen = _until(order, sizes, Fraction(wish.size * 7, 8))
            left = Fraction(wish.size - sum(sizes[name] for name in chosen))
        else:
            chosen = _until(order, sizes, total * wish.share)
            taken, share = set(chosen), as_share(wish.share)
            owed = _Owed(self)
            chosen += [name for name in order if name not in taken and owed(name) + share >= WHOLE]
            left = total * wish.share / 8
        taken = set(chosen)
        rest = [name for name in order if name not in taken]
        _CHANCE.shuffle(rest)
        return chosen + (_until(rest, sizes, left) if left > 0 else [])

    def share_of(self, wish: Wish, sizes: Mapping[str, int]) -> int:
        """What share a run of this wish counts for, in parts of `WHOLE`."""
        if wish.share is not None:
            return as_share(wish.share)
        total = sum(sizes.values())
        return min(WHOLE, wish.size * 7 // 8 * WHOLE // total) if total else WHOLE

    def _oldest_first(self, sizes: Mapping[str, int]) -> list[str]:
        names = list(sizes)
        _CHANCE.shuffle(names)  # Of packs that are equally old, two checkers take different ones.
        latest = now()

        def mark(path: str) -> tuple[int, bool]:
            key = _short(path)
            read = self.read.get(key)
            # Seen before a run is older than read in it.
            return (self.seen.get(key, latest), False) if read is None else (read, True)

        return sorted(names, key=mark)

    # --- keeping ----------------------------------------------------------------------------

    def keep(self, share: int, read: Collection[str], present: Collection[str]) -> None:
        """Write down this run, or a piece of it: packs that it read whole, and all that there are.

        Packs by object name; the last piece has the run's share, the others 0. In the repository;
        where that cannot be written, on this machine; else a note says so.
        """
        fresh = {_short(path) for path in read}
        unread = {_short(path) for path in present} - fresh - self.read.keys() - self.seen.keys()
        run = _Run(self.time, share, "".join(sorted(fresh)), "".join(sorted(unread)))
        self._take(run)
        storage, repository = self.repository.storage, self.repository.config.repository
        name = CHECKED + os.urandom(16).hex()
        try:
            check_features(self.repository.config, writing=True)
            storage.create(name, canonical(_Kept(repository, (run,))))
            self._objects.append(name)
        except (StorageError, NoRepository) as error:
            self._keep_here(run, error)
            return
        many = len(self._objects)
        # Where nothing can be deleted they stay, so merge more rarely the more there are.
        if many >= _MERGE and many & (many - 1) == 0:
            self._merge({_short(path) for path in present})

    def _merge(self, present: set[str]) -> None:
        storage = self.repository.storage
        kept = _Kept(self.repository.config.repository, self._runs(present))
        try:
            storage.create(CHECKED + os.urandom(16).hex(), canonical(kept))
            for name in self._objects:
                try:
                    storage.delete(name)
                except NotFound:
                    continue  # Another checker has merged it, too.
        except StorageError:
            return  # An append-only repository: they are read one by one, then.
        self._objects = []

    def _runs(self, present: set[str]) -> tuple[_Run, ...]:
        """All that is known of packs that are there, by run; runs that tell nothing more are left out."""
        read: dict[int, list[str]] = {}
        seen: dict[int, list[str]] = {}
        for known, by_time in ((self.read, read), (self.seen, seen)):
            for key, time in known.items():
                if key in present and not (known is self.seen and key in self.read):
                    by_time.setdefault(time, []).append(key)
        runs: list[_Run] = []
        later = 0
        for time in sorted({*self.shares, *read, *seen}, reverse=True):
            share = self.shares.get(time, 0)
            told = time in read or time in seen
            if told or (later < WHOLE and len(runs) < _MOST_RUNS):
                mine = "".join(sorted(read.get(time, ()))), "".join(sorted(seen.get(time, ())))
                runs.append(_Run(time, share, *mine))
            later += share
        return tuple(reversed(runs))

    def _take(self, run: _Run) -> None:
        self.shares[run.time] = self.shares.get(run.time, 0) + run.share
        for key in _split(run.read):
            self.read[key] = max(run.time, self.read.get(key, 0))
        for key in _split(run.seen):
            self.seen[key] = min(run.time, self.seen.get(key, run.time))

    # --- on this machine ----------------------------------------------------------------------

    def _path(self) -> str:
        return os.path.join(config.state_dir(), "checked", f"{self.repository.place}.json")

    def _keep_here(self, run: _Run, refused: ImagerError) -> None:
        """Where the repository is not to be written: a file of this machine, all runs in one."""
        path = self._path()
        here = [*_read_file(path), run]
        kept = Record(self.repository, run.time)
        for one in here:
            kept._take(one)
        present = {*kept.read, *kept.seen}
        try:
            os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
            staged = f"{path}.{os.getpid()}"
            with open(staged, "wb") as file:
                file.write(canonical(_Kept(self.repository.config.repository, kept._runs(present))))
            os.replace(staged, path)
        except OSError as error:
            self.notes.append(
                f"which packs were read could be written down neither in the repository ({refused.message}) "
                f"nor here ({path}: {error.strerror}): the next run cannot begin with the oldest"
            )


class _Owed:
    """The sum of the shares of all runs since a pack's mark, in parts of `WHOLE`."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._times = sorted(record.shares)
        self._after = [0] * (len(self._times) + 1)
        for at in range(len(self._times) - 1, -1, -1):
            self._after[at] = self._after[at + 1] + record.shares[self._times[at]]

    def __call__(self, path: str) -> int:
        from bisect import bisect_left, bisect_right

        key = _short(path)
        last = self._record.read.get(key)
        if last is not None:
            return self._after[bisect_right(self._times, last)]
        first = self._record.seen.get(key)
        return 0 if first is None else self._after[bisect_left(self._times, first)]


def load(repository: Repository) -> Record:
    """What the repository and this machine know of earlier runs. Raises `StorageError` where it is gone."""
    record = Record(repository, now())
    latest = record.time + _DAY
    runs: list[_Run] = []
    for name in repository.storage.list_names(CHECKED):
        if not is_id(name.removeprefix(CHECKED)):
            continue
        what = f"the record of a check {name}"
        try:
            raw = repository.storage.read(name, 0, MAX_JSON + 1)
            kept = shape(parse(raw, what, MAX_JSON), _Kept, what)
        except NotFound:
            continue  # merged with others a moment ago
        except IntegrityError as error:
            record.notes.append(f"{error.message}; it is passed over")
            continue
        if kept.version == 1 and kept.repository == repository.config.repository:
            runs += kept.runs
        record._objects.append(name)
    runs += _read_file(record._path())
    for run in sorted(runs, key=lambda run: run.time):
        # What claims to come from the future counts for nothing: no read, no share.
        if 0 < run.time <= latest and 0 <= run.share <= WHOLE:
            record._take(run)
    while record.time in record.shares:
        record.time += 1
    return record


def as_share(share: Fraction) -> int:
    """A share in parts of `WHOLE`, rounded up: M times 1/M is the whole."""
    return min(WHOLE, -(-share.numerator * WHOLE // share.denominator))


def _short(path: str) -> str:
    return path[-64:][:_DIGITS]


def _split(text: str) -> Iterable[str]:
    return (text[at : at + _DIGITS] for at in range(0, len(text), _DIGITS))


def _until(names: Iterable[str], sizes: Mapping[str, int], wanted: Fraction) -> list[str]:
    """The first of the names that together have so many bytes; one at least."""
    chosen: list[str] = []
    total = 0
    for name in names:
        if total >= wanted and chosen:
            break
        chosen.append(name)
        total += sizes[name]
    return chosen


def _read_file(path: str) -> tuple[_Run, ...]:
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(MAX_JSON), type=_Kept).runs
    except (OSError, msgspec.DecodeError, UnicodeError, RecursionError):
        return ()
