"""The keys of an open repository: who can open it, what each may do, and taking that away again.

Invariant: at every moment there is a slot of the role full whose key reads every epoch
that the repository has. It holds against two removals at once as well: each leaves its
mark first, then looks for a full slot that nobody's mark is on, and only then deletes.
What replaces something is durable before that goes.

The order within `remove`, which `tests/unit/repository/test_keyring.py` runs in every interleaving:

1. create a mark of one's own beside the slots (create-only, durable);
2. list the marks, and after that the slots;
3. where no full slot without a mark is left, take back the mark and refuse;
4. delete the slot, then every mark on a slot that is gone.

Of two removals, the one that lists later sees the other's mark, or its slot gone: a mark
goes only after its slot. So they may both refuse, and never both delete. A mark that a killed removal left
counts as if the slot were gone, which errs to the safe side; removing the slot again clears it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from imager.errors import ImagerError, IntegrityError, UsageError, WrongKey
from imager.repository import imageset, keys, recovery_key, writers
from imager.repository.format import (
    EPOCHS,
    MAX_SMALL_JSON,
    REVOKED,
    SLOTS,
    Slot,
    now,
    numbered,
)
from imager.repository.keys import FULL, READ, WRITE, Secret, Secrets
from imager.repository.recovery_sheet import Sheet
from imager.repository.repository import Opening, Repository
from imager.storage.errors import AlreadyExists, NotFound

_MARK = re.compile(rf"{SLOTS}([0-9a-f]{{32}})\.removing-[0-9a-f]{{16}}")
_SHORTEST = 4


@dataclass(frozen=True, slots=True)
class SlotFacts:
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


@dataclass(frozen=True, slots=True)
class Keyring:
    """All keys of a repository. `lacking`: ids of slots that read, but not every epoch."""

    slots: tuple[SlotFacts, ...]
    epochs: tuple[int, ...]
    lacking: tuple[str, ...]
    revoked: tuple[str, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Added:
    """A slot that was made."""

    slot: str
    kind: str
    role: str
    label: str
    writer: str | None = None


@dataclass(frozen=True, slots=True)
class Removed:
    """What a removal came to. `slot` None: there was none any more, only a writer to revoke.

    `revoked`: the writer whose signature counts no more; `kept`: how many sets of it still count.
    `remaining`: the slots that are left.
    """

    slot: str | None
    kind: str | None
    role: str
    label: str
    revoked: str | None
    kept: int
    remaining: int


@dataclass(frozen=True, slots=True)
class Rotated:
    """A new key epoch. `slot`: the slot that holds its private key now; `lacking`: those that do not."""

    epoch: int
    slot: str
    lacking: tuple[SlotFacts, ...]


# --- looking ------------------------------------------------------------------------------


def read_slots(repository: Repository) -> tuple[list[Slot], set[str], list[str]]:
    """(slots, ids of those that have a removal's mark, problems). Raises `StorageError`.

    The marks are listed before the slots: see the module.
    """
    storage = repository.storage
    marked = {match[1] for name in storage.list_names(SLOTS) if (match := _MARK.fullmatch(name))}
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
    _need_sealed(repository)
    slots, marked, problems = read_slots(repository)
    epochs = _epochs(repository, problems)
    opened = repository.slot.slot if repository.slot is not None else None
    facts = tuple(_facts(repository, slot, opened, marked) for slot in slots)
    revoked = tuple(sorted(repository.revoked()))
    problems += [f"{name}: {detail}" for name, detail in repository.revocation_problems]
    return Keyring(facts, epochs, _lacking(slots, epochs), revoked, tuple(problems))


def _epochs(repository: Repository, problems: list[str]) -> tuple[int, ...]:
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


def _reads(slot: Slot) -> set[int]:
    """The epochs that a slot reads; one that does not tell was made when there was one epoch."""
    return set(slot.reads or (1,)) if slot.role != WRITE else set()


def _lacking(slots: Iterable[Slot], epochs: Iterable[int]) -> tuple[str, ...]:
    wanted = set(epochs)
    return tuple(slot.slot for slot in slots if slot.role != WRITE and not wanted <= _reads(slot))


def find(slots: Iterable[Slot], text: str) -> Slot:
    """The slot that a label, an id or its unique prefix names. Raises `UsageError`."""
    labelled = [slot for slot in slots if slot.label == text]
    prefixed = [slot for slot in slots if len(text) >= _SHORTEST and slot.slot.startswith(text.lower())]
    found = labelled or prefixed
    if len(found) == 1:
        return found[0]
    if not found:
        raise UsageError(f"no key slot is called {text!r}", hint="imager key list shows them")
    raise UsageError(
        f"{text!r} may be any of {len(found)} key slots: {', '.join(slot.slot[:12] for slot in found[:8])}",
        hint="give more digits of the id",
    )


def _need_sealed(repository: Repository) -> None:
    if not repository.sealed:
        raise UsageError(
            "this repository is not encrypted: it has no keys",
            hint="make another one with imager init, and imager sync the sets over",
        )


def _need_full(repository: Repository) -> Secrets:
    _need_sealed(repository)
    if repository.secrets.role != FULL:
        raise WrongKey(
            f"this key has the role {repository.secrets.role}: it may not change who opens the repository",
            hint="use a key with the full role",
        )
    return repository.secrets


# --- adding ---------------------------------------------------------------------------------


def check_addition(
    repository: Repository, *, role: str = FULL, host: str | None = None, label: str = ""
) -> None:
    """Raises what `add` would, before a secret is asked for."""
    _need_full(repository)
    if role not in keys.ROLES:
        raise UsageError(f"unknown role {role!r}", hint=f"choose {', '.join(keys.ROLES)}")
    if (role == WRITE) != bool(host):
        raise UsageError(
            "a key of the role write is for the backups of one machine"
            if role == WRITE
            else "only a key of the role write is tied to a machine",
            hint="name it as the machine calls itself: --host NAME ('*': any machine, and any lineage)",
        )
    if len(label) > 255 or not (label.isprintable() or not label):
        raise UsageError("a label has up to 255 printable characters")
    if label and any(slot.label == label for slot in read_slots(repository)[0]):
        raise UsageError(f"there is a key slot called {label!r} already", hint="choose another label")


def add(
    repository: Repository, secret: Secret, *, role: str = FULL, host: str | None = None, label: str = ""
) -> Added:
    """Make a slot that opens the repository with `secret`.

    Role write: a key that can back up the machine `host` (`*`: any) and read nothing. Raises
    `WrongKey` where the open key is not full, `UsageError`, `StorageError`.
    """
    check_addition(repository, role=role, host=host, label=label)
    mine = repository.secrets
    label = label or (host if role == WRITE and host and host != writers.ANY_HOST else secret.kind)
    secrets = mine
    if role == READ:
        secrets = keys.for_reading(mine)
    elif role == WRITE:
        assert host is not None
        seed, writer = writers.certify(repository.id, mine.signing_seed, host=host, label=label)
        secrets = keys.for_writing(mine, seed, writer)
    slot, raw = keys.new_slot(repository.id, secrets, secret, label=label)
    repository.storage.create(SLOTS + slot, raw)
    writer_id = secrets.writer.writer if secrets.writer is not None else None
    return Added(slot, secret.kind, role, label, writer_id)


def change(repository: Repository, secret: Secret) -> tuple[Added, Removed]:
    """Put a slot with another secret in the place of the one that opened; role and label stay.

    Any role may: it is the holder's own. Raises `UsageError`, `StorageError`.
    """
    _need_sealed(repository)
    old = repository.slot
    if old is None:
        raise UsageError("it is not known which key slot opened")
    name, raw = keys.new_slot(repository.id, repository.secrets, secret, label=old.label)
    repository.storage.create(SLOTS + name, raw)
    writer = old.writer.writer if old.writer is not None else None
    _delete(repository, old)
    remaining = len(read_slots(repository)[0])
    gone = Removed(old.slot, old.kind, old.role, old.label, None, 0, remaining)
    return Added(name, secret.kind, old.role, old.label, writer), gone


@contextmanager
def recovery(repository: Repository, *, label: str = "") -> Iterator[Sheet]:
    """Make a recovery key and its slot. What goes wrong within the `with` takes the slot away again:
    a key that nobody has on paper shall not seem to be there. Raises what `add` does."""
    key = recovery_key.new()
    added = add(repository, keys.recovery(key), label=label)
    try:
        yield Sheet(
            recovery_key.encode(key),
            repository.config.repository,
            repository.storage.url,
            added.slot,
            now() / 1e6,
        )
    except BaseException:
        repository.storage.delete(SLOTS + added.slot)
        raise


# --- removing ---------------------------------------------------------------------------------


def remove(repository: Repository, text: str) -> Removed:
    """Remove the slot that `text` names. A slot of the role write: its writer is revoked first.

    Where no slot is left of a writer, its label or id names it too. Raises `UsageError` (no such slot; the
    last full one), `WrongKey`, `StorageError`.
    """
    secrets = _need_full(repository)
    slots, _, _ = read_slots(repository)
    try:
        slot = find(slots, text)
    except UsageError:
        writer = _writer_named(repository, text)
        if writer is None:
            raise
        kept = _revoke(repository, secrets, writer[0])
        return Removed(None, None, WRITE, writer[1], writer[0], kept, len(slots))
    revoked, kept, label = None, 0, slot.label
    if slot.writer is not None and writers.is_certified(repository.id, repository.verify_key, slot.writer):
        # The certificate's label, not the slot's: that one anybody could have changed.
        revoked, label = slot.writer.writer, slot.writer.label
        kept = _revoke(repository, secrets, revoked)
    _delete(repository, slot)
    remaining = len(read_slots(repository)[0])
    return Removed(slot.slot, slot.kind, slot.role, label, revoked, kept, remaining)


def _writer_named(repository: Repository, text: str) -> tuple[str, str] | None:
    """(id, label) of the writer that signed a set and is called so. Raises `UsageError` for several."""
    found: dict[str, str] = {}
    for manifest in imageset.list_sets(repository).sets:
        writer = manifest.public.writer
        if writer is not None and (
            writer.label == text or (len(text) >= _SHORTEST and writer.writer.startswith(text.lower()))
        ):
            found[writer.writer] = writer.label
    if len(found) > 1:
        raise UsageError(
            f"{text!r} may be any of {len(found)} writers: {', '.join(sorted(found)[:8])}",
            hint="give the id of the writer",
        )
    return next(iter(found.items()), None)


def _revoke(repository: Repository, secrets: Secrets, writer: str) -> int:
    """Let of a writer's sets only those count that are there now: how many. Durable when this returns."""
    if writer in repository.revoked():
        return len(repository.revoked()[writer])
    if not writers.is_writer_id(writer):
        raise IntegrityError("the key slot has a certificate of no writer")
    sets = imageset.list_sets(repository).sets
    mine = [
        one.digest for one in sets if one.public.writer is not None and one.public.writer.writer == writer
    ]
    raw = writers.new_revocation(repository.id, secrets.signing_seed, writer, mine)
    try:
        repository.storage.create(REVOKED + writer, raw)
    except AlreadyExists as error:
        raise UsageError(
            f"the revocation of writer {writer} is there already", hint="look at it with imager key list"
        ) from error
    repository.forget_revocations()
    return len(mine)


def _delete(repository: Repository, slot: Slot) -> None:
    """Delete a slot, unless it is the last full one that reads everything: see the module."""
    storage = repository.storage
    mark = f"{SLOTS}{slot.slot}.removing-{os.urandom(8).hex()}"
    storage.create(mark, b"")
    try:
        slots, marked, _ = read_slots(repository)
        epochs = set(_epochs(repository, []))
        whole = [
            one for one in slots if one.role == FULL and one.slot not in marked and epochs <= _reads(one)
        ]
        if not whole:
            raise UsageError(
                f"key slot {slot.slot[:8]} is the last full one that reads every key epoch, "
                "or the others are being removed",
                hint="add another one first: imager key add; imager key list shows what each can do",
            )
        storage.delete(SLOTS + slot.slot)
    except NotFound:
        pass  # another removal was faster
    except ImagerError:
        _take_back(repository, mark)
        raise
    marks = [(name, match[1]) for name in storage.list_names(SLOTS) if (match := _MARK.fullmatch(name))]
    there = set(Opening.slot_ids(storage))
    for name, marked_slot in marks:
        if marked_slot not in there:  # Ids are random: a slot that is gone never comes back.
            _take_back(repository, name)


def _take_back(repository: Repository, mark: str) -> None:
    try:
        repository.storage.delete(mark)
    except NotFound:
        pass  # another removal of the same slot cleared it away


# --- rotating -----------------------------------------------------------------------------------


def rotate(repository: Repository, secret: Secret | None) -> Rotated:
    """Begin a new key epoch: later sets are encrypted to it. `secret`: that of the slot that opened.

    The new private key goes into a new slot of the same secret, then the epoch is
    published, then the old slot goes. Raises `WrongKey`, `UsageError`, `StorageError`.
    """
    mine = _need_full(repository)
    old = repository.slot
    if old is None or secret is None:
        raise UsageError("it is not known which key slot opened")
    newest, public = repository.newest_epoch()
    same = _same_secret(repository, secret)
    if newest not in mine.epochs:
        # The rotation to it may have been this key's own, killed before the old slot went.
        begun = _begun_rotation(same, newest)
        if begun is None or keys.epoch_public(begun[1]) != public:
            raise WrongKey(
                f"this key does not read key epoch {newest}, so it cannot begin the next one",
                hint="use a key that reads every epoch: imager key list tells",
            )
        return _finish_rotation(repository, newest, begun[0], same)
    epoch = newest + 1
    name, private = _begun_rotation(same, epoch) or ("", os.urandom(32))
    if not name:
        # An epoch that this key has and the repository does not: its rotation lost a race.
        held = {number: key for number, key in mine.epochs.items() if number <= newest}
        secrets = Secrets(mine.id_key, mine.signing_seed, {**held, epoch: private})
        name, raw = keys.new_slot(repository.id, secrets, secret, label=old.label)
        repository.storage.create(SLOTS + name, raw)
    try:
        repository.storage.create(
            EPOCHS + keys.epoch_name(epoch),
            keys.new_epoch(repository.id, epoch, private, mine.signing_seed),
        )
    except AlreadyExists as error:
        repository.storage.delete(SLOTS + name)
        raise UsageError(
            f"key epoch {epoch} is there already: another rotation was faster",
            hint="see imager key list; rotate again where that is still needed",
        ) from error
    return _finish_rotation(repository, epoch, name, same)


def _finish_rotation(
    repository: Repository, epoch: int, name: str, same: Iterable[tuple[Slot, Secrets]]
) -> Rotated:
    """Remove the slots of the same secret that the new one replaces."""
    for slot, _ in same:
        if slot.slot != name:
            _delete(repository, slot)
    found = listing(repository)
    lacking = tuple(slot for slot in found.slots if slot.slot in found.lacking)
    return Rotated(epoch, name, lacking)


def _same_secret(repository: Repository, secret: Secret) -> list[tuple[Slot, Secrets]]:
    """The full slots that open with this secret: the one that did, and what a killed rotation left."""
    found: list[tuple[Slot, Secrets]] = []
    for slot in read_slots(repository)[0]:
        if slot.role != FULL or slot.kind != secret.kind:
            continue
        try:
            secrets = keys.open_slot(slot, secret)
        except IntegrityError:
            continue  # A damaged one is told by check, and removed by its id.
        if secrets is not None and keys.public_key(secrets.signing_seed) == repository.verify_key:
            found.append((slot, secrets))
    return found


def _begun_rotation(same: Iterable[tuple[Slot, Secrets]], epoch: int) -> tuple[str, bytes] | None:
    """(slot, private key) of a rotation to `epoch` that was killed before it published the epoch."""
    return next(((slot.slot, one.epochs[epoch]) for slot, one in same if epoch in one.epochs), None)
