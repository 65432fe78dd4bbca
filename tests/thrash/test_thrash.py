"""Writers, restorers, forget, prune and check on one repository, killed as a seed says.

    python -m pytest tests/thrash -q --minutes 10
    python -m pytest tests/thrash -q --thrash-seed 1234   # a round that failed, again

What must hold: a restore that says it went well is right; a set that was committed and not forgotten is
there and whole; no command fails but for a reason that is known; and when all is quiet, one
prune leaves nothing but what the sets need.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager import reference
from imager.repository import imageset, tombstones
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.storage.location import open_storage
from tests.thrash.backends import BACKENDS
from tests.thrash.stage import Actor, Director

MINUTES = 0.6
OPERATIONS = 90
"Commands of one round."
BLOCK = 4096
LINEAGES = ("a", "b", "c")
WEIGHTS = {"backup": 6, "restore": 4, "forget": 3, "prune": 4, "check": 1, "verify": 1}


class Round:
    """One repository from its init to its end."""

    def __init__(self, seed: int, folder: Path, backend: str) -> None:
        self.seed = seed
        self.chance = random.Random(seed)
        self.folder = folder
        self.place = BACKENDS[backend](folder)
        self.encryption = self.chance.choice(("none", "keyfile"))
        self.key = folder / "key"
        self.key.write_bytes(random.Random(seed).randbytes(64))
        os.environ["IMAGER_KEYFILE"] = str(self.key)
        self.director = Director(self.chance, folder)
        self.sources: dict[str, bytes] = {}
        "By the tag of the backup: what its source had."
        self.contents = {name: self.chance.randbytes(300 * BLOCK) for name in LINEAGES}
        self.sets: dict[str, str] = {}
        "Sets that were committed, by id: the tag of their backup."
        self.gone: set[str] = set()
        self.fenced = False
        self.counts: Counter[str] = Counter()
        self.plain("init", self.place, "--encryption", self.encryption, "--block-size", "4KiB")

    # --- looking, without being part of the play -------------------------------------------

    def plain(self, *arguments: str) -> None:
        """A command that nobody disturbs."""
        words = list(arguments) if arguments[0] == "init" else ["-r", self.place, *arguments]
        self.director.start(words, then=lambda actor: self.expect(actor, {0}), weight=1000.0)
        self.director.drain()

    def open(self) -> Repository:
        return Repository.open(
            open_storage(self.place), Credentials(keyfile=str(self.key), interactive=False)
        )

    def survey(self) -> None:
        """What sets there are: new ones are committed now, missing ones must have been forgotten."""
        with self.open() as repository:
            listing = imageset.list_sets(repository)
            assert not listing.problems, listing.problems
            for manifest in listing.sets:
                (tag,) = manifest.content.tags
                assert tag in self.sources
                self.sets.setdefault(manifest.id, tag)
                assert manifest.id not in self.gone, "a forgotten set came back"
            there = {manifest.id for manifest in listing.sets}
            for set_id in self.sets.keys() - there - self.gone:
                stone = tombstones.read_tombstone(repository, set_id)
                assert stone is not None, f"set {set_id} was committed, not forgotten, and is gone"
                self.gone.add(set_id)

    def living(self) -> list[str]:
        return sorted(self.sets.keys() - self.gone)

    def expect(self, actor: Actor, codes: set[int]) -> None:
        said = actor.out.read_text(errors="replace") if actor.out.exists() else ""
        assert "Traceback" not in said and "internal error" not in said, said
        if not actor.killed:
            assert actor.code in codes, f"{actor.arguments}: {actor.code}: {said}"
        self.counts["killed" if actor.killed else "ended"] += 1

    # --- what is played -----------------------------------------------------------------------

    def operation(self) -> None:
        """Start one more command."""
        kind = self.chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        kill_at, how = None, self.chance.choice(("before", "within", "after"))
        if self.chance.random() < 0.35:
            kill_at = self.chance.choice((self.chance.randrange(1, 15), self.chance.randrange(1, 60)))
        weight = self.chance.choice((1.0, 1.0, 1.0, 0.3, 0.03))
        arguments, then = getattr(self, f"_{kind}")()
        if arguments is None:
            return
        self.counts[kind] += 1
        self.director.start(
            ["--json", "-r", self.place, *arguments], then=then, kill_at=kill_at, how=how, weight=weight
        )

    def _backup(self):  # type: ignore[no-untyped-def]
        tag = f"t{len(self.sources)}"
        name = self.chance.choice(LINEAGES)
        content = bytearray(self.contents[name])
        for _ in range(self.chance.choice((1, 10, 120))):
            at = self.chance.randrange(len(content) // BLOCK)
            fresh = self.chance.randbytes(BLOCK)
            if self.chance.random() < 0.4:  # Something that another lineage has, or had.
                other = self.contents[self.chance.choice(LINEAGES)]
                from_ = self.chance.randrange(len(other) // BLOCK) * BLOCK
                fresh = other[from_ : from_ + BLOCK]
            content[at * BLOCK : (at + 1) * BLOCK] = fresh
        self.contents[name] = self.sources[tag] = bytes(content)
        source = self.folder / f"{tag}.img"
        source.write_bytes(content)
        fences = self.fenced

        def then(actor: Actor) -> None:
            source.unlink()
            self.expect(actor, {0, 11} if self.fenced or fences else {0})
            self.survey()
            if actor.code == 0:
                assert tag in self.sets.values(), "a backup said that it was done, and there is no set"
            if actor.code == 11:
                assert tag not in self.sets.values(), "a fenced backup has a set"

        words = ["backup", str(source), "--name", name, "--tag", tag, "--threads", "1"]
        if self.chance.random() < 0.2:
            words += ["--strategy", self.chance.choice(("full", "differential"))]
        return words, then

    def _restore(self):  # type: ignore[no-untyped-def]
        if not self.living():
            return None, None
        set_id = self.chance.choice(self.living())
        out = self.folder / f"restored{self.director._number}"

        def then(actor: Actor) -> None:
            self.survey()
            self.expect(actor, {0, 1, 30} if set_id in self.gone else {0})
            if actor.code == 0:
                assert out.read_bytes() == self.sources[self.sets[set_id]], "a restore is wrong"
            out.unlink(missing_ok=True)
            for left in self.folder.glob(out.name + "*"):
                left.unlink()

        return ["restore", set_id, str(out), "--threads", "1"], then

    def _verify(self):  # type: ignore[no-untyped-def]
        if not self.living():
            return None, None
        set_id = self.chance.choice(self.living())

        def then(actor: Actor) -> None:
            self.survey()
            self.expect(actor, {0, 1, 30} if set_id in self.gone else {0})

        return ["verify", set_id, "--threads", "1"], then

    def _forget(self):  # type: ignore[no-untyped-def]
        if len(self.living()) < 3:
            return None, None
        if self.chance.random() < 0.5:
            words = ["forget", *self.chance.sample(self.living(), self.chance.randrange(1, 3))]
            words += [word for name in LINEAGES for word in ("--last-of", name)]
        else:
            words = ["forget", "--keep-last", str(self.chance.randrange(1, 4))]

        def then(actor: Actor) -> None:
            self.survey()
            # What was to be forgotten may have been forgotten by another one meanwhile.
            self.expect(actor, {0, 1} if words[1] != "--keep-last" else {0})

        return words, then

    def _prune(self):  # type: ignore[no-untyped-def]
        words = ["prune", "--max-unused", self.chance.choice(("0%", "10%", "50%"))]
        codes = {0, 11}  # 11: others undid, again and again, what it had seen
        if self.chance.random() < 0.2:
            with self.open() as repository:
                from imager.repository.sessions import open_sessions

                found = open_sessions(repository.storage, repository.config.repository)
            if found:
                # Whoever it is, dead or alive.
                words += ["--fence", self.chance.choice(found).id]
                self.fenced = True
                codes = {0, 2, 11}

        def then(actor: Actor) -> None:
            self.survey()
            self.expect(actor, codes)

        return words, then

    def _check(self):  # type: ignore[no-untyped-def]
        def then(actor: Actor) -> None:
            self.survey()
            # A set that is forgotten, and pruned, while a check looks at it may seem damaged to it.
            self.expect(actor, {0, 30})

        return ["check"], then

    # --- the play --------------------------------------------------------------------------

    def run(self) -> None:
        for _ in range(OPERATIONS):
            self.operation()
            for _ in range(self.chance.randrange(1, 40)):
                self.director.turn()
            while len(self.director.actors) > 5:
                self.director.turn()
            if self.chance.random() < 0.03:
                self.director.drain()
                self.quiet()
        self.director.drain()
        self.quiet()
        self.clean()

    def quiet(self) -> None:
        """Nobody is at work: everything is whole."""
        self.survey()
        self.plain("check", "--read-data")
        chosen = self.living()
        for set_id in self.chance.sample(chosen, min(3, len(chosen))):
            self.is_right(set_id)

    def is_right(self, set_id: str) -> None:
        out = self.folder / "quiet.img"
        out.unlink(missing_ok=True)
        self.plain("restore", set_id, str(out))
        assert out.read_bytes() == self.sources[self.sets[set_id]], f"set {set_id} is not what it was"

    def clean(self) -> None:
        """One prune, once the dead are fenced, and nothing is left but what the sets need."""
        for set_id in self.living():
            self.is_right(set_id)
        self.plain("prune", "--max-unused", "0%")
        self.plain("check", "--read-data")
        for set_id in self.living():
            self.is_right(set_id)
        needed = self.needed()
        with self.open() as repository:
            storage = repository.storage
            assert storage.list_names("condemned/") == []
            sessions = {name.removeprefix("sessions/") for name in storage.list_names("sessions/")}
            assert sessions <= set(self.living()), "announcements of nobody"
            from imager.repository.locator import records_of

            stored = [
                (kind, identity)
                for kind in (1, 2)
                for name in repository.pack_names(kind)
                for _, identity, _, _ in records_of(repository, name, kind)
            ]
        assert set(stored) == needed, f"{len(set(stored) - needed)} records that no set needs"
        self.counts["records"] = len(stored)

    def needed(self) -> set[tuple[int, bytes]]:
        """Every record that some set refers to, by the reference reader."""
        found: set[tuple[int, bytes]] = set()
        keyfile = self.key.read_bytes() if self.encryption == "keyfile" else None
        reader = reference.Repository(self.place, keyfile=keyfile)
        for set_id in self.living():
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
                        for index, target in enumerate(targets):
                            if level:
                                stack.append((target, level - 1, at + index * 256**level))
                            else:
                                found.add((1, target.id))
                        at += length * 256**level
        return found


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(dir=base, prefix="imager-thrash-"))
    for name in list(os.environ):
        if name.startswith("IMAGER_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("IMAGER_STATE_DIR", str(folder / "state"))
    monkeypatch.setenv("IMAGER_KEYFILE", "")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_thrash(backend: str, arena: Path, request: pytest.FixtureRequest) -> None:
    minutes = request.config.getoption("--minutes", None) or MINUTES
    only = request.config.getoption("--thrash-seed", None)
    seeds = random.Random() if minutes != MINUTES else random.Random(2026)
    end = time.monotonic() + minutes * 60
    total: Counter[str] = Counter()
    rounds = 0
    while time.monotonic() < end:
        seed = only if only is not None else seeds.randrange(1 << 32)
        folder = arena / str(rounds)
        folder.mkdir()
        play = Round(seed, folder, backend)
        try:
            play.run()
        except BaseException:
            print(*play.director.log[-60:], sep="\n")
            print(f"again: python -m pytest tests/thrash -q --thrash-seed {seed}   (backend {backend})")
            raise
        finally:
            play.director.stop()
            shutil.rmtree(folder, ignore_errors=True)
        total += play.counts
        rounds += 1
        if only is not None:
            return
    print(json.dumps({"rounds": rounds, **total}))
    assert rounds and total["killed"] and total["ended"]
