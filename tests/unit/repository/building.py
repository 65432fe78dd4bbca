"""A repository with image sets that the real core made, for tests to read and to damage."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

from imager import _native
from imager.repository import imageset, index
from imager.repository.blockmap import MapReader
from imager.repository.credentials import Credentials
from imager.repository.format import lineage_id, now
from imager.repository.imageset import Manifest
from imager.repository.mapwriter import MapWriter
from imager.repository.repository import Repository
from imager.repository.session import Session
from imager.storage.folder import FolderStorage

BLOCK = 4096


@dataclass
class Lab:
    """A repository, and a way to put images into it."""

    root: Path
    keyfile: Path
    encryption: str
    repository: Repository
    images: dict[str, dict[str, bytes]] = field(default_factory=dict)
    "set id -> disk -> its bytes"

    @property
    def storage(self) -> FolderStorage:
        """The folder."""
        storage = self.repository.storage
        assert isinstance(storage, FolderStorage)
        return storage

    def credentials(self) -> Credentials:
        """What opens the repository."""
        return Credentials(keyfile=str(self.keyfile), interactive=False)

    def reopen(self) -> Repository:
        """As another process would see it."""
        self.repository.close()
        self.repository = Repository.open(self.storage, self.credentials(), writing=True)
        return self.repository

    def backup(
        self, name: str = "d", *, pack_blocks: int = 150, created: int | None = None, **disks: bytes
    ) -> Manifest:
        """One image set of these disks on top of the lineage's last; a data pack for every `pack_blocks`."""
        repository = self.repository
        lineage = lineage_id(repository.secrets.id_key, "host", name)
        base, _ = imageset.latest_of(repository, lineage)
        with Session.begin(repository, host="host") as session:
            known = index.look_around(session)
            roots = []
            for disk, content in disks.items():
                images = base.images if base and base.body else ()  # none where the key cannot read
                before = next((image for image in images if image.disk == disk), None)
                reader = MapReader(repository, before, listed_only=True) if before else None
                roots.append(self._image(session, known, reader, content, pack_blocks))
            index.write_segment(session, known)
            public = imageset.Public(
                repository=repository.config.repository,
                set=session.id,
                version=1,
                features=(),
                created=created or now(),
                lineage=lineage.hex(),
                sequence=base.sequence + 1 if base else 1,
                previous=imageset.Previous(base.id, base.digest.hex()) if base else None,
                envelope=session.envelope.hex() if session.envelope else None,
                roots=tuple(roots),
            )
            images = tuple(imageset.Image(disk, len(content), BLOCK) for disk, content in disks.items())
            body = imageset.Body(name, "host", images)
            session.commit(imageset.encode(repository, public, body, session.key))
        self.images[session.id] = dict(disks)
        return imageset.read_set(repository, session.id)

    def _image(
        self,
        session: Session,
        known: _native.Known,
        base: MapReader | None,
        content: bytes,
        pack_blocks: int,
    ) -> imageset.Root | None:
        repository = self.repository
        blocks = -(-len(content) // BLOCK)
        writer = MapWriter(session, blocks, base)
        leaves = [writer.leaf(at) for at in range(-(-blocks // 256))]
        for start in range(0, blocks, pack_blocks):
            end = min(start + pack_blocks, blocks)
            pack = session.new_data_pack()
            old = _native.Slots(0)
            for block in range(start, end):
                old.extend(leaves[block // 256].slots.slice(block % 256, block % 256 + 1))
            scan = _native.scan(
                repository.vault,
                content,
                [(start, end)],
                image_size=len(content),
                block_size=BLOCK,
                base=old,
                pack=pack,
                known=known,
            )
            session.seal(pack)
            for block in range(start, end):
                at = block - start
                leaves[block // 256].slots.put(block % 256, scan.slots.slice(at, at + 1))
        for leaf in leaves:
            writer.put(leaf)
        return writer.finish()

    def paths(self, prefix: str) -> list[Path]:
        """Files of all objects in a folder of the repository."""
        return sorted(path for path in (self.root / prefix).rglob("*") if path.is_file())


def noise(blocks: int, seed: int = 0) -> bytes:
    """Blocks that are all different and cannot be compressed."""
    return random.Random(seed).randbytes(blocks * BLOCK)
