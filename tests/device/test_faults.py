"""Disks with unreadable sectors, full and read-only repositories, targets that fail or lie. Real ones.

An unreadable sector is one that the kernel itself answers with EIO: the part of a loop device (in
direct mode) whose backing file was cut off, and a block of a btrfs file whose checksum is wrong.
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import random
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from imager import command
from imager.device.loop import LoopDevice, attach
from imager.engine import restore
from imager.errors import TargetError
from imager.events import Silent
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.storage.folder import FolderStorage
from tests.damage.test_faults import during_backup
from tests.damage.workshop import Place, read_back, restored

MIB = 1 << 20

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="needs loop devices"),
]


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path)
    for key, value in place.environment().items():
        monkeypatch.setenv(key, value)
    (tmp_path / "key").write_bytes(os.urandom(64))
    assert place.imager("init", place.root, "--encryption", "keyfile").code == 0
    return place


def memory(folder: Path, undo: ExitStack, size: str) -> Path:
    """A tmpfs of this test, of so many bytes."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=False)
    if done.returncode:
        pytest.skip("no tmpfs can be mounted here")
    undo.callback(command.run, ["umount", str(folder)])
    # What failed keeps its frames, and so its open packs, until its cycle of references is collected.
    undo.callback(gc.collect)
    return folder


# --- sectors that cannot be read --------------------------------------------------------------


def cut_off(place: Place, undo: ExitStack, size: int, left: int) -> tuple[LoopDevice, bytes]:
    """A loop device of `size` bytes of which only the first `left` can be read."""
    backing = place.folder / "failing"
    data = os.urandom(size)
    backing.write_bytes(data)
    device = undo.enter_context(attach(backing, direct_io=True))
    os.truncate(backing, left)
    fd = os.open(device.path, os.O_RDONLY | os.O_DIRECT)
    try:
        os.preadv(fd, [memoryview(mmap.mmap(-1, 512))], left)
    except OSError:
        return device, data
    finally:
        os.close(fd)
    pytest.skip("this kernel reads zeroes where a loop device has no backing")


@pytest.mark.parametrize("left", [3 * MIB, 3 * MIB + 512, 3 * MIB + 4096 + 3 * 512, 4 * MIB - 512])
def test_unreadable_sectors(place: Place, undo: ExitStack, left: int) -> None:
    device, data = cut_off(place, undo, 4 * MIB, left)
    lost = [[left, 4 * MIB - left]]

    ended = place.imager("backup", device.path, "--name", "disk")
    assert ended.code == 1 and not place.files("sets")
    assert (
        device.path in ended.err and "Input/output error" in ended.err and "--on-read-error skip" in ended.err
    )

    ended = place.imager("backup", device.path, "--name", "disk", "--on-read-error", "skip")
    assert ended.code == 3 and ended.summary["images"][0]["unreadable"] == lost
    expected = data[:left] + bytes(4 * MIB - left)
    all_of_them_tell(place, device.name, expected, lost)

    # The disk is replaced by a healthy one: what was lost is read now.
    (place.folder / "failing").write_bytes(data)
    ended = place.imager("backup", device.path, "--name", "disk")
    assert ended.code == 0 and not ended.summary["images"][0]["unreadable"]
    code, out = restored(place, (ended.summary["set"], device.name), place.folder / "healthy")
    assert (code.code, out) == (0, data)


def all_of_them_tell(place: Place, disk: str, expected: bytes, lost: list[list[int]]) -> None:
    show = place.imager("show", "disk")
    assert show.code == 0 and json.dumps(lost).replace(" ", "") in show.out
    verify = place.imager("verify", "disk")
    assert verify.code == 0 and verify.summary["unreadable"] == [[disk, *extent] for extent in lost]
    ended, out = restored(place, ("disk", disk), place.folder / "out")
    assert ended.code == 3 and out == expected and ended.summary["unreadable"] == lost
    assert read_back(place, ("disk", disk), place.folder / "reference") == expected


@pytest.fixture
def rotten(place: Place, undo: ExitStack) -> tuple[Path, bytes, list[list[int]]]:
    """A file on btrfs some of whose 4 KiB blocks have wrong checksums: EIO in the middle of it."""
    if command.find("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not installed")
    backing, folder = place.folder / "btrfs", place.folder / "mounted"
    with backing.open("wb") as file:
        file.truncate(160 * MIB)
    command.run(["mkfs.btrfs", "-q", "-d", "single", "-m", "single", str(backing)])
    folder.mkdir()
    data = os.urandom(6 * MIB)

    def mount() -> None:
        if subprocess.run(["mount", "-o", "loop", backing, folder], check=False).returncode:
            pytest.skip("btrfs cannot be mounted here")

    mount()
    (folder / "image").write_bytes(data)
    subprocess.run(["umount", folder], check=True)
    raw = backing.read_bytes()
    bad = [0, 4096, 70 * 4096, 300 * 4096, 302 * 4096, len(data) - 4096]
    with backing.open("r+b") as file:
        for at in bad:
            where = raw.index(data[at : at + 4096])
            file.seek(where + 100)
            file.write(b"rotten")
    mount()
    undo.callback(subprocess.run, ["umount", folder], check=True)
    return folder / "image", data, [[0, 8192], *([at, 4096] for at in bad[2:])]


@pytest.mark.parametrize("through", ["file", "device"])
def test_unreadable_blocks_in_the_middle(
    place: Place, undo: ExitStack, rotten: tuple[Path, bytes, list[list[int]]], through: str
) -> None:
    path, data, lost = rotten
    source = str(path)
    if through == "device":
        source = undo.enter_context(attach(path, direct_io=True)).path
    ended = place.imager("backup", source, "--name", "disk")
    assert ended.code == 1 and not place.files("sets")
    said = re.search(r"cannot be read at byte (\d+): Input/output error", ended.err)  # by one of the threads
    assert said and any(start <= int(said[1]) < start + length for start, length in lost), ended.err
    ended = place.imager("backup", source, "--name", "disk", "--on-read-error", "skip")
    assert ended.code == 3 and ended.summary["images"][0]["unreadable"] == lost
    expected = bytearray(data)
    for start, length in lost:
        expected[start : start + length] = bytes(length)
    all_of_them_tell(place, os.path.basename(source), bytes(expected), lost)


def test_a_device_that_vanishes(place: Place, undo: ExitStack) -> None:
    """Its backing is gone from one moment to the next, and then so is its capacity."""
    backing = place.folder / "large"
    with backing.open("wb") as file:
        for _ in range(480):
            file.write(os.urandom(MIB))
    device = undo.enter_context(attach(backing, direct_io=True))

    def vanish() -> None:
        os.truncate(backing, 0)
        device.update_capacity()

    code, said = during_backup(place, Path(device.path), vanish)
    assert code == 1 and device.path in said and not place.files("sets"), said
    check = place.imager("check", "--read-data")
    assert (check.code, check.summary["problems"]) == (0, [])


# --- repositories that cannot be written ----------------------------------------------------------


def test_a_full_repository(place: Place, undo: ExitStack) -> None:
    folder = memory(place.folder / "full", undo, "24m")
    root = folder / "r"
    (place.folder / "r").rename(place.folder / "unused")
    root.mkdir()
    os.symlink(root, place.folder / "r")
    assert place.imager("init", place.root, "--encryption", "none").code == 0
    small, large = place.folder / "small", place.folder / "large"
    small.write_bytes(os.urandom(4 * MIB))
    large.write_bytes(os.urandom(40 * MIB))
    first = place.imager("backup", small, "--name", "disk")
    assert first.code == 0
    used = os.statvfs(folder).f_bfree
    for _ in range(3):
        ended = place.imager("backup", large, "--name", "disk")
        assert ended.code == 1 and "No space left" in ended.err and "free some space" in ended.err
        assert len(place.files("sets")) == 1 and not place.files("tmp")
        # What was staged is gone: not even a page is left of it, but for an announcement or a folder.
        assert used - os.statvfs(folder).f_bfree <= 16
        check = place.imager("check", "--read-data")
        assert (check.code, check.summary["problems"]) == (0, [])
        assert place.imager("verify", "disk").code == 0
    subprocess.run(["mount", "-o", "remount,size=100m", folder], check=True)
    ended = place.imager("backup", large, "--name", "disk")
    assert ended.code == 0
    code, out = restored(place, ("disk", "large"), place.folder / "out")
    assert code.code == 0 and out == large.read_bytes()
    code, out = restored(place, (first.summary["set"], "small"), place.folder / "out")
    assert code.code == 0 and out == small.read_bytes()


def test_a_read_only_repository(place: Place, undo: ExitStack) -> None:
    folder = memory(place.folder / "protected", undo, "32m")
    (place.folder / "r").rename(place.folder / "unused")
    (folder / "r").mkdir()
    os.symlink(folder / "r", place.folder / "r")
    assert place.imager("init", place.root, "--encryption", "none").code == 0
    source = place.folder / "disk"
    source.write_bytes(os.urandom(MIB))
    assert place.imager("backup", source, "--name", "disk").code == 0
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    source.write_bytes(os.urandom(MIB))
    ended = place.imager("backup", source, "--name", "disk")
    assert ended.code == 1 and "Read-only" in ended.err and "mount it writable" in ended.err
    # All that only reads goes on working.
    for verb in (["list"], ["show", "disk"], ["verify", "disk"], ["check", "--read-data"]):
        assert place.imager(*verb).code == 0, verb
    assert restored(place, ("disk", "disk"), place.folder / "out")[0].code == 0
    assert place.imager("check", "--repair").code in (0, 1)
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    assert place.imager("backup", source, "--name", "disk").code == 0


# --- targets that fail, or do not keep what is written ---------------------------------------------


def stored(place: Place, size: int) -> bytes:
    source = place.folder / "disk"
    source.write_bytes(os.urandom(size))
    assert place.imager("backup", source, "--name", "disk").code == 0
    return source.read_bytes()


def test_a_device_that_fails_in_the_middle(place: Place, undo: ExitStack) -> None:
    stored(place, 24 * MIB)
    folder = memory(place.folder / "target", undo, "12m")
    with (folder / "backing").open("wb") as file:
        file.truncate(24 * MIB)
    device = undo.enter_context(attach(folder / "backing"))
    ended = place.imager("restore", "disk", device.path, "--confirm-device", device.path)
    assert ended.code == 1 and device.path in ended.err and '"hint":"' in ended.err, ended
    with open(device.path, "rb") as target:
        assert not any(target.read(MIB))


def test_a_full_filesystem_below_the_target(place: Place, undo: ExitStack) -> None:
    data = stored(place, 24 * MIB)
    folder = memory(place.folder / "target", undo, "12m")
    ended = place.imager("restore", "disk", folder / "out")
    assert ended.code == 1 and "No space left" in ended.err and "--resume" in ended.err
    assert not any((folder / "out").read_bytes()[:MIB])
    subprocess.run(["mount", "-o", "remount,size=40m", folder], check=True)
    assert place.imager("restore", "disk", folder / "out", "--resume").code == 0
    assert (folder / "out").read_bytes() == data


class Tamper(Silent):
    """Acts when a phase begins."""

    def __init__(self, name: str, act: Callable[[], object]) -> None:
        super().__init__()
        self.name, self.act, self.acted = name, act, threading.Event()

    def phase(self, name: str, total: int | None) -> None:
        if name == self.name and not self.acted.is_set():
            self.acted.set()
            self.act()


def change(path: Path, at: int, new: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(new)
        file.flush()
        os.fsync(file.fileno())


def test_the_read_back_catches_a_target_that_lies(place: Place, undo: ExitStack) -> None:
    stored(place, 8 * MIB)
    backing = place.folder / "backing"
    with backing.open("wb") as file:
        file.truncate(8 * MIB)
    device = undo.enter_context(attach(backing))
    with Repository.open(FolderStorage(str(place.root)), Credentials()) as repository:
        options = restore.RestoreOptions(confirm_device=device.path)
        reporter = Tamper("reading back", lambda: change(backing, 5 * MIB + 70000, b"lie"))
        plan = restore.plan(repository, "disk", device.path, options, reporter)
        with pytest.raises(TargetError) as caught:
            restore.execute(repository, plan, reporter)
    assert reporter.acted.is_set()
    assert caught.value.exit_code == 1 and f"65536 bytes at {5 * MIB + 65536}" in caught.value.message
    with open(device.path, "rb") as target:
        assert not any(target.read(MIB))


def test_what_changes_after_a_restore_is_found_against_the_set(place: Place, undo: ExitStack) -> None:
    stored(place, 8 * MIB)
    backing = place.folder / "backing"
    with backing.open("wb") as file:
        file.truncate(8 * MIB)
    device = undo.enter_context(attach(backing))
    to = ("restore", "disk", device.path, "--confirm-device", device.path)
    ended = place.imager(*to, "--no-verify")
    assert ended.code == 0 and not ended.summary["verified"]
    assert place.imager("verify", "disk", "--against", device.path).code == 0
    change(backing, 3 * MIB + 5, b"changed")
    ended = place.imager("verify", "disk", "--against", device.path)
    assert ended.code == 1 and ended.summary["differing"] == [["disk", 3 * MIB, 65536]]
    ended = place.imager(*to, "--delta")
    assert ended.code == 0 and 65536 <= ended.summary["bytes_written"] <= MIB + 65536
    assert place.imager("verify", "disk", "--against", device.path).code == 0


def test_a_repository_that_is_full_at_forget_and_prune(place: Place, undo: ExitStack) -> None:
    """Nothing is lost, whatever they get to do; with room again they end their work."""
    folder = memory(place.folder / "full", undo, "64m")
    root = folder / "r"
    (place.folder / "r").rename(place.folder / "unused")
    os.symlink(root, place.folder / "r")
    assert place.imager("init", root, "--encryption", "keyfile", "--block-size", "4KiB").code == 0
    source = place.folder / "disk"
    chance, contents = random.Random(5), {}
    data = bytearray(chance.randbytes(8 * MIB))
    for _ in range(5):
        for block in chance.sample(range(2048), 700):
            data[block * 4096 : (block + 1) * 4096] = chance.randbytes(4096)
        source.write_bytes(data)
        ended = place.imager("backup", source, "--name", "disk")
        assert ended.code == 0
        contents[ended.summary["set"]] = bytes(data)
    ids = list(contents)

    def fill(left: int) -> None:
        (folder / "ballast").unlink(missing_ok=True)
        free = os.statvfs(folder)
        with (folder / "ballast").open("wb") as file:
            file.write(bytes(max(0, free.f_bfree * free.f_bsize - left)))

    def whole(sets: list[str]) -> None:
        check = place.imager("check", "--read-data")
        assert (check.code, check.summary["problems"]) == (0, []), check
        for set_id in sets:
            ended, out = restored(place, (set_id, "disk"), place.folder / "out")
            assert ended.code == 0 and out == contents[set_id]

    fill(0)
    ended = place.imager("forget", *ids[:3])
    assert ended.code == 1 and "No space left" in ended.err and "free some space" in ended.err
    whole(ids)
    (folder / "ballast").unlink()
    assert place.imager("forget", *ids[:3]).code == 0
    full = 0
    for left in (0, 4096, 64 << 10, MIB, 3 * MIB):
        fill(left)
        ended = place.imager("prune", "--max-unused", "0%")
        assert ended.code in (0, 1), ended
        full += ended.code == 1 and "No space left" in ended.err
        whole(ids[3:])
    assert full >= 2
    (folder / "ballast").unlink()
    assert place.imager("prune", "--max-unused", "0%").code == 0
    whole(ids[3:])
    assert place.imager("prune", "--max-unused", "0%").summary["packs_deleted"] == 0
    assert not place.files("condemned") and not place.files("tmp")
    used = sum(path.stat().st_size for path in place.files("packs"))
    assert used < 1.05 * (2048 + 700) * (4096 + 64 + 16 + 96)


def test_a_prune_with_hardly_any_room(place: Place, undo: ExitStack) -> None:
    """What is wholly dead goes first, and needs room for two small objects; that makes room for copies."""
    folder = memory(place.folder / "full", undo, "64m")
    root = folder / "r"
    (place.folder / "r").rename(place.folder / "unused")
    os.symlink(root, place.folder / "r")
    assert place.imager("init", root, "--encryption", "keyfile", "--block-size", "4KiB").code == 0
    source, chance, ids = place.folder / "disk", random.Random(6), []
    data = chance.randbytes(12 * MIB)
    for share in (1.0, 1.0, 0.3):  # The first is replaced as a whole, the second in part.
        data = chance.randbytes(int(len(data) * share)) + data[int(len(data) * share) :]
        source.write_bytes(data)
        ended = place.imager("backup", source, "--name", "disk")
        assert ended.code == 0
        ids.append(ended.summary["set"])
    assert place.imager("forget", *ids[:2]).code == 0
    stored = {path: path.stat().st_size for path in place.files("packs")}
    free = os.statvfs(folder)
    (folder / "ballast").write_bytes(bytes(free.f_bfree * free.f_bsize - (32 << 10)))
    ended = place.imager("prune", "--max-unused", "0%")
    assert ended.code == 0, ended
    assert ended.summary["packs_rewritten"] >= 1 and len(set(stored) - set(place.files("packs"))) >= 2
    check = place.imager("check", "--read-data")
    assert (check.code, check.summary["problems"]) == (0, []), check
    ended, out = restored(place, (ids[2], "disk"), place.folder / "out")
    assert ended.code == 0 and out == data
