"""Writers, restorers, forget, prune, check and sync on one repository and its copy, killed as a seed says.

    python -m pytest tests/thrash -q --minutes 10            # divided over the backends
    python -m pytest tests/thrash -q -k s3 --thrash-seed 1234 --thrash-operations 40   # a round that failed

What must hold: a restore that says it went well is right; a set that was committed and not forgotten is
there and whole; no command fails but for a reason that is known; and when all is quiet, one
prune leaves nothing but what the sets need, in the repository and in the copy.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager.repository.sessions import open_sessions
from tests.thrash.backends import BACKENDS, Backend, missing, use
from tests.thrash.site import Site
from tests.thrash.stage import Actor, Director, Kill

MINUTES = 0.5
"For all backends together, where nobody says more."
ALONE = "THRASH_ALONE"
"Set in the process that thrashes."
BLOCK = 4096
LINEAGES = ("a", "b", "c")
WEIGHTS = {"backup": 6, "restore": 4, "forget": 3, "prune": 4, "check": 1, "verify": 1, "sync": 3}
TURNING = {
    "backup": (
        "create sessions/", "publish packs/", "publish maps/", "create index/", "create sets/",
        "delete index/",
    ),
    "prune": (
        "create sets/", "publish packs/", "publish maps/", "create index/", "create condemned/",
        "delete packs/", "delete maps/", "delete condemned/", "delete index/", "delete sessions/",
    ),
    "forget": ("create forgotten/", "delete sessions/", "delete sets/"),
    "sync": (
        "create slots/", "create config", "create sessions/", "publish packs/", "publish maps/",
        "create index/", "create sets/", "delete sessions/",
    ),
    "check": ("create index/", "delete index/"),
}  # fmt: skip
"Calls that change what others see: where a kill tells most."


class Round:
    """One repository and a copy of it, from their init to their end."""

    def __init__(self, seed: int, folder: Path, backend: Backend, operations: int) -> None:
        self.chance = random.Random(seed)
        self.folder = folder
        self.backend = backend
        self.operations = operations
        self.key = folder / "key"
        self.key.write_bytes(random.Random(seed).randbytes(64))
        os.environ["IMAGER_KEYFILE"] = str(self.key)
        self.director = Director(self.chance, folder)
        self.sources: dict[str, bytes] = {}
        "By the tag of the backup: what its source had."
        self.contents = {name: self.chance.randbytes(300 * BLOCK) for name in LINEAGES}
        self.home = self.site("home")
        self.copy = self.site("copy") if self.chance.random() < 0.5 else self.near("copy")
        self.fenced = False
        self.counts: Counter[str] = Counter()
        encryption = self.chance.choice(("none", "keyfile"))
        self.plain("init", self.home.url, "--encryption", encryption, "--block-size", "4KiB")

    def site(self, name: str) -> Site:
        """A repository in the storage that this is about."""
        place = f"{self.folder.name}/{name}"
        return Site(self.backend.url(place), self.backend.kept(place), self.key, self.sources)

    def near(self, name: str) -> Site:
        """A repository in a folder."""
        return Site(str(self.folder / name), self.folder / name, self.key, self.sources)

    @property
    def sites(self) -> list[Site]:
        return [site for site in (self.home, self.copy) if site.exists]

    # --- looking, without being part of the play -------------------------------------------

    def plain(self, *arguments: str) -> None:
        """A command that nobody disturbs."""
        self.director.start(list(arguments), then=lambda actor: self.expect(actor, {0}), weight=1000.0)
        self.director.drain()

    def survey(self) -> None:
        for site in self.sites:
            site.survey()

    def expect(self, actor: Actor, codes: set[int]) -> None:
        said = actor.out.read_text(errors="replace") if actor.out.exists() else ""
        assert "Traceback" not in said and "internal error" not in said, said
        if not actor.killed:
            assert actor.code in codes, f"{actor.arguments}: {actor.code}: {said}"
            actor.out.unlink(missing_ok=True)
        self.counts["killed" if actor.killed else "ended"] += 1

    # --- what is played -----------------------------------------------------------------------

    def operation(self) -> None:
        """Start one more command."""
        kind = self.chance.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        kill = self.kill(kind) if self.chance.random() < 0.4 else None
        weight = self.chance.choice((1.0, 1.0, 1.0, 0.3, 0.03))
        arguments, then = getattr(self, f"_{kind}")()
        if arguments is None:
            return
        self.counts[kind] += 1
        self.director.start(["--json", *arguments], then=then, kill=kill, weight=weight)

    def storm(self) -> None:
        """Where nobody else is at work prune and sync get far: each is killed where it changes something."""
        self.director.drain()
        for kind in self.chance.choices(("prune", "sync", "forget", "prune"), k=4):
            arguments, then = getattr(self, f"_{kind}")()
            if arguments is not None:
                self.counts[kind] += 1
                self.director.start(["--json", *arguments], then=then, kill=self.kill(kind, turning=True))
                self.director.drain(spare=False)

    def kill(self, kind: str, *, turning: bool = False) -> Kill:
        """Anywhere, or at a call that changes what others see."""
        how = self.chance.choice(("before", "within", "after"))
        if kind not in TURNING or (self.chance.random() < 0.4 and not turning):
            return Kill(self.chance.choice((self.chance.randrange(1, 15), self.chance.randrange(1, 60))), how)
        call, _, prefix = self.chance.choice(TURNING[kind]).partition(" ")
        return Kill(self.chance.choice((1, 1, 2, 3)), how, call, prefix)

    def some_site(self) -> Site:
        return self.copy if self.copy.exists and self.chance.random() < 0.3 else self.home

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
                assert tag in self.home.sets.values(), "a backup said that it was done, and there is no set"
            if actor.code == 11:
                assert tag not in self.home.sets.values(), "a fenced backup has a set"

        words = ["-r", self.home.url, "backup", str(source), "--name", name, "--tag", tag, "--threads", "1"]
        if self.chance.random() < 0.2:
            words += ["--strategy", self.chance.choice(("full", "differential"))]
        return words, then

    def _restore(self):  # type: ignore[no-untyped-def]
        site = self.some_site()
        if not site.living:
            return None, None
        set_id = self.chance.choice(site.living)
        out = self.folder / f"restored{self.counts['restore']}"

        def then(actor: Actor) -> None:
            self.survey()
            self.expect(actor, {0, 1, 30} if set_id in site.gone else {0})
            if actor.code == 0:
                site.right(set_id, out)
            for left in self.folder.glob(out.name + "*"):
                left.unlink()

        return ["-r", site.url, "restore", set_id, str(out), "--threads", "1"], then

    def _verify(self):  # type: ignore[no-untyped-def]
        site = self.some_site()
        if not site.living:
            return None, None
        set_id = self.chance.choice(site.living)

        def then(actor: Actor) -> None:
            self.survey()
            self.expect(actor, {0, 1, 30} if set_id in site.gone else {0})

        return ["-r", site.url, "verify", set_id, "--threads", "1"], then

    def _forget(self):  # type: ignore[no-untyped-def]
        site = self.some_site()
        if len(site.living) < 3:
            return None, None
        if self.chance.random() < 0.5:
            words = ["forget", *self.chance.sample(site.living, self.chance.randrange(1, 3))]
            words += [word for name in LINEAGES for word in ("--last-of", name)]
        else:
            words = ["forget", "--keep-last", str(self.chance.randrange(1, 4))]

        def then(actor: Actor) -> None:
            self.survey()
            # What was to be forgotten may have been forgotten by another one meanwhile.
            self.expect(actor, {0, 1} if words[1] != "--keep-last" else {0})

        return ["-r", site.url, *words], then

    def _prune(self):  # type: ignore[no-untyped-def]
        site = self.some_site()
        words = ["-r", site.url, "prune", "--max-unused", self.chance.choice(("0%", "10%", "50%"))]
        codes = {0, 11}  # 11: others undid, again and again, what it had seen
        if self.chance.random() < 0.2 and site is self.home:
            # Not in the copy: what a sync that is fenced by hand and killed leaves, locking.md tells.
            with site.open() as repository:
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
        site = self.some_site()

        def then(actor: Actor) -> None:
            self.survey()
            # A set that is forgotten, and pruned, while a check looks at it may seem damaged to it.
            self.expect(actor, {0, 30})

        repair = ["--repair"] if self.chance.random() < 0.3 else []
        return ["-r", site.url, "check", *repair], then

    def _sync(self):  # type: ignore[no-untyped-def]
        wished = set(self.home.living)
        gone = set(self.home.gone)
        words = ["sync", self.home.url, self.copy.url]
        way = self.chance.random()
        if way < 0.2:
            words += ["--latest", str(self.chance.randrange(1, 3))]
            wished = set()
        elif way < 0.5 and wished:
            # Perhaps one that was forgotten in the copy: it is asked for by name, so it comes back.
            wished = set(self.chance.sample(sorted(wished), 1))
            words += [word for set_id in sorted(wished) for word in ("--set", set_id)]
            self.copy.recalled |= wished
        if self.chance.random() < 0.2:
            words.append("--verify-after")

        def then(actor: Actor) -> None:
            self.survey()
            codes = {0, 11}  # 11: another one made the copy, or what was there changed again and again.
            if self.home.gone - gone:
                codes |= {30} if "--set" not in words else {2, 30}
            self.expect(actor, codes)
            if actor.code == 0:
                copied = self.copy.sets.keys() | self.copy.gone
                lacking = {one for one in wished - self.home.gone if one not in copied}
                assert not lacking, f"a sync said that it was done, and there is no {lacking}"

        return words, then

    # --- the play --------------------------------------------------------------------------

    def run(self) -> None:
        for _ in range(self.operations):
            self.operation()
            for _ in range(self.chance.randrange(1, 40)):
                self.director.turn()
            while len(self.director.actors) > 5:
                self.director.turn()
            if self.chance.random() < 0.04:
                self.storm()
            if self.chance.random() < 0.03:
                self.director.drain()
                self.quiet()
        self.director.drain()
        self.backend.settle()
        self.clean()

    def quiet(self) -> None:
        """Nobody is at work: everything is whole."""
        self.backend.settle()
        self.survey()
        for site in self.sites:
            self.is_whole(site)
            self.some_are_right(site)

    def some_are_right(self, site: Site) -> None:
        """Of the sets of a folder eight are restored, of one that is far two: check has read all blocks."""
        most = 2 if "://" in site.url else 8
        for set_id in self.chance.sample(site.living, min(most, len(site.living))):
            self.is_right(site, set_id)

    def is_whole(self, site: Site, *, repair: bool = False) -> None:
        """A check finds nothing wrong, or nothing that a repair does not mend."""

        def then(actor: Actor) -> None:
            said = actor.out.read_text()
            self.expect(actor, {0} if site is self.home or repair else {0, 30})
            lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
            (summary,) = (line for line in lines if line["message_type"] == "summary")
            # A sync that is killed leaves sets without announcements, which decide nothing, and packs that
            # no segment names, whose blocks may be stored twice. A repair mends both.
            kinds = {problem["kind"] for problem in summary["problems"]}
            assert kinds <= ({"session", "index"} if site is self.copy else set()), summary

        words = ["--json", "-r", site.url, "check", "--read-data", *(["--repair"] if repair else [])]
        self.director.start(words, then=then, weight=1000.0)
        self.director.drain()

    def is_right(self, site: Site, set_id: str) -> None:
        out = self.folder / "quiet.img"
        out.unlink(missing_ok=True)
        self.plain("-r", site.url, "restore", set_id, str(out))
        site.right(set_id, out)

    def clean(self) -> None:
        """One prune, once the dead are fenced, and nothing is left but what the sets need."""
        self.plain("sync", self.home.url, self.copy.url)
        self.survey()
        lacking = set(self.home.living) - set(self.copy.living) - self.copy.gone
        assert not lacking, f"the copy lacks {lacking}"
        for site in self.sites:
            self.some_are_right(site)
            self.is_whole(site, repair=site is self.copy)
            self.plain("-r", site.url, "prune", "--max-unused", "0%")
            self.is_whole(site)
            self.plain("-r", site.url, "check")
            self.some_are_right(site)
            self.counts["records"] += site.spotless()


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(dir=base, prefix="imager-thrash-"))
    for name in list(os.environ):
        if name.startswith(("IMAGER_", "AWS_")):
            monkeypatch.delenv(name)
    for what in ("state", "cache", "spool"):
        (folder / what).mkdir()
        monkeypatch.setenv(f"IMAGER_{what.upper()}_DIR", str(folder / what))
    monkeypatch.setenv("IMAGER_KEYFILE", "")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", list(BACKENDS))
def test_thrash(name: str, request: pytest.FixtureRequest) -> None:
    """Each backend in a process that has no other threads: what is forked in between those of another
    test, an object store's client say, may wait for ever."""
    if lacks := missing(name):
        pytest.skip(lacks)
    if ALONE in os.environ:
        thrash(name, request)
        return
    argv = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "tests/thrash", "-k", name]
    for option in ("--minutes", "--thrash-seed", "--thrash-operations"):
        value = request.config.getoption(option, None)
        argv += [option, str(value)] if value is not None else []
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        argv, cwd=root, env={**own, ALONE: "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="")
    assert running.returncode == 0


def thrash(name: str, request: pytest.FixtureRequest) -> None:
    """Thrash one backend for its share of the time."""
    arena: Path = request.getfixturevalue("arena")
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    minutes = request.config.getoption("--minutes", None) or MINUTES
    only = request.config.getoption("--thrash-seed", None)
    operations = request.config.getoption("--thrash-operations", None)
    seeds = random.Random() if minutes != MINUTES else random.Random(2026)
    total: Counter[str] = Counter()
    kills: Counter[str] = Counter()
    rounds = 0
    with BACKENDS[name](arena) as backend:
        use(backend, monkeypatch)
        operations = operations or backend.operations[minutes > MINUTES]
        end = time.monotonic() + minutes * 60 / len(BACKENDS)
        while time.monotonic() < end:
            seed = only if only is not None else seeds.randrange(1 << 32)
            folder = arena / str(rounds)
            folder.mkdir()
            play = Round(seed, folder, backend, operations)
            try:
                play.run()
            except BaseException:
                log = Path(tempfile.gettempdir()) / f"imager-thrash-{name}-{seed}.log"
                log.write_text("\n".join(play.director.log))
                print(*play.director.log[-60:], sep="\n")
                print(f"every call: {log}")
                again = f"-k {name} --thrash-seed {seed} --thrash-operations {operations}"
                print(f"again: python -m pytest tests/thrash -q {again}")
                raise
            finally:
                play.director.stop()
                shutil.rmtree(folder, ignore_errors=True)
                shutil.rmtree(backend.kept(str(rounds)), ignore_errors=True)
            total += play.counts
            kills += play.director.kills
            rounds += 1
            if only is not None:
                break
    print(json.dumps({"backend": name, "rounds": rounds, **total, "kills": dict(sorted(kills.items()))}))
    if only is None:
        assert rounds and total["killed"] and total["ended"]
