"""Keys are added, changed, removed and rotated, and a repository is never left without a way in."""

from __future__ import annotations

import json
import os
import random
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from imager import reference
from imager.errors import ImagerError, IntegrityError, UsageError, WrongKey
from imager.events import Silent
from imager.repository import (
    forgetting,
    imageset,
    keymemory,
    keyring,
    keys,
    keyslots,
    recovery_key,
    removal,
    sync,
    writers,
)
from imager.repository.check import check
from imager.repository.credentials import Credentials
from imager.repository.format import EPOCHS, REVOKED, SLOTS, canonical
from imager.repository.keyless import open_keyless
from imager.repository.keys import Secret
from imager.repository.prune import Prune, PruneOptions
from imager.repository.repository import Opening, Repository
from imager.storage.errors import AlreadyExists, StorageError
from imager.storage.folder import FolderStorage
from tests.unit.repository.building import Lab, noise

ONE, TWO, THREE = (Secret("keyfile", bytes([n]) * 40) for n in (1, 2, 3))


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="imager-test-") as folder:
        yield Path(folder)


@pytest.fixture
def lab(quick: Path) -> Iterator[Lab]:
    """An encrypted repository in memory, where flushes cost nothing, opened by its keyfile."""
    credentials = Credentials(keyfile=str(quick / "key"), interactive=False)
    repository = Repository.init(FolderStorage(str(quick / "r")), credentials, encryption="keyfile")
    lab = Lab(quick / "r", quick / "key", "keyfile", repository)
    lab.reopen()
    yield lab
    lab.repository.close()


def opened(lab: Lab, secret: Secret, *, writing: bool = True) -> Repository:
    """As somebody with that secret sees it."""

    class Given(Credentials):
        def obtain(self, kinds: Any) -> Secret:
            return secret

    return Repository.open(FolderStorage(str(lab.root)), Given(), writing=writing)


def own(lab: Lab) -> Secret:
    return keys.keyfile(lab.keyfile.read_bytes())


def slots(lab: Lab) -> set[str]:
    return {path.name for path in lab.paths("slots")}


# --- adding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [ONE, keys.passphrase("words"), keys.recovery(b"r" * 20)])
@pytest.mark.parametrize("role", ["full", "read"])
def test_an_added_key_reads(lab: Lab, secret: Secret, role: str) -> None:
    made = lab.backup(disk=noise(3))
    added = keyring.add(lab.repository, secret, role=role, label="another")
    assert (added.kind, added.role, added.label) == (secret.kind, role, "another")
    with opened(lab, secret) as repository:
        assert repository.slot is not None and repository.slot.slot == added.slot
        assert imageset.read_set(repository, made.id).content.name == "d"
        found = {slot.slot: slot for slot in keyslots.listing(repository).slots}
        assert found[added.slot].opened and found[added.slot].reads == (1,)
    # And by the reference reader.
    given = {"keyfile": "keyfile", "passphrase": "passphrase", "recovery": "recovery"}[secret.kind]
    value: Any = secret.value.decode() if secret.kind == "passphrase" else secret.value
    other = reference.Repository(str(lab.root), **{given: value})
    assert other.images(other.resolve("latest"))[0].disk == "disk"


def test_a_key_that_reads_changes_nothing(lab: Lab) -> None:
    keyring.add(lab.repository, ONE, role="read")
    before = slots(lab)
    with opened(lab, ONE) as repository:
        for attempt in (
            lambda: keyring.add(repository, TWO),
            lambda: removal.remove(repository, "keyfile"),
            lambda: keyring.rotate(repository, ONE),
        ):
            with pytest.raises(WrongKey, match="role read"):
                attempt()
    assert slots(lab) == before


def test_wishes_that_make_no_sense(lab: Lab, make_lab: Callable[[str], Lab]) -> None:
    repository = lab.repository
    for options in (
        {"role": "write"},
        {"role": "full", "host": "h"},
        {"role": "admin"},
        {"label": "two\nlines"},
        {"label": "x" * 256},
        {"label": "keyfile"},  # taken
    ):
        with pytest.raises(UsageError):
            keyring.add(repository, ONE, **options)
    for call in (keyslots.listing, lambda r: keyring.add(r, ONE), lambda r: removal.remove(r, "x")):
        with pytest.raises(UsageError, match="not encrypted"):
            call(make_lab("none").repository)
    assert len(slots(lab)) == 1


def test_what_goes_wrong_with_a_sheet_leaves_no_slot(lab: Lab) -> None:
    before = slots(lab)
    with pytest.raises(OSError), keyring.recovery(lab.repository, label="sheet"):
        raise OSError("the printer is on fire")
    assert slots(lab) == before
    with keyring.recovery(lab.repository, label="sheet") as sheet:
        pass
    with opened(lab, keys.recovery(recovery_key.decode(sheet.key))) as repository:
        assert repository.slot is not None and repository.slot.slot == sheet.slot


# --- removing ---------------------------------------------------------------------------------


def test_the_last_full_slot_stays(lab: Lab) -> None:
    keyring.add(lab.repository, ONE, role="read", label="reader")
    keyring.add(lab.repository, TWO, role="write", host="h", label="writer")
    before = slots(lab)
    with pytest.raises(UsageError, match="last full"):
        removal.remove(lab.repository, "keyfile")
    assert slots(lab) == before
    keyring.add(lab.repository, THREE, label="second")
    gone = removal.remove(lab.repository, "keyfile")
    assert (gone.role, gone.remaining, gone.revoked) == ("full", 3, None)
    with pytest.raises(WrongKey):
        opened(lab, own(lab))
    with opened(lab, THREE) as repository, pytest.raises(UsageError, match="last full"):
        removal.remove(repository, "second")
    with opened(lab, THREE) as repository:
        assert removal.remove(repository, "reader").remaining == 2
    with pytest.raises(WrongKey):
        opened(lab, ONE)


def test_a_slot_that_lacks_an_epoch_is_not_the_last_way_in(lab: Lab) -> None:
    keyring.add(lab.repository, ONE, label="old")
    keyring.rotate(lab.repository, own(lab))
    with opened(lab, own(lab)) as repository, pytest.raises(UsageError, match="every key epoch"):
        removal.remove(repository, "keyfile")  # `old` would be left, and it lacks epoch 2
    with opened(lab, ONE) as repository:
        with pytest.raises(UsageError, match="every key epoch"):
            removal.remove(repository, "keyfile")
        assert removal.remove(repository, "old").remaining == 1


def test_names_of_slots(lab: Lab) -> None:
    added = keyring.add(lab.repository, ONE, label="café")
    found, _, _ = keyslots.read_slots(lab.repository)
    for text in ("café", added.slot, added.slot[:8], added.slot[:8].upper()):
        assert keyslots.find(found, text).slot == added.slot
    for text in ("caf", added.slot[:3], "", "0" * 31 + "g"):
        with pytest.raises(UsageError, match="no key slot"):
            keyslots.find(found, text)
    with pytest.raises(UsageError, match="any of 2"):
        keyslots.find([*found, *found], added.slot)


class Turns:
    """Threads that go one call of the storage at a time, in an order that is given."""

    def __init__(self, storage: FolderStorage, order: Callable[[list[int]], int]) -> None:
        self._storage = storage
        self._order = order
        self._arrived = threading.Semaphore(0)
        self._go: dict[int, threading.Semaphore] = {}
        self._local = threading.local()
        self.url = storage.url

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._storage, name)

        def step(*arguments: Any) -> Any:
            # Objects never change: when one is read makes no difference. Nor does what is listed to tidy up.
            if not (name == "list_names" and (arguments != (SLOTS,) or self._local.deleted)):
                self._arrived.release()
                self._go[self._local.number].acquire()
            self._local.deleted |= name == "delete"
            return call(*arguments)

        return step if name in ("create", "delete", "list_names") else call

    def run(self, jobs: list[Callable[[], None]]) -> None:
        """Run all jobs to their end, each in a thread."""
        alive: set[int] = set()
        failed: list[BaseException] = []

        def work(number: int) -> None:
            self._local.number, self._local.deleted = number, False
            try:
                jobs[number]()
            except BaseException as error:
                failed.append(error)
            finally:
                alive.discard(number)
                self._arrived.release()

        threads = []
        for number in range(len(jobs)):
            self._go[number] = threading.Semaphore(0)
            alive.add(number)
            threads.append(threading.Thread(target=work, args=(number,)))
            threads[-1].start()
            self._arrived.acquire()
        while alive:
            self._go[self._order(sorted(alive))].release()
            self._arrived.acquire()
        for thread in threads:
            thread.join()
        for error in failed:
            raise error


def schedules(run: Callable[[Callable[[list[int]], int]], None]) -> Iterator[None]:
    """Run `run` once for every order of steps there is: each choice is made in every way."""
    prefix: list[int] = []
    while True:
        taken: list[tuple[int, int]] = []

        def order(waiting: list[int], taken: list[tuple[int, int]] = taken) -> int:
            at = prefix[len(taken)] if len(taken) < len(prefix) else 0
            taken.append((at, len(waiting)))
            return waiting[at]

        run(order)
        yield
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        prefix[:] = [at for at, _ in taken[:-1]] + [taken[-1][0] + 1]


def racing(lab: Lab, targets: list[int], order: Callable[[list[int]], int]) -> list[bool]:
    """Removals of slots (by number) at once, from a repository with as many full slots: which succeeded."""
    storage = lab.storage
    turns = Turns(storage, order)
    found, _, _ = keyslots.read_slots(lab.repository)
    done = [False] * len(targets)

    def remover(number: int) -> Callable[[], None]:
        repository = Repository(
            turns,
            lab.repository.config,
            lab.repository.secrets,
            lab.repository.slot,  # type: ignore[arg-type]
        )

        def job() -> None:
            try:
                removal.delete_slot(repository, found[targets[number]])
                done[number] = True
            except UsageError:
                pass

        return job

    turns.run([remover(number) for number in range(len(targets))])
    return done


def restored(lab: Lab, kept: dict[str, bytes]) -> None:
    for path in lab.paths("slots"):
        path.unlink()
    for name, raw in kept.items():
        (lab.root / "slots" / name).write_bytes(raw)


@pytest.mark.parametrize("targets", [[0, 1], [0, 0]], ids=["two slots", "the same slot twice"])
def test_two_removals_at_once_in_every_order(lab: Lab, targets: list[int]) -> None:
    keyring.add(lab.repository, ONE, label="second")
    kept = {path.name: path.read_bytes() for path in lab.paths("slots")}
    results: set[tuple[bool, ...]] = set()
    count = 0

    def run(order: Callable[[list[int]], int]) -> None:
        restored(lab, kept)
        results.add(tuple(racing(lab, targets, order)))

    for _ in schedules(run):
        count += 1
        left = Opening.slot_ids(lab.storage)
        assert left, "nobody can open it any more"
        assert not [path for path in lab.paths("slots") if "removing" in path.name], "a mark stayed"
    assert count > 100
    if targets == [0, 1]:
        assert results == {(True, False), (False, True), (False, False)}
    else:
        assert results >= {(True, True)}


def test_removals_of_all_three_in_many_orders(lab: Lab) -> None:
    keyring.add(lab.repository, ONE, label="second")
    keyring.add(lab.repository, TWO, label="third")
    kept = {path.name: path.read_bytes() for path in lab.paths("slots")}
    for seed in range(80):
        restored(lab, kept)
        racing(lab, [0, 1, 2, seed % 3], random.Random(seed).choice)
        assert Opening.slot_ids(lab.storage), f"seed {seed}: nobody can open it any more"


def test_a_removal_that_was_killed_counts_as_done_until_it_is(lab: Lab) -> None:
    added = keyring.add(lab.repository, ONE, label="second")
    mark = lab.root / "slots" / f"{added.slot}.removing-{'0' * 16}"
    mark.touch()
    with pytest.raises(UsageError, match="being removed"):
        removal.remove(lab.repository, "keyfile")
    shown = {slot.slot: slot.removing for slot in keyslots.listing(lab.repository).slots}
    assert shown[added.slot] and sum(shown.values()) == 1
    with opened(lab, ONE):
        pass  # it opens as long as it is there
    removal.remove(lab.repository, "second")
    assert not mark.exists() and len(slots(lab)) == 1


class Dying:
    """A storage that takes a number of changes and then none."""

    def __init__(self, storage: FolderStorage, left: int) -> None:
        self._storage, self._left, self.url = storage, left, storage.url

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._storage, name)
        if name not in ("create", "delete"):
            return call

        def step(*arguments: Any) -> Any:
            if not self._left:
                raise StorageError("the machine died")
            self._left -= 1
            return call(*arguments)

        return step


@pytest.mark.parametrize("job", ["remove", "change", "rotate"])
def test_killed_at_every_step(lab: Lab, job: str) -> None:
    """Wherever it stops, what was given opens the repository, reads all, and the job can be done again."""
    made = lab.backup(disk=noise(2))
    keyring.add(lab.repository, ONE, label="second")
    root = {path: path.read_bytes() for kind in ("slots", "epochs") for path in lab.paths(kind)}
    jobs: dict[str, Callable[[Repository], object]] = {
        "remove": lambda repository: removal.remove(repository, "second"),
        "change": lambda repository: keyring.change(repository, TWO),
        "rotate": lambda repository: keyring.rotate(repository, own(lab)),
    }
    for left in range(20):
        for kind in ("slots", "epochs"):
            for path in lab.paths(kind):
                path.unlink()
        for path, raw in root.items():
            path.write_bytes(raw)
        Path(keymemory.KeyMemory(lab.repository.id)._path).unlink(missing_ok=True)
        repository = lab.reopen()
        storage: Any = Dying(lab.storage, left)
        dying = Repository(storage, repository.config, repository.secrets, repository.slot)
        try:
            jobs[job](dying)
            died = False
        except StorageError:
            died = True
        secret = own(lab)
        try:
            after = opened(lab, secret)
        except WrongKey:
            assert job == "change"
            after = opened(lab, secret := TWO)
        with after:
            assert imageset.read_set(after, made.id).content.name == "d"
            lab.repository = after
            if died and secret is not TWO:
                try:
                    jobs[job](after)
                except UsageError:
                    assert job == "remove" and len(slots(lab)) in (1, 2), "it was all but done"
            lab.repository = opened(lab, TWO if job == "change" else own(lab))
            later = lab.backup(disk=noise(3, 1))
            assert later.content.name == "d"
            found = keyslots.listing(lab.repository)
            assert not [slot for slot in found.slots if slot.removing] and not found.problems
            assert len(found.slots) == 1 if job == "remove" else len(found.slots) <= 3
        if not died:
            assert left > 2
            return
    raise AssertionError("it never ended")


# --- another secret ------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["full", "read", "write"])
def test_changing_the_secret(lab: Lab, role: str) -> None:
    host = {"host": imageset.this_host()} if role == "write" else {}
    before = keyring.add(lab.repository, ONE, role=role, label="mine", **host)
    with opened(lab, ONE) as repository:
        added, gone = keyring.change(repository, keys.passphrase("new words"))
        assert (added.role, added.label, added.writer) == (role, "mine", before.writer)
        assert gone.slot == before.slot
    with pytest.raises(WrongKey):
        opened(lab, ONE)
    with opened(lab, keys.passphrase("new words")) as repository:
        assert repository.secrets.role == role
        assert [slot.label for slot in keyslots.listing(repository).slots] == ["keyfile", "mine"]


def test_changing_the_secret_does_not_void_a_sheet(lab: Lab) -> None:
    with keyring.recovery(lab.repository) as sheet:
        pass
    secret = keys.recovery(recovery_key.decode(sheet.key))
    with opened(lab, secret) as repository, pytest.raises(UsageError, match="void its sheet"):
        keyring.change(repository, ONE)
    with opened(lab, secret):
        assert len(slots(lab)) == 2


# --- rotating --------------------------------------------------------------------------------------


def test_after_a_rotation_older_keys_read_older_sets_alone(lab: Lab) -> None:
    first = lab.backup(disk=noise(2))
    keyring.add(lab.repository, ONE, label="old full")
    keyring.add(lab.repository, TWO, role="read", label="old reader")
    rotated = keyring.rotate(lab.repository, own(lab))
    assert rotated.epoch == 2 and {slot.label for slot in rotated.lacking} == {"old full", "old reader"}
    lab.repository = opened(lab, own(lab))
    assert sorted(lab.repository.secrets.epochs) == [1, 2]
    second = lab.backup(disk=noise(2, 1))
    assert int.from_bytes((second.envelope or b"")[4:8], "little") == 2
    for secret in (ONE, TWO):
        with opened(lab, secret) as repository:
            listed = {one.id: one for one in imageset.list_sets(repository).sets}
            assert listed[first.id].content.name == "d" and listed[second.id].body is None
            with pytest.raises(WrongKey):
                _ = listed[second.id].content
            found = check(repository, Silent(), read_data="all")
            assert found.ok and any("1 of 2 image sets cannot be read" in note for note in found.notes)
    with opened(lab, ONE) as repository, pytest.raises(WrongKey, match="epoch 2"):
        keyring.rotate(repository, ONE)
    # A set can be made with a key that lacks the epoch, and it cannot read it.
    lab.repository = opened(lab, ONE)
    assert lab.backup(name="other", disk=noise(1, 2)).body is None
    # The reference reader, given the key that has all.
    repository = reference.Repository(str(lab.root), keyfile=own(lab).value)
    assert repository.images(repository.resolve(second.id))[0].size == len(noise(2))


def test_a_rotation_that_loses_a_race_leaves_nothing(lab: Lab) -> None:
    first = opened(lab, own(lab))
    keyring.add(lab.repository, ONE, label="second")
    other = opened(lab, ONE)
    newest = other.newest_epoch

    def late() -> tuple[int, bytes]:
        answer = newest()
        keyring.rotate(first, own(lab))
        return answer

    other.newest_epoch = late  # type: ignore[method-assign]
    before = slots(lab)
    with pytest.raises(UsageError, match="another rotation"):
        keyring.rotate(other, ONE)
    assert len(slots(lab)) == len(before)
    with opened(lab, ONE) as repository:
        assert list(repository.secrets.epochs) == [1]


def test_two_rotations_of_one_secret_at_once_are_one(lab: Lab) -> None:
    """The second takes the slot of the first for that of a rotation that was killed, and ends it."""
    first, second = opened(lab, own(lab)), opened(lab, own(lab))
    create = first.storage.create

    def late(name: str, data: bytes) -> None:
        if name.startswith(EPOCHS):
            keyring.rotate(second, own(lab))
        create(name, data)

    first.storage.create = late  # type: ignore[method-assign]
    assert keyring.rotate(first, own(lab)).epoch == 2
    assert len(slots(lab)) == 1
    with opened(lab, own(lab)) as repository:
        number, public = repository.newest_epoch()
        assert number == 2 and keys.epoch_public(repository.secrets.epochs[2]) == public


def test_what_a_lost_race_left_is_not_built_on(lab: Lab) -> None:
    """A slot whose private key of the newest epoch was never used: no slot that is made of it, or instead."""
    first = lab.repository.secrets
    stray = keys.Secrets(first.id_key, first.signing_seed, {**first.epochs, 2: os.urandom(32)})
    keyring.rotate(lab.repository, own(lab))
    lab.repository = opened(lab, own(lab))
    genuine = lab.repository.slot
    made = lab.backup(disk=noise(2))
    assert genuine is not None
    slot, raw = keys.new_slot(lab.repository.id, stray, own(lab), label=genuine.label)
    (lab.root / SLOTS / slot).write_bytes(raw)
    keymemory.KeyMemory(lab.repository.id).opened(slot)
    repository = opened(lab, own(lab))
    assert repository.slot is not None and repository.slot.slot == slot
    for change in (lambda: keyring.add(repository, ONE), lambda: keyring.change(repository, TWO)):
        with pytest.raises(WrongKey, match="never used"):
            change()
    assert slots(lab) == {slot, genuine.slot}
    assert keyring.rotate(repository, own(lab)).slot == genuine.slot and slots(lab) == {genuine.slot}
    with opened(lab, own(lab)) as again:
        assert imageset.read_set(again, made.id).content.name == "d"


def test_the_epoch_does_not_go_back(lab: Lab) -> None:
    """Somebody deletes the newest epoch, so that backups use a key again that a thief has."""
    write = {"role": "write", "host": "*"}
    keyring.rotate(lab.repository, own(lab))
    lab.repository = opened(lab, own(lab))
    keyring.add(lab.repository, ONE, label="writer", **write)
    epoch = lab.root / EPOCHS / "00000002"
    raw = epoch.read_bytes()
    epoch.unlink()
    with opened(lab, ONE) as repository, pytest.raises(IntegrityError, match="epoch 2 is gone"):
        repository.newest_epoch()
    # A full key has it, and puts it back bit for bit.
    with opened(lab, own(lab)) as repository:
        assert repository.newest_epoch()[0] == 2 and epoch.read_bytes() == raw
    # Junk in place of a newer one stops nobody.
    (lab.root / EPOCHS / "ffffffff").write_bytes(raw)
    with opened(lab, ONE) as repository:
        assert repository.newest_epoch()[0] == 2


def test_what_this_machine_saw_of_epochs_counts_too(lab: Lab) -> None:
    keyring.add(lab.repository, ONE, role="write", host="*", label="from before")
    keyring.rotate(lab.repository, own(lab))
    epoch = lab.root / EPOCHS / "00000002"
    with opened(lab, ONE) as repository:
        assert repository.newest_epoch()[0] == 2
    epoch.unlink()
    with opened(lab, ONE) as repository, pytest.raises(IntegrityError, match="epoch 2 is gone"):
        repository.newest_epoch()
    Path(keymemory.KeyMemory(lab.repository.id)._path).write_bytes(b"not json")
    with opened(lab, ONE) as repository:
        assert repository.newest_epoch()[0] == 1, "nobody here can know better"


# --- writers -----------------------------------------------------------------------------------------


def writing(lab: Lab, secret: Secret = ONE, **options: Any) -> Repository:
    keyring.add(lab.repository, secret, role="write", host="host", **options)
    lab.repository = opened(lab, secret)
    return lab.repository


def test_a_writer_signs_and_reads_nothing(lab: Lab) -> None:
    full = lab.repository
    writer = writing(lab, label="db1")
    made = lab.backup(disk=noise(4))
    assert made.body is None and made.public.writer == writer.secrets.writer
    assert imageset.read_set(full, made.id).content.host == "host"
    with pytest.raises(WrongKey):
        imageset.select_image(imageset.resolve(writer, "d", host="host"), None)
    other = reference.Repository(str(lab.root), keyfile=own(lab).value)
    assert other.images(other.resolve(made.id))[0].size == len(noise(4))
    with pytest.raises(reference.WrongKey):
        mine = reference.Repository(str(lab.root), keyfile=ONE.value)
        mine.images(mine.resolve(made.id))


def test_a_revoked_writer_signs_no_more(lab: Lab) -> None:
    full = lab.repository
    writer = writing(lab, label="db1")
    before = lab.backup(disk=noise(2))
    removed = removal.remove(full, "db1")
    assert removed.revoked == (before.public.writer and before.public.writer.writer)
    assert (removed.kept, removed.role, removed.remaining) == (1, "write", 1)
    with pytest.raises(WrongKey):
        opened(lab, ONE)
    # Its holder kept the key, and goes on.
    with pytest.raises(IntegrityError, match="revoked"):
        lab.repository.forget_revocations()
        lab.backup(disk=noise(2, 1))
    listing = imageset.list_sets(opened(lab, own(lab)))
    assert [one.id for one in listing.sets] == [before.id]
    assert len(listing.problems) == 1 and "revoked" in listing.problems[0].reason
    assert not check(opened(lab, own(lab)), Silent()).ok
    other = reference.Repository(str(lab.root), keyfile=own(lab).value)
    assert other.resolve(before.id)
    with pytest.raises(reference.Damaged, match="revoked"):
        other.resolve(listing.problems[0].id)
    # What does not count keeps no prune from its work, and nothing lives by it.
    with (
        open_keyless(FolderStorage(str(lab.root)), writing=True) as keyless,
        Prune(keyless, PruneOptions(), Silent()) as work,
    ):
        summary = work.execute(work.plan())
    assert summary.packs_deleted == 2
    assert check(opened(lab, own(lab)), Silent(), read_data="all").problems[0].kind == "set"
    # Without a slot it is named by what it signed; a second time nothing changes.
    assert removal.remove(opened(lab, own(lab)), "db1").kept == 1
    assert writer.secrets.writer is not None


def test_a_certificate_in_a_slot_revokes_nobody_else(lab: Lab) -> None:
    """Whoever can write puts the certificate of another writer into the slot of a lost machine's key."""
    full = lab.repository
    keyring.add(full, TWO, role="write", host="host", label="db2")
    writer = writing(lab, label="db1")
    for certificate in (opened(lab, TWO).secrets.writer, None):
        assert writer.slot is not None and writer.secrets.writer is not None
        path = lab.root / SLOTS / writer.slot.slot
        value = json.loads(path.read_bytes())
        before = value["writer"]
        value["writer"] = msgspec.to_builtins(certificate) if certificate else {**before, "host": "*"}
        path.write_bytes(canonical(value))
        there = slots(lab)
        with pytest.raises(IntegrityError, match="whom to revoke"):
            removal.remove(full, "db1")
        assert slots(lab) == there and full.revoked() == {}
        path.write_bytes(canonical({**value, "writer": before}))
    lab.backup(disk=noise(2))
    path.write_bytes(canonical({**value, "writer": msgspec.to_builtins(opened(lab, TWO).secrets.writer)}))
    # Who has signed something is found by that.
    removed = removal.remove(full, "db1")
    assert (removed.revoked, removed.kept) == (writer.secrets.writer.writer, 1)
    assert set(full.revoked()) == {writer.secrets.writer.writer} and path.name not in slots(lab)


def test_what_a_copy_still_has_of_a_revoked_writer_counts(lab: Lab, tmp_path: Path) -> None:
    """Also where the original has forgotten it long ago."""
    full = lab.repository
    writing(lab, label="db1")
    first, second = lab.backup(disk=noise(2)), lab.backup(disk=noise(2, 1))
    target = FolderStorage(str(tmp_path / "copy"))
    with open_keyless(FolderStorage(str(lab.root))) as source:
        sync.sync(source, target, sync.Wishes(), Silent())
    plan = forgetting.plan_sets(full, [first.id], Silent())
    forgetting.execute(full, plan, Silent())
    assert removal.remove(full, "db1").kept == 1
    with open_keyless(FolderStorage(str(lab.root))) as source:
        assert sync.sync(source, target, sync.Wishes(), Silent()).ok
    lab.repository.close()
    with opened(Lab(tmp_path / "copy", lab.keyfile, "keyfile", full), own(lab)) as repository:
        assert repository.revoked()
        listing = imageset.list_sets(repository)
        assert ([one.id for one in listing.sets], listing.problems) == ([first.id, second.id], ())
        assert check(repository, Silent(), read_data="all").ok


def test_a_revocation_that_is_deleted_still_counts_here(lab: Lab) -> None:
    full = lab.repository
    writing(lab, label="db1")
    removed = removal.remove(full, "db1")
    with pytest.raises(IntegrityError, match="revoked"):
        lab.backup(disk=noise(2))
    assert opened(lab, own(lab)).revoked()
    (lab.root / REVOKED / str(removed.revoked)).unlink()
    with opened(lab, own(lab)) as repository:
        assert ["revoked" in item.reason for item in imageset.list_sets(repository).problems] == [True]
        found = check(repository, Silent())
        assert "revocation" in {problem.kind for problem in found.problems}


def test_junk_among_revocations_revokes_nobody(lab: Lab) -> None:
    full = lab.repository
    writer = writing(lab, label="db1")
    assert writer.secrets.writer is not None
    made = lab.backup(disk=noise(2))
    name = writer.secrets.writer.writer
    forged = writers.new_revocation(full.id, b"f" * 32, name, [])
    (lab.root / REVOKED).mkdir(exist_ok=True)
    for raw in (forged, b"", b"{}", forged[:-9]):
        (lab.root / REVOKED / name).write_bytes(raw)
        with opened(lab, own(lab)) as repository:
            assert [one.id for one in imageset.list_sets(repository).sets] == [made.id]
            assert repository.revocation_problems
            problems = check(repository, Silent()).problems
            assert {problem.kind for problem in problems} == {"revocation"}
    with pytest.raises(UsageError, match="there already"):
        removal.remove(full, "db1")
    assert len(slots(lab)) == 2, "what could not be revoked keeps its slot"


def test_a_storage_that_refuses(lab: Lab) -> None:
    with pytest.raises((AlreadyExists, ImagerError)):
        lab.storage.create(SLOTS + next(iter(slots(lab))), b"")
