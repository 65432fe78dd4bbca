"""The small objects that a copy needs besides packs and sets: keys, marks, tombstones, announcements.

Invariant: nothing is copied that explains away what the copy still has, nor
anything whose signature or form is not this repository's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from imager.errors import IntegrityError
from imager.repository import keys, manifest, tombstones, writers
from imager.repository.format import (
    EPOCHS,
    FORGOTTEN,
    REVOKED,
    SESSIONS,
    SETS,
    SLOTS,
    is_id,
    parse_session,
)
from imager.repository.manifest import MAX_MANIFEST
from imager.repository.repository import Repository
from imager.storage.base import Storage
from imager.storage.errors import NotFound
from imager.units import count

if TYPE_CHECKING:
    from imager.repository.sync_plan import Planning, Wishes


def not_forgotten(planning: Planning, new: list[str], wishes: Wishes) -> tuple[list[str], list[str]]:
    """The new sets without those that were forgotten in the target on purpose, and a note of them."""
    if planning.creates or wishes.sets:
        return new, []
    forgotten = {name.removeprefix(FORGOTTEN) for name in planning.target.list_names(FORGOTTEN)}
    kept = [set_id for set_id in new if set_id not in forgotten]
    if len(kept) == len(new):
        return new, []
    number = count(len(new) - len(kept), "set", "was forgotten", "were forgotten")
    return kept, [f"{number} in the copy and not copied again; --set ID copies one all the same"]


def lacking(planning: Planning, new: Sequence[str], present: Sequence[str]) -> tuple[list[str], set[str]]:
    """Small objects that the target lacks, in the order of copying; ids of sets with tombstones."""
    source, target = planning.source, planning.target
    found: list[str] = []
    for prefix in (SLOTS, EPOCHS, REVOKED):
        if planning.creates or not append_only(target):
            found += _missing(planning, prefix)
    marks = {name.removeprefix(SETS) for name in source.storage.list_names(SETS)} - set(planning.publics)
    for set_id in sorted(one for one in marks - planning.target_sets if is_id(one)):
        try:
            raw = source.storage.read(SETS + set_id, 0, MAX_MANIFEST + 1)
        except NotFound:
            continue  # A set that came after the others were read, and was forgotten at once.
        if manifest.is_abort_mark(raw):
            found.append(SETS + set_id)
    there = set() if planning.creates else set(target.list_names(SESSIONS))
    announced = set(source.storage.list_names(SESSIONS))
    found += [SESSIONS + one for one in (*new, *present) if SESSIONS + one in announced - there]
    # A tombstone explains a gap. What the copy still has is not forgotten there; nor is in the source
    # what that still has: whoever was to forget it was stopped in the middle.
    there = set() if planning.creates else set(target.list_names(FORGOTTEN))
    tombs = {name for name in source.storage.list_names(FORGOTTEN) if is_id(name.removeprefix(FORGOTTEN))}
    if append_only(target):
        tombs = set()  # A mark that they are absent does as well.
    kept = {FORGOTTEN + one for one in (*new, *planning.target_sets, *planning.publics)}
    found += sorted(tombs - there - kept)
    return found, {name.removeprefix(FORGOTTEN) for name in (tombs - kept) | there}


def append_only(target: Storage) -> bool:
    """Whether a place takes nothing that tells who may read it, and what counts, once it is a repository."""
    return bool(getattr(target, "append_only", False))


def _missing(planning: Planning, prefix: str) -> list[str]:
    """What the source has below a prefix and the target lacks."""
    there = set() if planning.creates else set(planning.target.list_names(prefix))
    return sorted(set(planning.source.storage.list_names(prefix)) - there)


def notes(planning: Planning) -> Iterable[str]:
    """What a person needs to know of the keys and sets at both ends."""
    if planning.creates:
        return
    if append_only(planning.target):
        kinds = (("key slots", SLOTS), ("key epochs", EPOCHS), ("revocations", REVOKED))
        left = [f"{len(names)} {what}" for what, prefix in kinds if (names := _missing(planning, prefix))]
        if left:
            yield (
                f"{', '.join(left)} of the source are not copied: the copy is served append-only; "
                "sync to it once where it is, or over a key that is not so restricted"
            )
    elif added := [name for name in _missing(planning, SLOTS) if is_id(name.removeprefix(SLOTS))]:
        ids = ", ".join(name.removeprefix(SLOTS)[:8] for name in added)
        yield (
            f"the copy gets {len(added)} key slots that it lacked: {ids}; if one was removed there on "
            "purpose, remove it at both ends"
        )
    slots = set(planning.target.list_names(SLOTS)) - set(planning.source.storage.list_names(SLOTS))
    if slots:
        yield (
            f"{len(slots)} key slots of the copy are gone in the source: who has their secret "
            "can still open the copy; remove them there, too"
        )
    foreign = planning.target_sets - {
        name.removeprefix(SETS) for name in planning.source.storage.list_names(SETS)
    }
    if foreign:
        number = count(len(foreign), "set", "of the copy is", "of the copy are")
        yield f"{number} gone in the source; what the copy has stays"


def verify_small(source: Repository, name: str, raw: bytes) -> None:
    """Check a small object before it is copied, whatever the source says it is. Raises `IntegrityError`."""
    own = name.rpartition("/")[2]
    if name.startswith(SLOTS):
        keys.parse_slot(raw, own, source.id)
    elif name.startswith(EPOCHS):
        keys.parse_epoch(raw, own, source.id, bytes.fromhex(source.config.verify_key))
    elif name.startswith(REVOKED):
        writers.parse_revocation(raw, own, source.id, bytes.fromhex(source.config.verify_key))
    elif name.startswith(FORGOTTEN):
        tombstones.parse_tombstone(source, own, raw)
    elif name.startswith(SESSIONS):
        parse_session(raw, own, source.config.repository)
    elif name.startswith(SETS) and manifest.is_abort_mark(raw):
        if manifest.parse_abort_mark(raw).session != own:
            raise IntegrityError(f"the mark of an aborted session in {name} is that of another one")
    else:
        raise IntegrityError(f"{name} is nothing that a copy needs")
