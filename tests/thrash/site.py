"""What is known of one repository of the play, and how it is judged: at the folder where its objects lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from imager import reference
from imager.repository import imageset, index, tombstones
from imager.repository.credentials import Credentials
from imager.repository.locator import records_of
from imager.repository.repository import Repository
from imager.storage.base import TOP
from imager.storage.location import open_storage


@dataclass(slots=True)
class Site:
    """A repository. `sources`: what each backup read, by the tag of its set; both sites share it."""

    url: str
    kept: Path
    key: Path
    sources: dict[str, bytes]
    sets: dict[str, str] = field(default_factory=dict)
    "Sets that were committed, by id: the tag of their backup."
    gone: set[str] = field(default_factory=set)
    recalled: set[str] = field(default_factory=set)
    "Sets that somebody asked to be copied here though they were forgotten: they may come back."

    @property
    def exists(self) -> bool:
        """Whether it has become a repository."""
        return (self.kept / "config").exists()

    @property
    def living(self) -> list[str]:
        """Sets that are there."""
        return sorted(self.sets.keys() - self.gone)

    def open(self) -> Repository:
        return Repository.open(
            open_storage(str(self.kept)), Credentials(keyfile=str(self.key), interactive=False)
        )

    def survey(self) -> None:
        """What sets there are: new ones are committed now, missing ones must have been forgotten."""
        if not self.exists:
            return
        with self.open() as repository:
            listing = imageset.list_sets(repository)
            assert not listing.problems, listing.problems
            for manifest in listing.sets:
                (tag,) = manifest.content.tags
                assert tag in self.sources
                self.sets.setdefault(manifest.id, tag)
                if manifest.id in self.gone:
                    assert manifest.id in self.recalled, f"set {manifest.id} was forgotten, and came back"
                    self.gone.discard(manifest.id)
            there = {manifest.id for manifest in listing.sets}
            for set_id in self.sets.keys() - there - self.gone:
                stone = tombstones.read_tombstone(repository, set_id)
                assert stone is not None, f"set {set_id} was committed, not forgotten, and is gone"
                self.gone.add(set_id)

    def right(self, set_id: str, restored: Path) -> None:
        """A file is what the set's source was."""
        same = restored.read_bytes() == self.sources[self.sets[set_id]]
        assert same, f"a restore of set {set_id} from {self.url} is wrong"

    def spotless(self) -> int:
        """After a prune that nobody disturbed nothing is left but what the sets need: how many records."""
        needed = self._needed()
        with self.open() as repository:
            storage = repository.storage
            assert storage.list_names("condemned/") == []
            sessions = {name.removeprefix("sessions/") for name in storage.list_names("sessions/")}
            assert sessions <= set(self.living), f"announcements of nobody: {sessions - set(self.living)}"
            stored = [
                (kind, identity)
                for kind in (1, 2)
                for name in repository.pack_names(kind)
                for _, identity, _, _ in records_of(repository, name, kind)
            ]
            there = {*repository.pack_names(1), *repository.pack_names(2)}
            stray = index.packs_named(repository) - there
            assert not stray, f"the index names {len(stray)} packs that are gone"
            assert len(storage.list_names("index/")) < 16
            tops = {name.partition("/")[0] for name in storage.list_names("")}
            assert tops <= set(TOP), tops - set(TOP)
        assert set(stored) == needed, (
            f"{len(set(stored) - needed)} records that no set needs, {len(needed - set(stored))} lack"
        )
        return len(stored)

    def _needed(self) -> set[tuple[int, bytes]]:
        """Every record that some set refers to, by the reference reader."""
        found: set[tuple[int, bytes]] = set()
        reader = reference.Repository(str(self.kept), keyfile=self.key.read_bytes())
        for set_id in self.living:
            for image in reader.images(reader.resolve(set_id)):
                assert image.root is not None
                blocks = -(-image.size // image.block_size)
                stack = [(image.root, reference.top_level(blocks), 0)]
                while stack:
                    page, level, first = stack.pop()
                    found.add((2, page.id))
                    public, sealed, pack = reader.read(reference.PAGE, page)
                    slots = min(256, -(-(blocks - first) // 256**level))
                    at = first
                    for length, targets in reference.parse_page(public, sealed, level, first, slots, pack):
                        for number, target in enumerate(targets):
                            if level:
                                stack.append((target, level - 1, at + number * 256**level))
                            else:
                                found.add((1, target.id))
                        at += length * 256**level
        return found
