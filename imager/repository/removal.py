"""Taking a key's access away.

Invariant: at every moment there is a slot of the role full whose key reads every epoch
that the repository has. It holds against two removals at once as well: each leaves its
mark first, then looks for a full slot that nobody's mark is on, and only then deletes.

The order of it, which `tests/unit/repository/test_keyring.py` runs in every interleaving:

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

from msgspec import Struct

from imager.errors import ImagerError, IntegrityError, UsageError
from imager.repository import imageset, tombstones, writers
from imager.repository.format import REVOKED, SLOTS, Slot
from imager.repository.keys import FULL, WRITE, Secrets
from imager.repository.keyslots import MARK, SHORTEST, epochs_of, find, need_full, read_slots, reads_of
from imager.repository.repository import Opening, Repository
from imager.storage.errors import AlreadyExists, NotFound


class Removed(Struct, frozen=True):
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


def remove(repository: Repository, text: str) -> Removed:
    """Remove the slot that `text` names. A slot of the role write: its writer is revoked first.

    Where no slot is left of a writer, its label or id names it too. Raises `UsageError` (no such slot; the
    last full one), `WrongKey`, `IntegrityError` (it cannot be told whose slot it is), `StorageError`.
    """
    secrets = need_full(repository)
    slots, _, _ = read_slots(repository)
    try:
        slot = find(slots, text)
    except UsageError:
        writer = _writer_named(repository, text)
        if writer is None:
            raise
        kept = _revoke(repository, secrets, writer[0])
        return Removed(None, None, WRITE, writer[1], writer[0], kept, len(slots))
    revoked, kept = None, 0
    if slot.role == WRITE:
        revoked = _writer_of(repository, slot)
        kept = _revoke(repository, secrets, revoked)
    delete_slot(repository, slot)
    remaining = len(read_slots(repository)[0])
    return Removed(slot.slot, slot.kind, slot.role, slot.label, revoked, kept, remaining)


def _writer_of(repository: Repository, slot: Slot) -> str:
    """The writer that a slot of role write is of. Raises `IntegrityError`, `UsageError`.

    The certificate in it is in the open: who can write to the storage can put that of another writer there,
    who would then be revoked instead.
    """
    writer = slot.writer
    genuine = writer is not None and writers.is_certified(repository.id, repository.verify_key, writer)
    if writer is not None and genuine and writer.label == slot.label:
        return writer.writer
    named = _writer_named(repository, slot.label)
    if named is None:
        raise IntegrityError(
            f"key slot {slot.slot} is damaged: its certificate is that of another writer, or none; nothing "
            "was removed, for it cannot be told whom to revoke",
            hint=f"take {SLOTS}{slot.slot} from a copy of the repository; or delete it, and once its writer "
            "has signed an image set, revoke it by its label: imager key remove LABEL",
        )
    return named[0]


def _writer_named(repository: Repository, text: str) -> tuple[str, str] | None:
    """(id, label) of the writer that signed a set and is called so. Raises `UsageError` for several."""
    found: dict[str, str] = {}
    for manifest in imageset.list_sets(repository).sets:
        writer = manifest.public.writer
        if writer is not None and (
            writer.label == text or (len(text) >= SHORTEST and writer.writer.startswith(text.lower()))
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
    sets = imageset.list_sets(repository).sets
    mine = [
        one.digest for one in sets if one.public.writer is not None and one.public.writer.writer == writer
    ]
    if writer in repository.revoked():
        return len(mine)
    # A copy may still have what was forgotten here: it counts there as before.
    forgotten = tombstones.all_digests(repository)
    raw = writers.new_revocation(repository.id, secrets.signing_seed, writer, [*mine, *forgotten])
    try:
        repository.storage.create(REVOKED + writer, raw)
    except AlreadyExists as error:
        raise UsageError(
            f"the revocation of writer {writer} is there already", hint="look at it with imager key list"
        ) from error
    repository.forget_revocations()
    return len(mine)


def delete_slot(repository: Repository, slot: Slot) -> None:
    """Delete a slot, unless it is the last full one that reads everything: see the module."""
    storage = repository.storage
    mark = f"{SLOTS}{slot.slot}.removing-{os.urandom(8).hex()}"
    storage.create(mark, b"")
    try:
        slots, marked, _ = read_slots(repository)
        epochs = set(epochs_of(repository, []))
        whole = [
            one for one in slots if one.role == FULL and one.slot not in marked and epochs <= reads_of(one)
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
    marks = [(name, match[1]) for name in storage.list_names(SLOTS) if (match := MARK.fullmatch(name))]
    there = set(Opening.slot_ids(storage))
    for name, marked_slot in marks:
        if marked_slot not in there:  # Ids are random: a slot that is gone never comes back.
            _take_back(repository, name)


def _take_back(repository: Repository, mark: str) -> None:
    try:
        repository.storage.delete(mark)
    except NotFound:
        pass  # another removal of the same slot cleared it away
