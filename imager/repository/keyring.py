"""New keys for an open repository: adding, changing, and a new epoch.

Invariant: what replaces something is durable before that goes; and a private key is in a
slot before anything is encrypted to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from msgspec import Struct

from imager.errors import IntegrityError, UsageError, WrongKey
from imager.repository import keys, recovery_key, writers
from imager.repository.format import EPOCHS, SLOTS, Slot, now
from imager.repository.keys import FULL, READ, WRITE, Secret, Secrets
from imager.repository.keyslots import SlotFacts, listing, need_full, need_sealed, read_slots
from imager.repository.recovery_sheet import Sheet
from imager.repository.removal import Removed, delete_slot
from imager.repository.repository import Repository
from imager.storage.errors import AlreadyExists


class Added(Struct, frozen=True):
    """A slot that was made."""

    slot: str
    kind: str
    role: str
    label: str
    writer: str | None = None


class Rotated(Struct, frozen=True):
    """A new key epoch. `slot`: the slot that holds its private key now; `lacking`: those that do not."""

    epoch: int
    slot: str
    lacking: tuple[SlotFacts, ...]


# --- adding ---------------------------------------------------------------------------------


def check_addition(
    repository: Repository, *, role: str = FULL, host: str | None = None, label: str = ""
) -> None:
    """Raises what `add` would, before a secret is asked for."""
    need_full(repository)
    _refuse_stray_epochs(repository)
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


def check_change(repository: Repository) -> Slot:
    """The slot that `change` would replace. Raises what it would, before a secret is asked for."""
    need_sealed(repository)
    _refuse_stray_epochs(repository)
    old = repository.slot
    if old is None:
        raise UsageError("it is not known which key slot opened")
    if old.kind == "recovery":
        raise UsageError(
            "the recovery key opened the repository, and changing it would void its sheet",
            hint="make a new way in with imager key add, or another sheet with imager key export",
        )
    return old


def change(repository: Repository, secret: Secret) -> tuple[Added, Removed]:
    """Put a slot with another secret in the place of the one that opened; role and label stay.

    Any role may: it is the holder's own. Raises `UsageError`, `StorageError`.
    """
    old = check_change(repository)
    name, raw = keys.new_slot(repository.id, repository.secrets, secret, label=old.label)
    repository.storage.create(SLOTS + name, raw)
    writer = old.writer.writer if old.writer is not None else None
    delete_slot(repository, old)
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


# --- rotating -----------------------------------------------------------------------------------


def rotate(repository: Repository, secret: Secret | None) -> Rotated:
    """Begin a new key epoch: later sets are encrypted to it. `secret`: that of the slot that opened.

    The new private key goes into a new slot of the same secret, then the epoch is
    published, then the old slot goes. Raises `WrongKey`, `UsageError`, `IntegrityError` (somebody put
    another object in the epoch's place), `StorageError`.
    """
    mine = need_full(repository)
    old = repository.slot
    if old is None or secret is None:
        raise UsageError("it is not known which key slot opened")
    newest, public = repository.newest_epoch()
    same = _same_secret(repository, secret)
    if newest not in mine.epochs or keys.epoch_public(mine.epochs[newest]) != public:
        # The rotation to it may have been this key's own, killed before the old slot went. Or this slot is
        # what is left of one that lost a race: what it has for this epoch, the repository never used.
        begun = _begun_rotation(same, newest, public)
        if begun is None:
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
        try:
            published = repository.epoch(epoch)
        except IntegrityError:
            repository.storage.delete(SLOTS + name)
            raise
        if published == keys.epoch_public(private):
            # Another rotation of this very secret has published it: the slot holds its only private key.
            return _finish_rotation(repository, epoch, name, same)
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
            delete_slot(repository, slot)
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


def _begun_rotation(
    same: Iterable[tuple[Slot, Secrets]], epoch: int, public: bytes | None = None
) -> tuple[str, bytes] | None:
    """(slot, private key) of a rotation to `epoch` that was killed; `public`: the epoch that it published."""
    held = ((slot.slot, one.epochs[epoch]) for slot, one in same if epoch in one.epochs)
    return next((one for one in held if public in (None, keys.epoch_public(one[1]))), None)


def _refuse_stray_epochs(repository: Repository) -> None:
    """Raises `WrongKey` where a slot made of this key would claim an epoch that it does not read."""
    for number in repository.secrets.epochs:
        repository.refuse_stray_epoch(number)
