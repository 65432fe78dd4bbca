"""What this machine last saw of each lineage, so that a rollback is noticed.

Invariant: what is remembered never goes back by itself. A repository from
which sets vanished, or that shows an older state, is reported every time
until a person accepts it; a lost or unwritable memory hurts no backup.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import msgspec

from imager import config
from imager.repository.format import is_id

_MAX_STATE = 16 << 20


class Seen(msgspec.Struct, frozen=True):
    """The newest set that this machine saw of a lineage; `digest` of its whole manifest."""

    sequence: int
    set: str
    digest: str


class _State(msgspec.Struct):
    version: int
    lineages: dict[str, Seen]


class SetLike(Protocol):
    """What of a set counts here: a `Manifest` or an `imageset.Head` has it."""

    @property
    def id(self) -> str: ...
    @property
    def lineage(self) -> str: ...
    @property
    def sequence(self) -> int: ...
    @property
    def digest(self) -> bytes: ...


Set = TypeVar("Set", bound=SetLike)


class Witness:
    """The memory of one repository at one place, in the state folder of this machine.

    `place`: as `Repository.place` has it. A copy elsewhere has the same id, and may have fewer sets.
    """

    def __init__(self, place: str) -> None:
        self._path = os.path.join(config.state_dir(), "witness", place + ".json")
        self._loaded: dict[str, Seen] | None = None

    def observe(
        self,
        sets: Iterable[Set],
        *,
        damaged: Iterable[str] = (),
        forgotten: Callable[[str], str | None] = lambda _: None,
        there: Callable[[str], bool] = lambda _: False,
        genuine: Callable[[Set], bool] = lambda _: True,
    ) -> list[str]:
        """Compare all sets of the repository with the memory, tell what is wrong, remember what is newer.

        `damaged`: ids of sets that are there but unreadable (another problem, not told here).
        `forgotten`: gives the digest of a set that was forgotten on purpose, `there`: whether a set
        has come since `sets` were listed; both are asked only where one is gone. `genuine`: whether a set
        is what it says; asked only of one that would be remembered, for what anybody could have put
        there must not take the place of what was seen.
        """
        problems: list[str] = []
        lineages = self._load(problems)
        present = {item.id: item for item in sets}
        unusable = set(damaged)
        doubtful: set[str] = set()
        released: set[str] = set()
        for lineage, seen in lineages.items():
            item = present.get(seen.set)
            if item is None and seen.set not in unusable and forgotten(seen.set) == seen.digest:
                released.add(lineage)
            elif item is None:
                doubtful.add(lineage)
                if seen.set not in unusable and not there(seen.set):
                    problems.append(
                        f"image set {seen.set} (number {seen.sequence} of its lineage) is gone: "
                        "it was deleted, or an older state of the repository was put in its place"
                    )
            elif item.digest.hex() != seen.digest or item.sequence != seen.sequence:
                doubtful.add(lineage)
                problems.append(
                    f"image set {seen.set} is not the one that this machine saw before: it was replaced"
                )
        changed = False
        for lineage in released.intersection(item.lineage for item in present.values()):
            del lineages[lineage]  # What is left of it now is what there ought to be.
        for item in sorted(present.values(), key=lambda item: item.sequence, reverse=True):
            last = lineages.get(item.lineage)
            # Where something is wrong the memory stays as it is, or one more backup would hide the rollback.
            newer = last is None or (item.sequence > last.sequence and item.lineage not in doubtful)
            if newer and genuine(item):
                lineages[item.lineage] = Seen(item.sequence, item.id, item.digest.hex())
                changed = True
        if changed:
            self._store(lineages, problems)
        return problems

    def committed(self, item: SetLike, before: Iterable[str]) -> list[str]:
        """Remember a set that this machine has just written. `before`: ids of the sets that it had looked at.

        Returns what went wrong with writing it down.
        """
        problems: list[str] = []
        lineages = self._load(problems)
        last = lineages.get(item.lineage)
        # Where the last one seen was not among them something is wrong, and must go on being told.
        if last is None or (item.sequence > last.sequence and last.set in set(before)):
            lineages[item.lineage] = Seen(item.sequence, item.id, item.digest.hex())
            self._store(lineages, problems)
        return problems

    def accept(self, sets: Iterable[SetLike]) -> list[str]:
        """Forget the memory and take what is there now as the truth: a person said so.

        Returns what went wrong with writing it down.
        """
        problems: list[str] = []
        newest: dict[str, Seen] = {}
        for item in sets:
            last = newest.get(item.lineage)
            if last is None or item.sequence > last.sequence:
                newest[item.lineage] = Seen(item.sequence, item.id, item.digest.hex())
        self._store(newest, problems)
        return problems

    def _load(self, problems: list[str]) -> dict[str, Seen]:
        if self._loaded is not None:
            return self._loaded
        self._loaded = {}
        try:
            with open(self._path, "rb") as file:
                state = msgspec.json.decode(file.read(_MAX_STATE), type=_State)
            self._loaded = {key: seen for key, seen in state.lineages.items() if is_id(seen.set)}
        except FileNotFoundError:
            pass
        except (OSError, msgspec.DecodeError, UnicodeError, RecursionError) as error:
            problems.append(
                f"what this machine remembers of the repository cannot be read ({self._path}): {error}"
            )
        return self._loaded

    def _store(self, lineages: dict[str, Seen], problems: list[str]) -> None:
        self._loaded = lineages
        staged = f"{self._path}.{os.getpid()}"
        try:
            os.makedirs(os.path.dirname(self._path), 0o700, exist_ok=True)
            fd = os.open(staged, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, msgspec.json.encode(_State(1, lineages)))
                # Not flushed: losing the newest state to a crash is harmless, and a torn file is noticed.
            finally:
                os.close(fd)
            os.replace(staged, self._path)
        except OSError as error:
            problems.append(
                f"this machine cannot remember the state of the repository ({self._path}: {error.strerror}); "
                "a rollback would go unnoticed"
            )
