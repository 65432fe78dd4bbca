"""The structure of a repository: every object that can be checked without reading the blocks.

Invariant: after `survey`, each object that is missing, damaged or in the
wrong place is among the problems or in `Survey.bad`; nothing is changed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from imager import _native
from imager.errors import IntegrityError
from imager.events import Reporter
from imager.repository import (
    absent,
    imageset,
    index,
    keys,
    references,
    sessions,
    suspicion,
    tombstones,
    writers,
)
from imager.repository.findings import Problem, Survey
from imager.repository.format import (
    DAMAGED,
    EPOCHS,
    FOOTER,
    FORGOTTEN,
    HEALED,
    INDEX,
    KIND_DATA,
    KIND_MAP,
    MAPS,
    MAX_PACK,
    MAX_SMALL_JSON,
    PACKS,
    PINS,
    SESSIONS,
    SLOTS,
    TRAILER_ENTRY,
    is_id,
    is_pack_name,
    numbered,
    pack_object,
    parse_session,
)
from imager.repository.frames import ends
from imager.repository.keyless import is_keyless
from imager.repository.missing import MISSING
from imager.repository.pages import BadPage, Seen, pages
from imager.repository.repository import Opening, Repository
from imager.storage.errors import Gone, NotFound, StorageError
from imager.units import count

_FOOTER = struct.Struct("<8sIIQQ")


UNANNOUNCED = "the announcement of an image set's writer is missing"
"What a sync leaves, too, that is killed between the two: nothing hangs on it."


def survey(repository: Repository, reporter: Reporter) -> Survey:
    """Check everything but the payloads of packs. Raises `StorageError` where the storage is gone."""
    reporter.phase("checking the structure", None)
    # Sets first: what they name was durable before them, so all of it shows in the later listings.
    listing = imageset.list_sets(repository)
    found = Survey(repository, reporter, listing, _native.Known(repository.names))
    _secrets(found)
    _sets(found)
    _sessions(found)
    _packs(found)
    _index(found)
    _maps(found)
    reporter.end()
    return found


def _secrets(found: Survey) -> None:
    repository = found.repository
    if not repository.sealed:
        return
    storage = repository.storage
    slots = Opening.slot_ids(storage)
    if not slots:
        lost = "no key slot is left: nothing can be opened without one"
        found.problems.append(Problem("slot", SLOTS, lost))
    for slot in slots:
        try:
            raw = storage.read(SLOTS + slot, 0, MAX_SMALL_JSON + 1)
            writer = keys.parse_slot(raw, slot, repository.id).writer
            if writer is not None and not writers.is_certified(repository.id, repository.verify_key, writer):
                raise IntegrityError(f"key slot {slot} has a certificate that this repository never gave")
        except (IntegrityError, NotFound) as error:
            found.problems.append(Problem("slot", SLOTS + slot, error.message))
    revoked = repository.revoked()
    for name, detail in repository.revocation_problems:
        found.problems.append(Problem("revocation", name, detail))
    if revoked:
        found.notes.append(f"{len(revoked)} writers are revoked: {', '.join(sorted(revoked))}")
    present = numbered(storage.list_names(EPOCHS))
    if not present and not repository.secrets.epochs:
        found.problems.append(
            Problem("epoch", EPOCHS, "no key epoch is left; backups need one, restores do not")
        )
    verify_key = bytes.fromhex(repository.config.verify_key)
    for number in sorted({*present, *repository.secrets.epochs}):
        name = keys.epoch_name(number)
        try:
            raw = storage.read(EPOCHS + name, 0, MAX_SMALL_JSON + 1)
            public = keys.parse_epoch(raw, name, repository.id, verify_key)[1]
            private = repository.secrets.epochs.get(number)
            if private is not None and keys.epoch_public(private) != public:
                raise IntegrityError(f"key epoch {name} is not the one whose private key the slot holds")
        except NotFound:
            found.problems.append(
                Problem("epoch", EPOCHS + name, "it is missing; backups need it, restores do not")
            )
        except IntegrityError as error:
            found.problems.append(Problem("epoch", EPOCHS + name, error.message))


def _sets(found: Survey) -> None:
    listing = found.listing
    for damaged in listing.problems:
        found.problems.append(Problem("set", f"sets/{damaged.id}", damaged.reason))
    left_out = absent.names(found.repository.storage)
    lacking = sorted(left_out - {manifest.id for manifest in listing.sets})
    if lacking:
        found.notes.append(f"{len(lacking)} image sets were left out of this copy: {', '.join(lacking[:3])}")
    forgotten = tombstones.digests(found.repository)
    for set_id, text in imageset.chain_problems(listing, forgotten, left_out):
        found.problems.append(Problem("chain", f"sets/{set_id}", text))
    for set_id in imageset.ahead(listing.sets):
        found.notes.append(
            f"image set {set_id} says that it was taken in the future: a wrong clock, or a forgery"
        )
    for text in suspicion.of_history(found.repository, listing.sets, listing.problems):
        found.problems.append(Problem("history", "the repository", text))
    _upkeep(found)


def _upkeep(found: Survey) -> None:
    """Tombstones, pins, and packs that are condemned."""
    repository = found.repository
    present = {manifest.id for manifest in found.listing.sets}
    for set_id in sorted(tombstones.forgotten_ids(repository)):
        try:
            tombstones.read_tombstone(repository, set_id)
        except IntegrityError as error:
            found.problems.append(Problem("tombstone", FORGOTTEN + set_id, error.message))
            continue
        if set_id in present:
            found.notes.append(f"image set {set_id} was to be forgotten and is still there: forget it again")
    for set_id in sorted(tombstones.pinned(repository)):
        try:
            tombstones.read_pin(repository, set_id)
        except (IntegrityError, NotFound) as error:
            found.problems.append(Problem("pin", PINS + set_id, error.message))
            continue
        if set_id not in present:
            found.notes.append(f"{PINS}{set_id} pins an image set that is not there")
    try:
        condemned = sessions.read_condemned(repository.storage, repository.config.repository)
    except IntegrityError as error:
        found.problems.append(Problem("condemned", "condemned/", error.message))
        return
    if condemned:
        packs = sum(len(one.packs) + len(one.maps) for one in condemned.values())
        found.notes.append(
            f"{count(packs, 'pack', 'is', 'are')} condemned: the next prune deletes what is, "
            "once older sessions have ended"
        )


def _sessions(found: Survey) -> None:
    storage, repository = found.repository.storage, found.repository.config.repository
    names = {name.removeprefix(SESSIONS) for name in storage.list_names(SESSIONS)}
    done = {manifest.id for manifest in found.listing.sets} | {item.id for item in found.listing.problems}
    for session in sorted(name for name in names if is_id(name)):
        try:
            raw = storage.read(SESSIONS + session, 0, MAX_SMALL_JSON + 1)
            value = parse_session(raw, session, repository)
        except NotFound:
            continue  # a backup that failed just now took it back
        except IntegrityError as error:
            found.problems.append(Problem("session", SESSIONS + session, error.message))
            continue
        if session not in done and session not in found.listing.aborted:
            found.notes.append(
                f"session {session} of {value.host} (process {value.pid}) has no image set: "
                f"its {value.kind} still runs, or it ended early"
            )
    # Where a set is being forgotten, its announcement goes first.
    for session in sorted(done - names - tombstones.forgotten_ids(found.repository)):
        found.problems.append(Problem("session", SESSIONS + session, UNANNOUNCED))


def _packs(found: Survey) -> None:
    repository = found.repository
    repository.packs_present()
    for kind, prefix in ((KIND_DATA, PACKS), (KIND_MAP, MAPS)):
        listed = {entry.name: entry.size for entry in repository.storage.list(prefix)}
        frames: list[tuple[int, str, int]] = []
        for name in repository.pack_names(kind):
            path = pack_object(kind, name)
            size = listed.pop(path, None)
            if size is None:
                continue  # written since the first listing
            found.sizes[path] = size
            number = repository.names.intern(name)
            if kind == KIND_MAP:
                found.maps.add(number)
            frames.append((number, path, size))
        for (number, _, _), problem in zip(frames, _frame_problems(repository, kind, frames), strict=True):
            if problem is not None:
                found.blame(number, problem)
        for path in sorted(listed):
            if not is_pack_name(path.rpartition("/")[2]):
                found.notes.append(f"{path} is no object of a repository")
            elif path != prefix + path[-64:-62] + "/" + path[-64:]:
                found.problems.append(Problem("pack", path, "it lies in the wrong folder"))
    for path in repository.storage.list_names(DAMAGED):
        if path.startswith((MISSING, HEALED)):
            continue
        name_text = path.rpartition("/")[2]
        if is_pack_name(name_text):
            number = repository.names.intern(bytes.fromhex(name_text))
            if path.removeprefix(DAMAGED) not in found.sizes:  # Else a repair was killed, or it is back.
                found.aside.add(number)
            if path.startswith(DAMAGED + MAPS):
                found.maps.add(number)


def _frame_problems(
    repository: Repository, kind: int, frames: list[tuple[int, str, int]]
) -> Iterator[str | None]:
    """What is wrong with each frame (pack number, object, size), in order; far ones are read at once."""
    if repository.storage.local:
        yield from (_frame_problem(repository, path, kind, size) for _, path, size in frames)
        return
    from imager.storage import spool

    for at in range(0, len(frames), 1024):
        yield from spool.run_all(
            [
                lambda path=path, size=size: _frame_problem(repository, path, kind, size)  # type: ignore[misc]
                for _, path, size in frames[at : at + 1024]
            ]
        )


def _frame_problem(repository: Repository, path: str, kind: int, size: int) -> str | None:
    """What is wrong with a pack's header, footer or size."""
    if size > MAX_PACK:
        return "it is larger than a pack can be"
    try:
        header, footer = ends(repository.storage, path, size)
        _native.pack_envelopes(header, repository.id)
    except NotFound:
        return "it is missing"
    except _native.DamagedError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    if header[10] != kind:
        return "it is a pack of another kind"
    if len(footer) < FOOTER:
        return "it is cut short"
    magic, records, entry, trailer, check = _FOOTER.unpack(footer)
    if magic != b"IMGRTAIL" or check != _native.xxh3(footer[:24]):
        return "its end is damaged, or it is cut short"
    if entry != TRAILER_ENTRY or trailer + TRAILER_ENTRY * records + FOOTER != size:
        return "its size is not the one that it was written with"
    return None


def _index(found: Survey) -> None:
    for name in index.segment_names(found.repository):
        try:
            index.load_one(found.repository, found.known, name)
        except NotFound:
            continue
        except Gone:
            raise
        except (IntegrityError, StorageError) as error:
            found.problems.append(Problem("index", name, error.message))
    for name in found.repository.storage.list_names(INDEX):
        if not is_pack_name(name.removeprefix(INDEX)):
            found.notes.append(f"{name} is no object of a repository")


def _maps(found: Survey) -> None:
    """Open every page that a set refers to, once, and see that every pack named is there and of its kind."""
    repository = found.repository
    unread = [manifest for manifest in found.listing.sets if manifest.body is None]
    if is_keyless(repository):
        found.notes.append(references.UNTOLD)
    elif unread:
        which = f"{len(unread)} of {len(found.listing.sets)} image sets cannot be read with this key"
        found.notes.append(f"{which}, and were checked as without one. {references.UNTOLD}")
    references.survey_maps(found, unread)
    _pages(found)
    for number in found.used:
        name = repository.names.name(number)
        if name is None or number in found.bad or number in found.aside:
            continue
        path = pack_object(KIND_MAP if number in found.maps else KIND_DATA, name)
        if path not in found.sizes and not repository.storage.exists(path):
            found.blame(number, "it is missing")
    orphans = sum(
        1 for path in found.sizes if repository.names.intern(bytes.fromhex(path[-64:])) not in found.used
    )
    if orphans:
        found.notes.append(
            f"{count(orphans, 'pack', 'belongs', 'belong')} to no image set: "
            "left by backups that ended early, or still being made"
        )


def _pages(found: Survey) -> None:
    seen: Seen = set()
    for manifest in found.listing.sets:
        for image in manifest.images if manifest.body is not None else ():
            for page in pages(found.repository, image, seen):
                found.pages += 1
                found.used.add(page.pack)
                if isinstance(page, BadPage):
                    found.maps.add(page.pack)
                    _blame_page(found, page)
                elif page.level == 0:
                    # What prune has moved is where the index says.
                    page.slots.relocate(found.repository.names, found.known)
                    found.used.update(page.slots.packs())


def _blame_page(found: Survey, page: BadPage) -> None:
    name = found.repository.names.name(page.pack)
    if name is not None and page.pack not in found.aside and pack_object(KIND_MAP, name) not in found.sizes:
        found.blame(page.pack, "it is missing")
    elif page.pack not in found.aside:
        found.blame(page.pack, f"a page of a block map is damaged: {page.reason}")
