"""Who can open a repository: its key slots, what each can do, and what each reads.

Invariant: what a slot says in the open (role, label, epochs) is shown, and believed only
for what guards against accidents; what it can really open is known to who holds its secret.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from msgspec import Struct

from imager.errors import IntegrityError, UsageError, WrongKey
from imager.repository import keys, writers
from imager.repository.format import EPOCHS, MAX_SMALL_JSON, SLOTS, Slot, numbered
from imager.repository.keys import FULL, WRITE, Secrets
from imager.repository.repository import Opening, Repository
from imager.storage.errors import NotFound

MARK = re.compile(rf"{SLOTS}([0-9a-f]{{32}})\.removing-[0-9a-f]{{16}}")
"The object that says that a slot is being removed (see `removal`)."
SHORTEST = 4
"Digits of an id that name something."


class SlotFacts(Struct, frozen=True):
    """A key slot as `key list` shows it. `reads`: the epochs in it, as its maker said (None: not told).

    `opened`: with this one the repository is open; `removing`: a removal began and did not end.
    """

    slot: str
    kind: str
    role: str
    label: str
    created: int
    reads: tuple[int, ...] | None
    writer: str | None
    host: str | None
    opened: bool
    removing: bool


class Keyring(Struct, frozen=True):
    """All keys of a repository. `lacking`: ids of slots that read, but not every epoch."""

    slots: tuple[SlotFacts, ...]
    epochs: tuple[int, ...]
    lacking: tuple[str, ...]
    revoked: tuple[str, ...]
    problems: tuple[str, ...]


def read_slots(repository: Repository) -> tuple[list[Slot], set[str], list[str]]:
    """(slots, ids of those that have a removal's mark, problems). Raises `StorageError`.

    The marks are listed before the slots: see the module.
    """
    storage = repository.storage
    marked = {match[1] for name in storage.list_names(SLOTS) if (match := MARK.fullmatch(name))}
    slots: list[Slot] = []
    problems: list[str] = []
    for slot_id in Opening.slot_ids(storage):
        try:
            raw = storage.read(SLOTS + slot_id, 0, MAX_SMALL_JSON + 1)
            slots.append(keys.parse_slot(raw, slot_id, repository.id))
        except NotFound:
            continue  # removed since it was listed
        except IntegrityError as error:
            problems.append(error.message)
    slots.sort(key=lambda slot: (slot.created, slot.slot))
    return slots, marked, problems


def listing(repository: Repository) -> Keyring:
    """All slots and epochs, and which slot reads what. Raises `UsageError`, `StorageError`."""
    need_sealed(repository)
    slots, marked, problems = read_slots(repository)
    epochs = epochs_of(repository, problems)
    opened = repository.slot.slot if repository.slot is not None else None
    facts = tuple(_facts(repository, slot, opened, marked) for slot in slots)
    revoked = tuple(sorted(repository.revoked()))
    problems += [f"{name}: {detail}" for name, detail in repository.revocation_problems]
    return Keyring(facts, epochs, _lacking(slots, epochs), revoked, tuple(problems))


def epochs_of(repository: Repository, problems: list[str]) -> tuple[int, ...]:
    found: list[int] = []
    for number in sorted(numbered(repository.storage.list_names(EPOCHS))):
        try:
            repository.epoch(number)
        except (IntegrityError, NotFound) as error:
            problems.append(error.message)
            continue
        found.append(number)
    return tuple(found)


def _facts(repository: Repository, slot: Slot, opened: str | None, marked: set[str]) -> SlotFacts:
    writer = slot.writer
    if writer is not None and not writers.is_certified(repository.id, repository.verify_key, writer):
        writer = None
    return SlotFacts(
        slot=slot.slot,
        kind=slot.kind,
        role=slot.role,
        label=slot.label,
        created=slot.created,
        reads=tuple(slot.reads) if slot.reads or slot.role == WRITE else None,
        writer=writer.writer if writer is not None else None,
        host=writer.host if writer is not None else None,
        opened=slot.slot == opened,
        removing=slot.slot in marked,
    )


def reads_of(slot: Slot) -> set[int]:
    """The epochs that a slot reads; one that does not tell was made when there was one epoch."""
    return set(slot.reads or (1,)) if slot.role != WRITE else set()


def _lacking(slots: Iterable[Slot], epochs: Iterable[int]) -> tuple[str, ...]:
    wanted = set(epochs)
    return tuple(slot.slot for slot in slots if slot.role != WRITE and not wanted <= reads_of(slot))


def find(slots: Iterable[Slot], text: str) -> Slot:
    """The slot that a label, an id or its unique prefix names. Raises `UsageError`."""
    labelled = [slot for slot in slots if slot.label == text]
    prefixed = [slot for slot in slots if len(text) >= SHORTEST and slot.slot.startswith(text.lower())]
    found = labelled or prefixed
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"no key slot is called {text!r}", hint="imager key list shows them")
    raise UsageError(
        f"{text!r} may be any of {len(found)} key slots: {', '.join(slot.slot[:12] for slot in found[:8])}",
        hint="give more digits of the id",
    )


def need_sealed(repository: Repository) -> None:
    if not repository.sealed:
        raise UsageError(
            "this repository is not encrypted: it has no keys",
            hint="make another one with imager init, and imager sync the sets over",
        )


def need_full(repository: Repository) -> Secrets:
    need_sealed(repository)
    if repository.secrets.role != FULL:
        raise WrongKey(
            f"this key has the role {repository.secrets.role}: it may not change who opens the repository",
            hint="use a key with the full role",
        )
    return repository.secrets
