"""Packs that the repository has lost, and what of a block map hangs on them.

Invariant: a set that is built on another must not inherit references to packs
that are gone. Losses are noticed from what the index and the maps' roots name
and the storage does not list, so that nothing is walked where nothing is lost.
"""

from __future__ import annotations

from collections.abc import Collection

from imager import _native
from imager._native import UNKNOWN, Known
from imager.extents import Extents
from imager.repository.blockmap import MapReader
from imager.repository.format import DAMAGED, is_pack_name
from imager.repository.imageset import Image
from imager.repository.repository import Repository
from imager.storage.errors import AlreadyExists

MISSING = DAMAGED + "missing/"


def packs(repository: Repository, *, without: Collection[bytes] = ()) -> list[bytes]:
    """Names of packs that are known of and not listed, sorted; but none of `without`, which are condemned.

    Known of are those that index segments name (load them before), roots of
    maps that were opened, and what a repair set aside or found missing. Call
    `packs_present` before. Raises `StorageError`.
    """
    names = repository.names
    for path in repository.set_aside():
        if is_pack_name(path[-64:]):
            names.intern(bytes.fromhex(path[-64:]))
    return sorted({*names.absent()}.difference(without))


def note(repository: Repository, name: bytes) -> None:
    """Keep it known that a pack is missing, when the index forgets it. Raises `StorageError`."""
    try:
        repository.storage.create(MISSING + name.hex(), b"")
    except AlreadyExists:
        pass


def digest(lost: list[bytes]) -> str:
    """What a manifest keeps of `packs`: empty where nothing is lost."""
    return _native.blake3(b"".join(lost)).hex() if lost else ""


def blocks(repository: Repository, image: Image, known: Known) -> Extents:
    """Ranges of blocks whose records or pages are in no pack that is listed. Walks all of the map.

    `known`: where records are that prune has moved.
    """
    gone: list[tuple[int, int]] = []

    def damaged(first: int, count: int, reason: str) -> None:
        gone.append((first, first + count))

    reader = MapReader(repository, image, listed_only=True)
    for first, _, part in reader.walk(on_damage=damaged):
        if isinstance(part, int):
            continue
        slots = part.copy()
        slots.relocate(repository.names, known)
        if slots.drop_absent(repository.names):
            gone += [(first + low, first + high) for kind, low, high in slots.runs() if kind == UNKNOWN]
    return Extents.of(gone)
