"""What the holder of a key that can write only puts into maps and the index, and what upkeep makes of it.

Without a key nobody can tell whether a record is what its id says. So a record that claims to be a page
or a block of others must never stand for it: not where a copy is made, where it is looked for what is
lost, nor where a prune decides what may go.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from imager import _native, reference
from imager.errors import IntegrityError
from imager.events import Silent
from imager.repository import forgetting, heal, imageset, index, keyring
from imager.repository.check import check
from imager.repository.credentials import Credentials
from imager.repository.format import KIND_DATA, KIND_MAP, lineage_id, now, pack_object
from imager.repository.keyless import open_keyless
from imager.repository.keys import Secret
from imager.repository.manifest import Image, Manifest, Public, Root, encode
from imager.repository.prune import Prune, PruneOptions
from imager.repository.public import Place, PublicReader, root_place
from imager.repository.repository import Repository
from imager.repository.session import Session
from imager.storage.folder import FolderStorage
from tests import reference_writer as by_hand
from tests.unit.repository.building import BLOCK, Lab, noise
from tests.unit.repository.test_sync import copy

MINE = Secret("keyfile", b"m" * 40)


class Given(Credentials, frozen=True):
    """Opens with the attacker's key."""

    def obtain(self, kinds: Any) -> Secret:
        return MINE


class Attacker:
    """Who may back up the machine `evil`, and makes packs, sets and index segments by hand."""

    def __init__(self, lab: Lab) -> None:
        keyring.add(lab.repository, MINE, role="write", host="evil")
        self.repository = Repository.open(FolderStorage(str(lab.root)), Given(), writing=True)
        self.storage = self.repository.storage

    def pack(self, kind: int, records: Sequence[tuple[bytes, bytes, bytes]]) -> list[Place]:
        """A pack of records (id, public part, sealed part) that say what he likes; where they lie."""
        raw: list[bytes] = []
        with Session.begin(self.repository, host="evil") as session:
            header = by_hand.pack_header(
                kind, self.repository.id, os.urandom(16), 0, [session.envelope or b""]
            )
        for identity, public, sealed in records:
            payload = (struct.pack("<I", len(public)) + public if kind == KIND_MAP else b"") + sealed
            head = by_hand.head(kind, 0, 0, len(sealed) - 16, len(payload), identity, os.urandom(12))
            raw.append(head + payload)
        name, data = by_hand.pack(header, raw)
        self.storage.create(pack_object(kind, name), data)
        places, at = [], len(header)
        for one, (identity, _, _) in zip(raw, records, strict=True):
            places.append(Place(name, at, len(one), identity))
            at += len(one)
        return places

    def page(self, identity: bytes, level: int) -> Place:
        """A page that claims an id, and has nothing below it."""
        public = struct.pack("<BBHHH", level, 1, 0, 0, 0)
        return self.pack(KIND_MAP, [(identity, public, os.urandom(40))])[0]

    def set(self, place: Place, level: int, *, created: int | None = None) -> str:
        """A set of his own machine whose map's root lies there."""
        repository = self.repository
        with Session.begin(repository, host="evil") as session:
            public = Public(
                repository=repository.config.repository,
                set=session.id,
                version=1,
                features=(),
                created=created or now(),
                lineage=lineage_id(repository.secrets.id_key, "evil", "d").hex(),
                sequence=1,
                previous=None,
                envelope=session.envelope.hex() if session.envelope else None,
                roots=(Root(place.pack.hex(), place.offset, place.length, place.id.hex(), level),),
            )
            size = BLOCK * (256**level + 1 if level else 1)
            body = imageset.Body("d", "evil", (Image("sda", size, BLOCK),))
            session.commit(encode(repository, public, body, session.key))
            return session.id

    def segment(self, kind: int, places: Sequence[Place]) -> None:
        """An index segment that says that records lie there; the largest there is, so it is asked first."""
        places = [*places, *(Place(places[0].pack, 1, 100, os.urandom(32)) for _ in range(2000))]
        known = _native.Known(self.repository.names)
        for place in places:
            number = self.repository.names.intern(place.pack)
            known.add_pack(number, [(1 if kind == KIND_DATA else 2, place.id, place.offset, place.length)])
        data = known.segment(self.repository.id)
        assert data is not None
        self.storage.create(index.segment_name(data), data)


@pytest.fixture
def lab(make_lab: Callable[[str], Lab]) -> Lab:
    return make_lab("keyfile")


def victim(lab: Lab) -> tuple[Manifest, Place, int]:
    """A set of another machine with a map of two levels, and the root of that."""
    made = lab.backup(sda=noise(600, seed=1))
    root = made.public.roots[0]
    assert root is not None and root.level == 1
    return made, root_place(root), root.level


def is_whole(lab: Lab, root: Path, set_id: str) -> bool:
    """Whether a set reads back bit for bit, as the reference reader sees it."""
    reader = reference.Repository(str(root), keyfile=lab.keyfile.read_bytes())
    (image,) = reader.images(reader.resolve(set_id))
    content = lab.images[set_id]["sda"]
    out = bytearray(len(content))
    for offset, block in reader.blocks(image):
        out[offset : offset + len(block)] = block
    return bytes(out) == content


def prune(lab: Lab, **options: Any) -> None:
    with (
        open_keyless(FolderStorage(str(lab.root)), writing=True) as repository,
        Prune(repository, PruneOptions(max_unused="0%", **options), Silent()) as work,
    ):
        work.execute(work.plan())


def test_a_copy_has_what_others_maps_refer_to(lab: Lab, tmp_path: Path) -> None:
    made, root, level = victim(lab)
    evil = Attacker(lab)
    evil.set(evil.page(root.id, level), level, created=made.created - 1_000_000)
    summary = copy(lab, tmp_path / "copy")
    assert summary.ok and made.id in summary.sets
    assert is_whole(lab, tmp_path / "copy", made.id)


def test_what_others_lost_is_looked_for(lab: Lab) -> None:
    made, root, level = victim(lab)
    evil = Attacker(lab)
    evil.set(evil.page(root.id, level), level, created=made.created - 1_000_000)
    pack = lab.paths("packs")[0]
    fd = os.open(pack, os.O_RDONLY)
    lost = {record[1] for record in _native.pack_records(fd, bytes.fromhex(pack.name), lab.repository.id)}
    os.close(fd)
    pack.unlink()
    with open_keyless(FolderStorage(str(lab.root))) as repository:
        assert heal.wanted(repository).blocks == lost


def test_who_names_others_pages_wrongly_costs_them_nothing(lab: Lab) -> None:
    made, root, level = victim(lab)
    evil = Attacker(lab)
    set_id = evil.set(root, level - 1)
    with pytest.raises(IntegrityError, match="of another level") as told:
        prune(lab)
    assert set_id in told.value.message and made.id not in told.value.message
    prune(lab, despite_damage=True)
    assert is_whole(lab, lab.root, made.id)


def moved(lab: Lab) -> tuple[Manifest, list[Place], list[Place]]:
    """A set whose blocks and pages a prune has moved; the places of its pages and blocks as its map says."""
    first = noise(600, seed=1)
    before = lab.backup(sda=first)
    content = bytearray(first)
    for block in range(0, 200, 2):
        content[block * BLOCK : (block + 1) * BLOCK] = noise(1, 1000 + block)
    made = lab.backup(sda=bytes(content))
    forgetting.execute(lab.repository, forgetting.plan_sets(lab.repository, [before.id], Silent()), Silent())
    reader = PublicReader(lab.repository)
    root = made.public.roots[0]
    assert root is not None
    _, top = reader.page(root_place(root), 1)
    pages = [root_place(root), *top.targets]
    blocks = [block for page in top.targets for block in reader.page(page, 0)[1].targets]
    # Both sets share pages, so the map pack of the first is rewritten, too.
    prune(lab)
    assert is_whole(lab, lab.root, made.id)
    return made, pages, blocks


def test_the_index_gives_no_block_of_others_away(lab: Lab) -> None:
    made, _, blocks = moved(lab)
    there = {bytes.fromhex(path.name) for path in lab.paths("packs")}
    gone = [block for block in blocks if block.pack not in there]
    assert gone
    evil = Attacker(lab)
    places = evil.pack(KIND_DATA, [(block.id, b"", os.urandom(BLOCK + 16)) for block in gone])
    evil.segment(KIND_DATA, places)
    evil.segment(KIND_DATA, [*places[1:], Place(places[0].pack, places[0].offset + 1, 100, places[0].id)])
    for _ in range(2):
        prune(lab)
    assert is_whole(lab, lab.root, made.id)


def test_the_index_gives_no_page_of_others_away(lab: Lab, tmp_path: Path) -> None:
    made, pages, _ = moved(lab)
    there = {bytes.fromhex(path.name) for path in lab.paths("maps")}
    gone = [(page, 0 if at else 1) for at, page in enumerate(pages) if page.pack not in there]
    assert gone
    evil = Attacker(lab)
    evil.segment(KIND_MAP, [evil.page(page.id, level) for page, level in gone])
    assert copy(lab, tmp_path / "copy").ok
    assert is_whole(lab, tmp_path / "copy", made.id)
    for _ in range(2):
        prune(lab)
    assert is_whole(lab, lab.root, made.id)


def test_a_pack_of_more_records_than_one_can_have_takes_no_memory(lab: Lab, tmp_path: Path) -> None:
    """Records may be tiny: without a bound, four GiB of them would be more than the memory of who checks."""
    header = by_hand.pack_header(KIND_DATA, lab.repository.id, bytes(16), 0, [])
    count = (1 << 21) + 1
    footer = struct.pack("<8sIIQ", b"IMGRTAIL", count, 96, len(header))
    footer += struct.pack("<Q", reference.xxh3(footer))
    name = "ab" * 32
    path = lab.root / pack_object(KIND_DATA, bytes.fromhex(name))
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + count * 96)
        file.seek(0, os.SEEK_END)
        file.write(footer)
    with path.open("rb") as file, pytest.raises(_native.DamagedError, match="more than one can have"):
        _native.pack_records(file.fileno(), None, lab.repository.id)
    report = check(lab.repository, Silent(), read_data="all")
    assert any("more than one can have" in problem.detail for problem in report.problems)
