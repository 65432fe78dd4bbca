"""Index segments for tests: of any blocks and packs, without the packs' bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from imager import _native
from imager.repository.repository import Repository
from imager.repository.segments import segment_name

Place = tuple[bytes, int]
"Name of a pack, offset in it."


def digest(text: str) -> bytes:
    """32 bytes that stand for `text`: an id, or the name of a pack."""
    return hashlib.sha256(text.encode()).digest()


def segment_of(repository: Repository, places: dict[bytes, Place]) -> bytes:
    """The bytes of a segment that says where blocks are."""
    names = _native.Names()
    known = _native.Known(names)
    for identity, (pack, offset) in places.items():
        known.add_pack(names.intern(pack), [(1, identity, offset, 100)])
    data = known.segment(repository.id)
    assert data is not None
    return data


def put(repository: Repository, places: dict[bytes, Place]) -> str:
    """Store such a segment: its object name."""
    data = segment_of(repository, places)
    name = segment_name(data)
    repository.storage.create(name, data)
    return name


def blocks(numbers: Iterable[int], pack: str = "pack") -> dict[bytes, Place]:
    """Places of the blocks of these numbers, all in one pack."""
    return {digest(f"block {number}"): (digest(pack), number) for number in numbers}


def found(repository: Repository, known: _native.Known, ids: Iterable[bytes]) -> dict[bytes, Place]:
    """What is known of blocks."""
    result: dict[bytes, Place] = {}
    for identity in ids:
        if (place := known.find(identity)) is not None:
            name = repository.names.name(place[0])
            assert name is not None
            result[identity] = (name, place[1])
    return result
