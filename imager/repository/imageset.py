"""Which image sets there are, and which one a person means.

Invariant: a damaged manifest never hides the healthy ones; and a set is
found by a text either without doubt, or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from datetime import datetime, timedelta, timezone

from msgspec import Struct

from imager import _native
from imager.errors import ImagerError, IntegrityError, NoRepository, UsageError, WrongKey
from imager.repository.format import (
    MAX_SMALL_JSON,
    SESSIONS,
    SETS,
    is_id,
    lineage_id,
    now,
    parse_session,
)
from imager.repository.manifest import (
    MAX_MANIFEST,
    Body,
    Image,
    Manifest,
    Previous,
    Public,
    Root,
    decode,
    encode,
    is_abort_mark,
    is_sealed,
    parse_public,
    root_level,
)
from imager.repository.repository import Repository
from imager.repository.writers import ANY_HOST
from imager.storage.errors import NotFound
from imager.units import format_time

__all__ = [
    "Body", "Damaged", "Head", "Image", "Listing", "Manifest", "NoSuchSet", "Previous", "Public", "Root",
    "Selector", "ahead", "chain_problems", "check_name", "decode", "encode", "heads", "latest_of",
    "list_sets", "own_lineages", "parse_time", "read_set", "resolve", "root_level", "select_image",
    "split_selector", "this_host",
]  # fmt: skip

_TIME = r"(\d{4}-\d\d-\d\d)(?:[T ](\d\d:\d\d)(:\d\d)?(\.\d{1,6})?)?(Z|[+-]\d\d:?\d\d)?"
_SELECTOR = rf"(?P<set>[^@:]+(?:@(?:{_TIME}|[^:]*))?)(?::(?P<disk>[^:]+)(?::(?P<part>\d+))?)?"
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_UNITS = {False: timedelta(days=1), True: timedelta(minutes=1)}
_HEX = frozenset("0123456789abcdef")
_AT_ONCE = 64
"Manifests of a far storage that are held at once."


class NoSuchSet(ImagerError):
    """No image set fits the text."""

    kind = "no-such-set"


class Damaged(Struct, frozen=True):
    """A manifest that cannot be used, and why."""

    id: str
    reason: str


class Head(Struct, frozen=True):
    """What a set's public part says, its seal not yet checked: enough to choose, not to trust."""

    id: str
    created: int
    lineage: str
    sequence: int
    digest: bytes
    previous: str | None = None


class Listing(Struct, frozen=True):
    """All image sets, oldest first; the damaged ones; ids of aborted sessions."""

    sets: tuple[Manifest, ...]
    problems: tuple[Damaged, ...]
    aborted: tuple[str, ...]


class Selector(Struct, frozen=True):
    """`SET`, `SET:DISK` or `SET:DISK:N` taken apart."""

    set: str
    disk: str | None = None
    partition: int | None = None


def this_host() -> str:
    """The name that lineages of this machine have."""
    return os.uname().nodename


def own_lineages(repository: Repository, names: Iterable[str]) -> dict[str, str]:
    """Lineage ids of this machine's lineages of these names: a key that cannot read finds sets by them."""
    key = repository.secrets.id_key
    return {lineage_id(key, this_host(), name).hex(): name for name in names}


def check_name(name: str) -> str:
    """`name` if a lineage or disk can have it. Raises `UsageError`."""
    if not name or len(name) > 255 or not name.isprintable() or name != name.strip():
        raise UsageError(f"not a name: {name!r}", hint="choose up to 255 printable characters")
    if "@" in name or ":" in name or name.startswith("-") or name == "latest" or is_id(name):
        raise UsageError(
            f"an image set cannot be called {name!r}",
            hint="'@' and ':' have a meaning of their own, as have 'latest', a leading '-', and ids",
        )
    return name


# --- reading ---------------------------------------------------------------------------


def raw_sets(repository: Repository) -> Iterable[tuple[str, bytes]]:
    """(id, bytes) of what lies at each set's place: manifests and abort marks. Raises `StorageError`."""
    storage = repository.storage
    # What has no id for a name is not ours: something a file manager left, say.
    ids = [one for name in storage.list_names(SETS) if is_id(one := name.removeprefix(SETS))]

    def read(set_id: str) -> tuple[str, bytes] | None:
        try:
            return set_id, storage.read(SETS + set_id, 0, MAX_MANIFEST + 1)
        except NotFound:
            return None  # deleted since it was listed

    if storage.local:
        yield from filter(None, map(read, ids))
        return
    from imager.storage import spool

    for at in range(0, len(ids), _AT_ONCE):
        batch = ids[at : at + _AT_ONCE]
        yield from filter(None, spool.run_all([lambda one=one: read(one) for one in batch]))  # type: ignore[misc]


def heads(repository: Repository, *, sealed: bool = False) -> tuple[list[Head], list[Damaged]]:
    """What is public of all sets, oldest first, and the damaged ones. Raises `StorageError`.

    Quick: nothing is decrypted, and no signature is checked unless `sealed`; `read_head` the one that
    counts. What is kept of a set takes some 400 bytes, however large its manifest is.
    """
    found: list[Head] = []
    damaged: list[Damaged] = []
    for set_id, raw in raw_sets(repository):
        if is_abort_mark(raw):
            continue
        try:
            public = parse_public(raw, set_id, repository.config.repository)
        except IntegrityError as error:
            damaged.append(Damaged(set_id, error.message))
            continue
        if sealed and not is_sealed(repository, raw):
            damaged.append(Damaged(set_id, "its manifest's seal is not by this repository"))
            continue
        previous = public.previous.set if public.previous else None
        digest = _native.blake3(raw)
        found.append(Head(set_id, public.created, public.lineage, public.sequence, digest, previous))
    found.sort(key=lambda head: (head.created, head.id))
    return found, damaged


def list_sets(repository: Repository) -> Listing:
    """Every image set, its seal checked. Damaged ones are reported, not fatal. Raises `StorageError`."""
    sets: list[Manifest] = []
    damaged: list[Damaged] = []
    aborted: list[str] = []
    for set_id, raw in raw_sets(repository):
        if is_abort_mark(raw):
            aborted.append(set_id)
            continue
        try:
            sets.append(decode(repository, set_id, raw))
        except (IntegrityError, NoRepository) as error:
            damaged.append(Damaged(set_id, error.message))
    sets.sort(key=lambda manifest: (manifest.created, manifest.id))
    damaged.sort(key=lambda problem: problem.id)
    return Listing(tuple(sets), tuple(damaged), tuple(sorted(aborted)))


def read_set(repository: Repository, set_id: str) -> Manifest:
    """One set by its full id. Raises `NoSuchSet`, `IntegrityError`, `StorageError`."""
    try:
        raw = repository.storage.read(SETS + set_id, 0, MAX_MANIFEST + 1)
    except NotFound as error:
        raise NoSuchSet(f"there is no image set {set_id}", hint="imager list shows what there is") from error
    if is_abort_mark(raw):
        raise NoSuchSet(f"there is no image set {set_id}: its backup was aborted")
    return decode(repository, set_id, raw)


def read_head(repository: Repository, head: Head) -> Manifest:
    """The set of which a head was read. Raises as `read_set`, and where it is another than it was then."""
    manifest = read_set(repository, head.id)
    if manifest.digest != head.digest:
        raise IntegrityError(f"the manifest of image set {head.id} is another than a moment ago")
    return manifest


def latest_of(
    repository: Repository, lineage: bytes, known: Iterable[Head] | None = None, host: str | None = None
) -> tuple[Manifest | None, list[Damaged]]:
    """The newest whole set of a lineage, and the newer ones that are damaged. Raises `StorageError`.

    `host`: the machine whose lineage it is, so that a set which another one's key signed is no part of it.
    """
    text = lineage.hex()
    found = heads(repository)[0] if known is None else known
    damaged: list[Damaged] = []
    for head in sorted((head for head in found if head.lineage == text), key=_order, reverse=True):
        try:
            manifest = read_head(repository, head)
        except NoSuchSet:
            continue  # forgotten since
        except (IntegrityError, NoRepository) as error:
            damaged.append(Damaged(head.id, error.message))
            continue
        writer = manifest.public.writer
        if writer is None or host is None or writer.host in (ANY_HOST, host):
            return manifest, damaged
        damaged.append(
            Damaged(head.id, f"it is signed by the key of {writer.label}, which is not this host's")
        )
    return None, damaged


def _order(head: Head) -> tuple[int, int, str]:
    return head.sequence, head.created, head.id


def chain_problems(
    listing: Listing,
    forgotten: Callable[[str], str | None] = lambda _: None,
    absent: Collection[str] = (),
) -> list[tuple[str, str]]:
    """Where the chain of a lineage is broken: (set id, what is wrong).

    `forgotten`: gives the digest of a set that was forgotten on purpose; asked only where one is missing.
    `absent`: sets that whoever made this copy left out on purpose.
    """
    sets = {manifest.id: manifest for manifest in listing.sets}
    unusable = {problem.id for problem in listing.problems}
    problems: list[tuple[str, str]] = []
    for manifest in listing.sets:
        previous = manifest.previous
        if previous is None or previous.set in unusable:
            continue  # A damaged predecessor is a problem of its own.
        before = sets.get(previous.set)
        if before is None and (previous.set in absent or forgotten(previous.set) == previous.digest):
            continue
        if before is None:
            problems.append((manifest.id, f"the image set before it, {previous.set}, is missing"))
        elif before.digest.hex() != previous.digest:
            problems.append((manifest.id, f"the image set before it, {previous.set}, is another than it was"))
        elif before.lineage != manifest.lineage or before.sequence + 1 != manifest.sequence:
            problems.append((manifest.id, f"it does not follow on {previous.set}, as it says it does"))
        elif before.created >= manifest.created:
            problems.append((manifest.id, f"its time is not later than that of {previous.set}, before it"))
    return problems


def ahead(sets: Iterable[Manifest], *, at: int | None = None) -> list[str]:
    """Ids of sets whose time lies more than a day after `at` (microseconds; None: this machine's clock).

    A clock was wrong there, or somebody wants a rule that keeps the newest to keep these and to forget the
    others. No decision hangs on it but a person's.
    """
    limit = (now() if at is None else at) + 24 * 3600 * 1_000_000
    return [manifest.id for manifest in sets if manifest.created > limit]


# --- what a person means -----------------------------------------------------------------


def split_selector(text: str) -> Selector:
    """Take `SET`, `SET:DISK` or `SET:DISK:N` apart; SET may be `NAME@TIME`. Raises `UsageError`."""
    match = re.fullmatch(_SELECTOR, text)
    if match is None:
        raise UsageError(
            f"not an image set: {text!r}", hint="write ID, NAME, NAME@TIME or latest, then :DISK or :DISK:N"
        )
    part = match["part"]
    if part is not None and int(part) == 0:
        raise UsageError(f"not a partition: {text!r}", hint="partitions are counted from 1")
    return Selector(match["set"], match["disk"], int(part) if part else None)


def parse_time(text: str, *, begin: bool = False) -> int:
    """The last microsecond, since 1970 UTC, of the day, minute or second that is named; `begin`: the first.

    Local time unless the text has an offset. Raises `UsageError`.
    """
    hint = "write 2026-11-22, '2026-11-22 13:40' or 2026-11-22T13:40:05+01:00"
    match = re.fullmatch(_TIME, text)
    if match is None:
        raise UsageError(f"not a time: {text!r}", hint=hint)
    date, hours, seconds, fraction, zone = match.groups()
    unit = timedelta(microseconds=1) if fraction else timedelta(seconds=1) if seconds else _UNITS[bool(hours)]
    try:
        clock = f"{hours or '00:00'}{seconds or ''}{fraction or ''}{zone or ''}"
        moment = datetime.fromisoformat(f"{date}T{clock}")
        if moment.tzinfo is None:
            moment = moment.astimezone()
        if begin:
            return (moment - _EPOCH) // timedelta(microseconds=1)
        return (moment + unit - _EPOCH) // timedelta(microseconds=1) - 1
    except (ValueError, OverflowError, OSError) as error:
        raise UsageError(f"not a time: {text!r}: {error}", hint=hint) from error


def resolve(repository: Repository, text: str, *, host: str | None = None) -> Manifest:
    """The set that `text` means: an id or its unique prefix, `latest`, `NAME`, `NAME@TIME`, `latest@TIME`.

    A name goes before a prefix of an id, this machine's lineages (`host`)
    before those of others. Raises `NoSuchSet`, `UsageError` where it is
    ambiguous, `IntegrityError` where the set that is meant is damaged, or may
    be a damaged one: an older set never passes for the newest.
    """
    if is_id(text):
        return read_set(repository, text)
    name, at, time = text.partition("@")
    until = parse_time(time) if at else None
    # Which set a person gets must not hang on a flipped bit.
    found, damaged = heads(repository, sealed=True)
    if name == "latest":
        candidates = found
    else:
        lineage = _lineage_named(repository, name, host or this_host(), found)
        if lineage is None:
            if not at and (chosen := _by_prefix(text, found, damaged)) is not None:
                return read_set(repository, chosen)
            raise _no_set(repository, text, found, damaged)
        candidates = [head for head in found if head.lineage == lineage]
    if until is not None:
        candidates = [head for head in candidates if head.created <= until]
    newest = max(candidates, key=lambda head: (head.created, head.sequence, head.id), default=None)
    if doubtful := _doubtful(repository, found, damaged, newest, until):
        raise IntegrityError(
            f"it cannot be told which image set {text!r} is: "
            + ", ".join(f"{item.id} ({item.reason})" for item in doubtful[:3])
            + (f" and {len(doubtful) - 3} more" if len(doubtful) > 3 else ""),
            hint=f"the newest whole one is {newest.id}: name it by its id" if newest else _LIST,
        )
    if newest is None and until is not None and found:
        raise NoSuchSet(
            f"there is no image set of {name} at or before {format_time(until / 1e6)}", hint=_LIST
        )
    if newest is None:
        raise _no_set(repository, text, found, damaged)
    return read_head(repository, newest)


def _doubtful(
    repository: Repository, found: list[Head], damaged: list[Damaged], newest: Head | None, until: int | None
) -> list[Damaged]:
    """The damaged sets that may be newer than `newest`, the newest whole one found, up to `until`.

    A set is older if a whole one that is not newer follows on it, or if its
    writer announced itself before the newest was made.
    """
    at = newest.created if newest else -1
    followed = {head.previous for head in found if head.created <= at}
    doubtful: list[Damaged] = []
    for item in damaged:
        begun = _begun(repository, item.id)
        late = until is not None and begun is not None and begun > until
        if item.id not in followed and not late and (begun is None or begun > at):
            doubtful.append(item)
    return doubtful


def _begun(repository: Repository, session: str) -> int | None:
    """When the writer of a set announced itself, as far as that can be told."""
    try:
        raw = repository.storage.read(SESSIONS + session, 0, MAX_SMALL_JSON + 1)
        return parse_session(raw, session, repository.config.repository).created
    except (NotFound, IntegrityError):
        return None


_LIST = "imager list shows what there is"


def _no_set(repository: Repository, text: str, found: list[Head], damaged: list[Damaged]) -> ImagerError:
    if repository.sealed and any(read_head(repository, head).body is None for head in found):
        return WrongKey(
            f"no image set that this key can read is called {text!r}, and there are some that it cannot read",
            hint="use a key with the full role, or name the set by its id",
        )
    if damaged:
        many = f"one of {len(damaged)} damaged ones" if len(damaged) > 1 else f"the damaged {damaged[0].id}"
        return IntegrityError(
            f"no whole image set is called {text!r}, but {many} may be the one",
            hint="imager check names what is damaged",
        )
    return NoSuchSet(f"no image set is called {text!r}", hint=_LIST)


def _by_prefix(text: str, found: list[Head], damaged: list[Damaged]) -> str | None:
    prefix = text.lower()
    if len(prefix) < 4 or not _HEX.issuperset(prefix):
        return None
    ids = [head.id for head in found] + [problem.id for problem in damaged]
    ids = [set_id for set_id in ids if set_id.startswith(prefix)]
    if len(ids) > 1:
        raise UsageError(
            f"{text!r} may be any of {len(ids)} image sets: {', '.join(sorted(ids)[:8])}",
            hint="give more digits of the id",
        )
    return ids[0] if ids else None


def _lineage_named(repository: Repository, name: str, host: str, found: list[Head]) -> str | None:
    """The lineage of `name` on this host, or the only one of that name on another. Raises `UsageError`."""
    own = lineage_id(repository.secrets.id_key, host, name).hex()
    lineages: dict[str, list[Head]] = {}
    for head in found:
        lineages.setdefault(head.lineage, []).append(head)
    if own in lineages:
        return own
    matches: list[tuple[str, str]] = []
    for lineage, members in lineages.items():
        # All sets of a lineage have one name and host: the newest whole one tells.
        for head in reversed(members):
            try:
                body = read_head(repository, head).body
            except (IntegrityError, NoRepository, NoSuchSet):
                continue
            if body is not None and body.name == name:
                matches.append((lineage, body.host))
            break
    if len(matches) > 1:
        raise UsageError(
            f"several machines have images called {name!r}: {', '.join(sorted(host for _, host in matches))}",
            hint="give the id of the image set",
        )
    return matches[0][0] if matches else None


def select_image(manifest: Manifest, disk: str | None) -> Image:
    """The disk of that name, or the only one. Raises `UsageError`."""
    images = manifest.images
    disks = ", ".join(image.disk for image in images)
    if disk is None:
        if len(images) == 1:
            return images[0]
        raise UsageError(
            f"image set {manifest.id[:8]} holds {len(images)} disks: {disks}",
            hint=f"name one: {manifest.id[:8]}:{images[0].disk}" if images else None,
        )
    for image in images:
        if image.disk == disk:
            return image
    raise UsageError(f"image set {manifest.id[:8]} has no disk {disk!r}; it has {disks}")
