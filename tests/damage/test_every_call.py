"""Every call of every command fails, and after every call the process is gone: each in turn.

Whatever the command was, the sets that were there before are right, the same command then
goes through, and a prune leaves nothing but what the sets need.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from imager.engine import backup, restore
from imager.engine.backup import BackupOptions
from imager.engine.restore import RestoreOptions
from imager.errors import ImagerError, IntegrityError
from imager.events import Silent
from imager.repository import forgetting, imageset, sessions, sync
from imager.repository.check import check
from imager.repository.credentials import Credentials
from imager.repository.keyless import open_keyless
from imager.repository.locator import records_of
from imager.repository.prune import Prune, PruneOptions
from imager.repository.repository import Repository
from imager.repository.sync import Wishes
from imager.storage.base import Storage
from imager.storage.folder import FolderStorage
from imager.storage.rehearsal import Crash, Crashing, Distant, Eventual, Faulty

BLOCK = 4096


@dataclass(slots=True)
class World:
    """A repository with three sets, one of them forgotten; and a copy that has one. `images`: by set."""

    folder: Path
    images: dict[str, bytes]
    gone: str
    "The oldest set: forgetting it leaves something to prune."

    @property
    def root(self) -> Path:
        return self.folder / "repo"

    @property
    def copy(self) -> Path:
        return self.folder / "copy"

    def credentials(self) -> Credentials:
        return Credentials(keyfile=str(self.folder / "key"), interactive=False)

    def open(self, storage: Storage) -> Repository:
        return Repository.open(storage, self.credentials(), writing=True)

    def at(self, place: Path) -> World:
        """The same in another folder."""
        shutil.copytree(self.folder, place)
        return World(place, dict(self.images), self.gone)


def back_up(world: World, storage: Storage, content: bytes) -> str:
    image = world.folder / "image"
    image.write_bytes(content)
    with world.open(storage) as repository:
        plan = backup.plan(repository, [str(image)], BackupOptions(name="d", threads=1), Silent())
        return backup.execute(repository, plan, Silent()).set


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    place = Path(tempfile.mkdtemp(dir=base, prefix="imager-calls-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IMAGER_STATE_DIR", str(place / "state"))
        patch.setenv("IMAGER_CACHE_DIR", str(place / "cache"))
        patch.setenv("IMAGER_SPOOL_DIR", str(place))
        world = World(place / "world", {}, "")
        world.folder.mkdir()
        (world.folder / "key").write_bytes(bytes(range(64)))
        storage = FolderStorage(str(world.root))
        Repository.init(storage, world.credentials(), encryption="keyfile", block_size=BLOCK).close()
        chance = random.Random(5)
        content = bytearray(chance.randbytes(40 * BLOCK))
        for number in range(4):
            content[number * 8 * BLOCK : (number + 1) * 8 * BLOCK] = chance.randbytes(8 * BLOCK)
            world.images[back_up(world, storage, bytes(content))] = bytes(content)
            if number == 1:
                copied(world, storage)
        world.gone, second, *_ = world.images
        with world.open(storage) as repository:
            forgetting.execute(repository, forgetting.plan_sets(repository, [second], Silent()), Silent())
        del world.images[second]
        yield world
    shutil.rmtree(place, ignore_errors=True)


# --- the commands ---------------------------------------------------------------------------------


def backed_up(world: World, storage: Storage) -> None:
    content = bytearray(world.images[list(world.images)[-1]])
    content[20 * BLOCK : 24 * BLOCK] = os.urandom(4 * BLOCK)
    world.images[back_up(world, storage, bytes(content))] = bytes(content)


def gives_back(world: World, storage: Storage) -> None:
    for set_id, content in list(world.images.items())[:1]:
        target = world.folder / "restored"
        target.unlink(missing_ok=True)
        with world.open(storage) as repository:
            plan = restore.plan(repository, set_id, str(target), RestoreOptions(), Silent())
            assert restore.execute(repository, plan, Silent()).verified
        assert target.read_bytes() == content


def forgotten(world: World, storage: Storage) -> None:
    with world.open(storage) as repository:
        if world.gone in {one.id for one in imageset.list_sets(repository).sets}:
            plan = forgetting.plan_sets(repository, [world.gone], Silent())
            forgetting.execute(repository, plan, Silent())
    world.images.pop(world.gone, None)


def pruned(world: World, storage: Storage) -> None:
    with (
        open_keyless(storage, writing=True) as repository,
        Prune(repository, PruneOptions(max_unused="0%"), Silent()) as work,
    ):
        work.execute(work.plan())


def repaired(world: World, storage: Storage) -> None:
    with world.open(storage) as repository:
        found = check(repository, Silent(), read_data="all", repair=True, threads=1)
    if not found.ok:
        raise IntegrityError("something could not be read")


def copied(world: World, storage: Storage) -> None:
    with open_keyless(storage) as source:
        assert sync.sync(source, FolderStorage(str(world.copy)), Wishes(), Silent()).ok


def copied_to(world: World, storage: Storage) -> None:
    """The same, where it is the copy whose calls fail."""
    with open_keyless(FolderStorage(str(world.root))) as source:
        assert sync.sync(source, storage, Wishes(), Silent()).ok


def made_a_copy(world: World, storage: Storage) -> None:
    """The same, where there was no copy before."""
    copied_to(world, storage)


Command = Callable[[World, Storage], None]
COMMANDS: tuple[Command, ...] = (
    backed_up, gives_back, forgotten, pruned, repaired, copied, copied_to, made_a_copy,
)  # fmt: skip


def place_of(world: World, command: Command) -> Path:
    """The folder whose calls fail."""
    if command is made_a_copy:
        return world.folder / "new"
    return world.copy if command is copied_to else world.root


# --- what must hold -------------------------------------------------------------------------------


def is_right(world: World, root: Path, *, after: str, dying: bool = False) -> None:
    """All sets are there, and every block of them; one of them, taken at random, is restored as well.

    `dying`: a command has just ended early. Then the blocks are enough: a restore takes longer.
    """
    if not (root / "config").exists():
        return
    storage = FolderStorage(str(root))
    with world.open(storage) as repository:
        found = check(repository, Silent(), read_data="all", threads=1)
        # A sync dies between a set and its announcement: the next one copies that.
        problems = [one for one in found.problems if one.kind != "session" or not dying]
        assert not problems, (after, problems)
        there = {one.id for one in imageset.list_sets(repository).sets}
        if root == world.root:
            assert there >= set(world.images) - {world.gone}, after
    for set_id in () if dying else random.Random(after).sample(sorted(there & set(world.images)), 1):
        target = world.folder / "looked"
        with world.open(storage) as repository:
            plan = restore.plan(repository, set_id, str(target), RestoreOptions(), Silent())
            assert restore.execute(repository, plan, Silent()).verified
        assert target.read_bytes() == world.images[set_id], after
        target.unlink()


def nothing_is_left_over(world: World, root: Path, after: str) -> None:
    """Once the dead are fenced and a prune has run, there is nothing that no set needs."""
    storage = FolderStorage(str(root))
    with open_keyless(storage) as repository:
        for one in sessions.open_sessions(storage, repository.config.repository):
            sessions.fence(storage, one.id, "it died in the test")
    pruned(world, storage)
    with (
        open_keyless(storage, writing=True) as repository,
        Prune(repository, PruneOptions(max_unused="0%"), Silent(), dry_run=True) as work,
    ):
        plan = work.plan()
        assert (plan.drop, plan.rewrite, plan.unused, plan.condemned) == ((), (), 0, 0), after
        every = [
            (kind, identity)
            for kind in (1, 2)
            for name in repository.pack_names(kind)
            for _, identity, _, _ in records_of(repository, name, kind)
        ]
        assert len(every) == len(set(every)), after
        ids = {one.id for one in imageset.heads(repository)[0]}
    assert {name.removeprefix("sessions/") for name in storage.list_names("sessions/")} <= ids, after
    assert not storage.list_names("tmp/") and not storage.list_names("damaged/"), after


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: one.__name__)
@pytest.mark.parametrize("way", ["before", "after", "gone"])
def test_every_call(whole: World, command: Command, way: str) -> None:
    """`before`: a call does not arrive; `after`: its answer is lost; `gone`: none arrives any more.

    Of the calls that fail once every third is tried, and all of them where IMAGER_TEST_ALL is set.
    """
    failed = 0
    step = 1 if way == "gone" or os.environ.get("IMAGER_TEST_ALL") else 3
    for number in range(("before", "after", "gone").index(way) if step > 1 else 0, 1000, step):
        world = whole.at(whole.folder.with_name(f"{command.__name__}-{way}-{number}"))
        root = place_of(world, command)
        plain = FolderStorage(str(root))
        # Every third time as a far storage is used: with calls in parallel, and packs fetched in parts.
        counted = Faulty(Distant(plain) if number % 3 == 2 else plain, lambda *_: None)
        broken: Storage = Crashing(counted, number)
        if way != "gone":
            broken = counted = Faulty(
                counted.inner, lambda at, call, name, wrong=number: way if at == wrong else None
            )
        died = False
        try:
            command(world, broken)
        except ImagerError:
            failed += 1
        except Crash:
            died = True
            failed += 1
        ended = not died if way == "gone" else counted.made <= number
        after = f"{command.__name__}: {way} call {number}"
        for place in {world.root, root}:
            is_right(world, place, after=after, dying=True)
        command(world, plain)
        nothing_is_left_over(world, root, after)
        is_right(world, root, after=f"{after}, and all went on")
        shutil.rmtree(world.folder)
        if ended:
            break
    assert (6 if step == 1 else 2) <= failed <= number


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: one.__name__)
def test_listings_that_lag_behind(whole: World, command: Command) -> None:
    """What was made is listed late: at worst something is stored twice, or stays until the next prune."""
    for late in (1, 3, 10):
        world = whole.at(whole.folder.with_name(f"{command.__name__}-late-{late}"))
        root = place_of(world, command)
        storage = Eventual(FolderStorage(str(root)), late)
        command(world, storage)
        command(world, storage)
        for place in {world.root, root}:
            is_right(world, place, after=f"{command.__name__}: listed after {late}")
        pruned(world, FolderStorage(str(root)))
        nothing_is_left_over(world, root, command.__name__)
        is_right(world, root, after=f"{command.__name__}: listed after {late}, pruned")
        shutil.rmtree(world.folder)
