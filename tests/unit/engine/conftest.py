"""A repository, and a writer of sets that owes nothing to the engine's backup.

It uses the native core and the manifest's own functions alone, so a defect of
the backup cannot hide one of the restore.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from imager._native import DATA, UNREADABLE, UNUSED, Known, Slots, scan
from imager.repository.credentials import Credentials
from imager.repository.format import lineage_id, now
from imager.repository.imageset import read_set
from imager.repository.manifest import Body, Image, Manifest, Public, Root, encode, root_level
from imager.repository.repository import Repository
from imager.repository.session import Session
from imager.storage.folder import FolderStorage

BLOCK = 4096


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State of this test alone."""
    folder = tmp_path / "state"
    monkeypatch.setenv("IMAGER_STATE_DIR", str(folder))
    monkeypatch.setenv("IMAGER_CACHE_DIR", str(tmp_path / "cache"))
    return folder


@pytest.fixture(params=["none", "keyfile"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Repository]:
    storage = FolderStorage(str(tmp_path / "repo"))
    keyfile = tmp_path / "key"
    keyfile.write_bytes(os.urandom(64))
    credentials = Credentials(keyfile=str(keyfile))
    with Repository.init(storage, credentials, encryption=request.param):
        pass
    with Repository.open(storage, credentials) as opened:
        yield opened


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Repository]:
    """A repository without encryption, where the encryption is beside the point."""
    with Repository.init(FolderStorage(str(tmp_path / "repo")), Credentials(), encryption="none") as opened:
        yield opened


def content(size: int, *, seed: int = 1, density: float = 0.3, block: int = BLOCK) -> bytes:
    """Bytes of an image: blocks of zeroes, random ones, and repeated ones."""
    chance = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        what = chance.random()
        run = chance.choice((1, 1, 2, 3, 40))
        for _ in range(run):
            if what < density:
                out += chance.randbytes(block)
            elif what < density + 0.1:
                out += b"again and again " * (block // 16)
            else:
                out += bytes(block)
    return bytes(out[:size])


class Writer:
    """Stores sets. `store` gives the manifest back."""

    def __init__(self, repository: Repository, folder: Path) -> None:
        self.repository = repository
        self.folder = folder
        self.packs: list[str] = []

    def store(
        self,
        images: dict[str, bytes | Path],
        *,
        name: str = "disk",
        block_size: int = BLOCK,
        unreadable: Callable[[Slots], None] | None = None,
        lost: tuple[tuple[int, int], ...] = (),
    ) -> Manifest:
        """A set of `images`. `unreadable` may change the slots before they are kept."""
        repository = self.repository
        with Session.begin(repository) as session:
            all_slots = []
            for data in images.values():
                path = data if isinstance(data, Path) else self._file(data)
                all_slots.append(self._scan(session, path, block_size))
            if unreadable is not None:
                unreadable(all_slots[0])
            maps = session.new_map_pack()
            places = [self._tree(maps, slots) for slots in all_slots]
            session.seal(maps)
            roots, kept = [], []
            for (disk, data), place in zip(images.items(), places, strict=True):
                size = data.stat().st_size if isinstance(data, Path) else len(data)
                root = None
                if place is not None:
                    level, slot = place
                    _, id_, pack, offset, length = slot.get(0)
                    pack_name = repository.names.name(pack)
                    assert pack_name is not None
                    root = Root(pack_name.hex(), offset, length, id_.hex(), level)
                    assert level == root_level(-(-size // block_size))
                roots.append(root)
                kept.append(Image(disk, size, block_size, lost))
            public = Public(
                repository=repository.config.repository,
                set=session.id,
                version=1,
                features=(),
                created=now(),
                lineage=lineage_id(repository.secrets.id_key, os.uname().nodename, name).hex(),
                sequence=1,
                previous=None,
                envelope=session.envelope.hex() if session.envelope else None,
                roots=tuple(roots),
            )
            body = Body(name, os.uname().nodename, tuple(kept), finished=now())
            session.commit(encode(repository, public, body, session.key))
        return read_set(repository, session.id)

    def _file(self, data: bytes) -> Path:
        path = self.folder / f"source-{len(list(self.folder.iterdir()))}"
        path.write_bytes(data)
        return path

    def _scan(self, session: Session, path: Path, block_size: int) -> Slots:
        size = path.stat().st_size
        blocks = -(-size // block_size)
        pack = session.new_data_pack()
        fd = os.open(path, os.O_RDONLY)
        try:
            found = scan(
                self.repository.vault,
                fd,
                [(0, blocks)] if blocks else [],
                image_size=size,
                block_size=block_size,
                base=None,
                pack=pack,
                known=Known(self.repository.names),
            )
        finally:
            os.close(fd)
        name = session.seal(pack)
        if name is not None:
            self.packs.append(name.hex())
        return found.slots

    def _tree(self, maps: object, slots: Slots) -> tuple[int, Slots] | None:
        if not len(slots):
            return None
        level = 0
        while True:
            above = Slots(0)
            covers = 256**level
            for at in range(0, len(slots), 256):
                page = slots.slice(at, min(at + 256, len(slots)))
                kind = page.uniform()
                if kind is not None and len(slots) > 256:
                    above.extend(Slots(1, kind))
                else:
                    above.extend(maps.add_page(level, at * covers, page, self.repository.names))  # type: ignore[attr-defined]
            if len(above) == 1 and above.get(0)[0] == DATA:
                return level, above
            slots, level = above, level + 1


@pytest.fixture
def writer(repository: Repository, tmp_path: Path) -> Writer:
    folder = tmp_path / "sources"
    folder.mkdir()
    return Writer(repository, folder)


@pytest.fixture
def plain_writer(plain: Repository, tmp_path: Path) -> Writer:
    folder = tmp_path / "sources"
    folder.mkdir()
    return Writer(plain, folder)


__all__ = ["BLOCK", "UNREADABLE", "UNUSED", "Writer", "content"]
