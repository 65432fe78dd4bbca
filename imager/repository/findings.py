"""What a check finds: each problem by its object, and exactly what it costs.

Invariant: a problem names the object that is damaged, and every set, disk
and range of bytes that cannot be had back because of it, no more, no less.
"""

from __future__ import annotations

from msgspec import Struct, field

from imager._native import Known
from imager.events import Reporter
from imager.repository.imageset import Listing
from imager.repository.repository import Repository
from imager.units import format_size


class Hurt(Struct, frozen=True):
    """Bytes of one disk of one set that are lost; `extents` as (start, length) in bytes.

    `name` and `disk` are empty where no key was given: then only the set is known.
    """

    set: str
    name: str
    disk: str
    extents: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        """How many bytes that is."""
        return sum(length for _, length in self.extents)

    def __str__(self) -> str:
        if not self.disk:
            return f"set {self.set[:8]}: with a key, check tells which bytes"
        shown = ", ".join(f"{start}+{length}" for start, length in self.extents[:4])
        more = f" and {len(self.extents) - 4} more extents" if len(self.extents) > 4 else ""
        amount = format_size(self.bytes)
        return f"set {self.set[:8]} ({self.name}), disk {self.disk}: {amount} at {shown}{more}"


class Problem(Struct, frozen=True):
    """One damaged, missing or doubtful object.

    kind: config, slot, epoch, revocation, session, set, chain, history, tombstone, pin, condemned, pack,
    map, index.
    `repaired`: nothing is left to do about it and nothing was lost.
    """

    kind: str
    object: str
    detail: str
    hurt: tuple[Hurt, ...] = ()
    repaired: bool = False

    def __str__(self) -> str:
        return f"{self.object}: {self.detail}{' (repaired)' if self.repaired else ''}"


class Survey(Struct):
    """What a check in progress knows. Packs are meant by their numbers in `repository.names`."""

    repository: Repository
    reporter: Reporter
    listing: Listing
    known: Known
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    "Size of every pack there is, by object name."
    bad: dict[int, list[str]] = field(default_factory=dict)
    "Packs that are missing or damaged, and how."
    aside: set[int] = field(default_factory=set)
    "Packs that a repair has set aside."
    used: set[int] = field(default_factory=set)
    "Packs that image sets refer to."
    maps: set[int] = field(default_factory=set)
    "Packs that are map packs."
    pages: int = 0
    read: int = 0
    unlisted: int = 0
    "Blocks of packs that the index names, which it knows in no pack."

    @property
    def keyless(self) -> bool:
        """Whether nothing sealed can be read: no key was given, or one that can write only."""
        return self.repository.sealed and not self.repository.secrets.epochs

    def blame(self, number: int, reason: str) -> None:
        """Remember what is wrong with a pack, each reason once."""
        reasons = self.bad.setdefault(number, [])
        if reason not in reasons:
            reasons.append(reason)
