"""What is left of image sets that were forgotten on purpose, and marks of those that must stay.

Invariant: a set is gone when its manifest is. A tombstone, signed with the
repository's key, only explains the gap: it makes no set go away, so a forged
one deletes nothing; and without a valid one a set that vanished is told of.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from imager.errors import IntegrityError, WrongKey
from imager.repository import keys, partial, sessions
from imager.repository.format import (
    FORGOTTEN,
    MAX_SMALL_JSON,
    PINS,
    SETS,
    Pin,
    Tombstone,
    canonical,
    is_id,
    now,
    parse,
    shape,
    tombstone_message,
)
from imager.repository.manifest import Manifest, is_abort_mark
from imager.repository.repository import Repository
from imager.storage.errors import AlreadyExists, NotFound

__all__ = [
    "all_digests", "check_may_forget", "digests", "exists", "forget", "forgotten_ids", "parse_tombstone",
    "pin", "pinned", "read_pin", "read_tombstone", "unpin",
]  # fmt: skip


def check_may_forget(repository: Repository) -> None:
    """Raises `WrongKey` where this key cannot sign tombstones, or cannot read what the sets are."""
    if repository.sealed and not (repository.secrets.signing_seed and repository.secrets.epochs):
        raise WrongKey(
            "this key cannot forget image sets",
            hint="use a key with the full role; imager prune needs no key",
        )


def forget(repository: Repository, manifest: Manifest, *, host: str, reason: str) -> None:
    """Forget a set for good: its tombstone first, its manifest last, so that this can be done again.

    Raises `WrongKey`, `StorageError`; `IntegrityError` where another tombstone is in its place.
    """
    check_may_forget(repository)
    storage = repository.storage
    bare = Tombstone(
        set=manifest.id,
        repository=repository.config.repository,
        lineage=manifest.lineage,
        sequence=manifest.sequence,
        digest=manifest.digest.hex(),
        created=now(),
        host=host,
        reason=reason,
    )
    value = msgspec.to_builtins(bare)
    message = tombstone_message(value)
    value["signature"] = (
        keys.sign(repository.secrets.signing_seed, message) if repository.sealed else message
    ).hex()
    try:
        storage.create(FORGOTTEN + manifest.id, canonical(value))
    except AlreadyExists:
        found = read_tombstone(repository, manifest.id)  # This was begun before, or somebody forged it.
        if found is not None and found.digest != bare.digest:
            raise IntegrityError(
                f"the tombstone of image set {manifest.id} is that of another manifest"
            ) from None
    # Without its manifest an announcement would look like a backup that still runs.
    sessions.end(storage, manifest.id)
    try:
        storage.delete(SETS + manifest.id)
    except NotFound:
        pass


def forgotten_ids(repository: Repository) -> frozenset[str]:
    """Ids of the sets that have a tombstone, valid or not. Raises `StorageError`."""
    names = (name.removeprefix(FORGOTTEN) for name in repository.storage.list_names(FORGOTTEN))
    return frozenset(name for name in names if is_id(name))


def read_tombstone(repository: Repository, set_id: str) -> Tombstone | None:
    """The tombstone of a set; None where there is none.

    Raises `IntegrityError` for a forged one, `StorageError`.
    """
    try:
        raw = repository.storage.read(FORGOTTEN + set_id, 0, MAX_SMALL_JSON + 1)
    except NotFound:
        return None
    return parse_tombstone(repository, set_id, raw)


def parse_tombstone(repository: Repository, set_id: str, raw: bytes) -> Tombstone:
    """The tombstone of a set out of its bytes. Raises `IntegrityError` for a forged one."""
    what = f"the tombstone of image set {set_id}"
    value = parse(raw, what)
    found = shape(value, Tombstone, what)
    if found.set != set_id or found.repository != repository.config.repository:
        raise IntegrityError(f"{what} is damaged: it belongs to another set or repository")
    message = tombstone_message(value)
    try:
        signature = bytes.fromhex(found.signature)
    except ValueError:
        signature = b""
    if repository.sealed:
        genuine = keys.is_signed(bytes.fromhex(repository.config.verify_key), signature, message)
    else:
        genuine = signature == message
    if not genuine:
        raise IntegrityError(f"{what} is damaged or forged: its signature is not by this repository's key")
    return found


def digests(repository: Repository) -> Callable[[str], str | None]:
    """A function that gives the digest of the manifest of a set that was forgotten, None for any other."""

    def digest_of(set_id: str) -> str | None:
        try:
            found = read_tombstone(repository, set_id)
        except IntegrityError:
            return None
        return found.digest if found is not None else None

    return digest_of


def all_digests(repository: Repository) -> list[bytes]:
    """Digests of the manifests of all sets that were forgotten here. Raises `StorageError`."""
    found = partial.at_once(repository.storage, digests(repository), sorted(forgotten_ids(repository)))
    return [bytes.fromhex(digest) for digest in found if digest is not None]


def exists(repository: Repository) -> Callable[[str], bool]:
    """A function that tells whether a manifest (no abort mark) is at a set's place now."""

    def there(set_id: str) -> bool:
        try:
            return not is_abort_mark(repository.storage.read(SETS + set_id, 0, 8))
        except NotFound:
            return False

    return there


# --- pins ---------------------------------------------------------------------------------


def pinned(repository: Repository) -> frozenset[str]:
    """Ids of the sets that are pinned: an object there pins, damaged or not. Raises `StorageError`."""
    names = (name.removeprefix(PINS) for name in repository.storage.list_names(PINS))
    return frozenset(name for name in names if is_id(name))


def read_pin(repository: Repository, set_id: str) -> Pin:
    """What was said when a set was pinned. Raises `NotFound`, `IntegrityError`, `StorageError`."""
    what = f"the pin of image set {set_id}"
    found = shape(parse(repository.storage.read(PINS + set_id, 0, MAX_SMALL_JSON + 1), what), Pin, what)
    if found.set != set_id or found.repository != repository.config.repository:
        raise IntegrityError(f"{what} is damaged: it belongs to another set or repository")
    return found


def pin(repository: Repository, set_id: str, *, host: str, note: str = "") -> bool:
    """Keep a set whatever the rules say; False where it is pinned already. Raises `StorageError`."""
    value = Pin(set_id, repository.config.repository, now(), host, note)
    try:
        repository.storage.create(PINS + set_id, canonical(value))
    except AlreadyExists:
        return False
    return True


def unpin(repository: Repository, set_id: str) -> bool:
    """Leave a set to the rules again; False where it was not pinned. Raises `StorageError`."""
    try:
        repository.storage.delete(PINS + set_id)
    except NotFound:
        return False
    return True
