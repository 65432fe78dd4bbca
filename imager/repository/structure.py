"""The structure of a repository: every object that can be checked without reading the blocks.

Invariant: after `survey`, each object that is missing, damaged or in the
wrong place is among the problems or in `Survey.bad`; nothing is changed.
"""

from __future__ import annotations

import os
import struct

from imager import _native
from imager.errors import IntegrityError
from imager.events import Reporter
from imager.repository import imageset, index, keys, writers
from imager.repository.findings import Problem, Survey
from imager.repository.format import (
    DAMAGED,
    EPOCHS,
    FOOTER,
    INDEX,
    KIND_DATA,
    KIND_MAP,
    MAPS,
    MAX_SMALL_JSON,
    PACKS,
    SESSIONS,
    SLOTS,
    TRAILER_ENTRY,
    SessionObject,
    is_id,
    is_pack_name,
    numbered,
    pack_object,
    parse,
    shape,
)
from imager.repository.manifest import Manifest
from imager.repository.missing import MISSING
from imager.repository.packs import read_header
from imager.repository.pages import BadPage, Seen, pages
from imager.repository.publicmap import PublicPage, Target, walk
from imager.repository.repository import Opening, Repository
from imager.repository.witness import Witness
from imager.storage.errors import Gone, NotFound, StorageError

_FOOTER = struct.Struct("<8sIIQQ")


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
    for slot in Opening.slot_ids(storage):
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
    for set_id, text in imageset.chain_problems(listing):
        found.problems.append(Problem("chain", f"sets/{set_id}", text))
    for set_id in imageset.ahead(listing.sets):
        found.notes.append(
            f"image set {set_id} says that it was taken in the future: a wrong clock, or a forgery"
        )
    witness = Witness(found.repository.id)
    for text in witness.observe(listing.sets, damaged=[damaged.id for damaged in listing.problems]):
        found.problems.append(Problem("history", "the repository", text))


def _sessions(found: Survey) -> None:
    storage, repository = found.repository.storage, found.repository.config.repository
    names = {name.removeprefix(SESSIONS) for name in storage.list_names(SESSIONS)}
    done = {manifest.id for manifest in found.listing.sets} | {item.id for item in found.listing.problems}
    for session in sorted(name for name in names if is_id(name)):
        what = f"session {session}"
        try:
            raw = storage.read(SESSIONS + session, 0, MAX_SMALL_JSON + 1)
            value = shape(parse(raw, what), SessionObject, what)
            if value.session != session or value.repository != repository:
                raise IntegrityError(f"{what} is damaged: it belongs to another name or repository")
        except NotFound:
            continue  # a backup that failed just now took it back
        except IntegrityError as error:
            found.problems.append(Problem("session", SESSIONS + session, error.message))
            continue
        if session not in done and session not in found.listing.aborted:
            found.notes.append(
                f"session {session} of {value.host} (process {value.pid}) has no image set: "
                "its backup still runs, or it ended early"
            )
    for session in sorted(done - names):
        found.problems.append(
            Problem("session", SESSIONS + session, "the announcement of an image set's writer is missing")
        )


def _packs(found: Survey) -> None:
    repository = found.repository
    repository.packs_present()
    for kind, prefix in ((KIND_DATA, PACKS), (KIND_MAP, MAPS)):
        listed = {entry.name: entry.size for entry in repository.storage.list(prefix)}
        for name in repository.pack_names(kind):
            path = pack_object(kind, name)
            size = listed.pop(path, None)
            if size is None:
                continue  # written since the first listing
            found.sizes[path] = size
            number = repository.names.intern(name)
            if kind == KIND_MAP:
                found.maps.add(number)
            problem = _frame_problem(repository, path, kind, size)
            if problem is not None:
                found.blame(number, problem)
        for path in sorted(listed):
            if not is_pack_name(path.rpartition("/")[2]):
                found.notes.append(f"{path} is no object of a repository")
            elif path != prefix + path[-64:-62] + "/" + path[-64:]:
                found.problems.append(Problem("pack", path, "it lies in the wrong folder"))
    for path in repository.storage.list_names(DAMAGED):
        if path.startswith(MISSING):
            continue
        name_text = path.rpartition("/")[2]
        if is_pack_name(name_text):
            number = repository.names.intern(bytes.fromhex(name_text))
            found.aside.add(number)
            if path.startswith(DAMAGED + MAPS):
                found.maps.add(number)


def _frame_problem(repository: Repository, path: str, kind: int, size: int) -> str | None:
    """What is wrong with a pack's header, footer or size."""
    try:
        fd = repository.storage.open(path)
    except NotFound:
        return "it is missing"
    try:
        header = read_header(fd)
        _native.pack_envelopes(header, repository.id)
        footer = os.pread(fd, FOOTER, max(0, size - FOOTER))
    except _native.DamagedError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    finally:
        os.close(fd)
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
    seen: Seen = set()
    followed: set[Target] = set()
    unread = 0
    for manifest in found.listing.sets:
        if manifest.body is None:
            unread += 1
            _follow(found, manifest, followed)
            continue
        for image in manifest.images:
            for page in pages(repository, image, seen):
                found.pages += 1
                found.used.add(page.pack)
                if isinstance(page, BadPage):
                    found.maps.add(page.pack)
                    _blame_page(found, page)
                elif page.level == 0:
                    found.used.update(page.slots.packs())
    if unread:
        found.notes.append(
            f"{unread} of {len(found.listing.sets)} image sets cannot be read with this key: checked were "
            "their signatures, and that the packs which they name are there; pages and blocks were not opened"
        )
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
            f"{orphans} packs belong to no image set: left by backups that ended early, or still being made"
        )


def _follow(found: Survey, manifest: Manifest, followed: set[Target]) -> None:
    """What a set refers to by the public parts of its pages, for a key that cannot open them."""
    names = found.repository.names
    for root in manifest.public.roots:
        if root is None:
            continue
        for page in walk(found.repository, root, followed):
            found.pages += 1
            if isinstance(page, PublicPage):
                number = names.intern(page.place.pack)
                if page.level == 0:
                    found.used.update({names.intern(target.pack) for target in page.targets})
            else:
                place, reason = page
                number = names.intern(place.pack)
                lost = pack_object(KIND_MAP, place.pack) not in found.sizes
                found.blame(
                    number, "it is missing" if lost else f"a page of a block map is damaged: {reason}"
                )
            found.used.add(number)
            found.maps.add(number)


def _blame_page(found: Survey, page: BadPage) -> None:
    name = found.repository.names.name(page.pack)
    if name is not None and page.pack not in found.aside and pack_object(KIND_MAP, name) not in found.sizes:
        found.blame(page.pack, "it is missing")
    elif page.pack not in found.aside:
        found.blame(page.pack, f"a page of a block map is damaged: {page.reason}")
