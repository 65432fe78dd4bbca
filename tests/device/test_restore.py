"""Restore onto real devices: bit for bit, zeroes that read as zeroes, failing targets."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from imager.device.loop import LoopDevice, attach
from imager.engine import diff, restore, verify, windows
from imager.engine.restore import RestoreOptions
from imager.engine.target import HEAD
from imager.errors import GuardRefused, IntegrityError, Interrupted, NotConfirmed, TargetError
from imager.events import Silent
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.storage.folder import FolderStorage
from tests.unit.engine.conftest import Writer, content
from tests.unit.engine.test_restore import Broken, damage

MIB = 1 << 20

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="needs loop devices"),
]

Make = Callable[..., LoopDevice]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make(tmp_path: Path, undo: ExitStack) -> Make:
    """A loop device over a new file of random bytes: nothing on it reads as zeroes by chance."""

    def device(size: int, *, folder: Path | None = None, **options: Any) -> LoopDevice:
        path = (folder or tmp_path) / f"disk{len(list(tmp_path.iterdir()))}"
        with open(path, "wb") as file:
            for at in range(0, size, MIB):
                file.write(os.urandom(min(MIB, size - at)))
        return undo.enter_context(attach(path, **options))

    return device


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    folder = tmp_path / "sources"
    folder.mkdir()
    credentials = Credentials()
    storage = FolderStorage(str(tmp_path / "repo"))
    with Repository.init(storage, credentials, encryption="none") as repository:
        yield Writer(repository, folder)


def go(
    writer: Writer, target: LoopDevice, reporter: Silent | None = None, **options: Any
) -> restore.RestoreSummary:
    reporter = reporter or Silent()
    wanted = RestoreOptions(confirm_device=target.name, **options)
    plan = restore.plan(writer.repository, "disk", target.path, wanted, reporter)
    assert plan.needs_confirmation
    return restore.execute(writer.repository, plan, reporter)


def read(device: LoopDevice) -> bytes:
    fd = os.open(device.path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        out = bytearray()
        while piece := os.pread(fd, MIB, len(out)):
            out += piece
        return bytes(out)
    finally:
        os.close(fd)


@pytest.mark.parametrize("sector", [512, 4096])
@pytest.mark.parametrize("folder", ["disk", "memory"])
@pytest.mark.parametrize("block_size", [4096, 65536, 4 << 20])
def test_bit_for_bit(
    writer: Writer, make: Make, undo: ExitStack, tmp_path: Path, sector: int, folder: str, block_size: int
) -> None:
    data = content(12 * MIB)
    writer.store({"sda": data}, block_size=block_size)
    device = make(
        len(data), folder=memory(tmp_path, undo) if folder == "memory" else None, sector_size=sector
    )
    summary = go(writer, device)
    assert read(device) == data
    assert summary.verified and summary.left_alone == 0
    assert summary.bytes_zeroed > 0 or block_size > MIB
    assert summary.saved_table and Path(summary.saved_table).is_dir()
    assert verify.verify(writer.repository, "disk", Silent(), against=device.path).ok
    assert not diff.diff(writer.repository, "disk", device.path, Silent()).differs


def memory(tmp_path: Path, undo: ExitStack, size: str = "64m") -> Path:
    """A small tmpfs of this test: a backing file there cannot be zeroed by range, only punched."""
    folder = tmp_path / "memory"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    undo.callback(subprocess.run, ["umount", folder], check=True)
    return folder


@pytest.mark.parametrize("size", [512, 1536, MIB, MIB + 512, 5 * MIB + 3 * 512])
@pytest.mark.parametrize("extra", [0, 512, 3 * MIB + 512])
def test_odd_sizes_and_larger_targets(writer: Writer, make: Make, size: int, extra: int) -> None:
    data = os.urandom(size // 2) + bytes(size - size // 2)
    writer.store({"sda": data}, block_size=65536)
    device = make(size + extra)
    tail = read(device)[size:]
    summary = go(writer, device)
    assert read(device) == data + tail
    assert summary.left_alone == extra
    again = go(writer, device, delta=True)
    assert (again.bytes_written, again.bytes_zeroed) == (0, 0)
    assert read(device) == data + tail


def test_a_smaller_target_is_refused_with_the_numbers(writer: Writer, make: Make) -> None:
    writer.store({"sda": content(4 * MIB)})
    device = make(4 * MIB - 512)
    before = read(device)
    with pytest.raises(GuardRefused) as caught:
        go(writer, device)
    assert str(4 * MIB) in caught.value.message and str(4 * MIB - 512) in caught.value.message
    assert caught.value.exit_code == 20
    assert read(device) == before


def test_nothing_is_written_without_confirmation(writer: Writer, make: Make) -> None:
    writer.store({"sda": content(2 * MIB)})
    device = make(2 * MIB)
    before = read(device)
    plan = restore.plan(writer.repository, "disk", device.path, RestoreOptions(), Silent())
    assert device.name in plan.question
    for said in (None, "", "yes", "loop"):
        with pytest.raises(NotConfirmed):
            restore.execute(writer.repository, plan, Silent(), said)
    assert read(device) == before
    restore.execute(writer.repository, plan, Silent(), device.name)
    assert read(device) != before


def test_delta(writer: Writer, make: Make) -> None:
    data = content(16 * MIB, density=0.4)
    writer.store({"sda": data})
    device = make(len(data))
    go(writer, device)
    fd = os.open(device.path, os.O_WRONLY)
    for at in (3 * MIB, 9 * MIB + 4096, 16 * MIB - 512):
        os.pwrite(fd, os.urandom(512), at)
    os.close(fd)
    summary = go(writer, device, delta=True)
    assert read(device) == data
    assert 0 < summary.bytes_written + summary.bytes_zeroed <= 3 * 4096 + HEAD
    assert summary.mode == "delta"


def test_interrupted_and_resumed(writer: Writer, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    data = content(16 * MIB, density=0.6)
    writer.store({"sda": data})
    device = make(len(data))
    with monkeypatch.context() as patch:
        Broken(patch, 60, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            go(writer, device)
    assert not any(read(device)[:HEAD])
    with monkeypatch.context() as patch:
        patch.setattr(windows.windows, "__defaults__", (300,))
        summary = go(writer, device, resume=True)
    assert read(device) == data
    assert summary.mode == "resume" and summary.bytes_kept > 0


def test_damage_leaves_an_empty_head(writer: Writer, make: Make) -> None:
    manifest = writer.store({"sda": os.urandom(4 * MIB)})
    device = make(4 * MIB)
    head = read(device)[:HEAD]
    damage(writer.repository, manifest, writer, 600)
    with pytest.raises(IntegrityError, match=f"4096 bytes at {600 * 4096}"):
        go(writer, device)
    assert not any(read(device)[:HEAD])
    saved = Path(os.environ["IMAGER_STATE_DIR"], "tables").glob("*/head.bin")
    assert [path.read_bytes() for path in saved] == [head]


def test_a_target_that_fails(writer: Writer, make: Make, undo: ExitStack, tmp_path: Path) -> None:
    """The filesystem behind the loop device is full: its writes fail with EIO."""
    writer.store({"sda": os.urandom(16 * MIB)})
    folder = memory(tmp_path, undo, "6m")
    path = folder / "disk"
    path.touch()
    os.truncate(path, 16 * MIB)
    device = undo.enter_context(attach(path))
    with pytest.raises(TargetError) as caught:
        go(writer, device)
    assert device.path in caught.value.message
    assert caught.value.exit_code == 1 and caught.value.hint
    assert not any(read(device)[:HEAD])


def test_the_plan_tells_what_is_on_the_target(writer: Writer, make: Make) -> None:
    writer.store({"sda": content(40 * MIB, density=0.01)})
    device = make(40 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-L", "precious", device.path], check=True)
    plan = restore.plan(writer.repository, "disk", device.path, RestoreOptions(), Silent())
    text = "\n".join(plan.describe())
    assert "ext4 'precious'" in text and device.path in text


def test_an_image_of_a_disk_does_not_go_into_a_partition(writer: Writer, make: Make, tmp_path: Path) -> None:
    source = tmp_path / "gpt.img"
    with open(source, "wb") as file:
        file.truncate(16 * MIB)
    table = b"label: gpt\nstart=1MiB,size=8MiB\nsize=4MiB\n"
    subprocess.run(["sfdisk", "-q", source], input=table, check=True)
    writer.store({"sda": source})
    device = make(40 * MIB)
    parts = b"label: gpt\nstart=1MiB,size=20MiB\n"
    subprocess.run(["sfdisk", "-q", "--no-reread", device.path], input=parts, check=True)
    part = device.add_partitions()[1]
    before = read(device)
    with pytest.raises(GuardRefused, match="whole disk"):
        restore.plan(writer.repository, "disk", part, RestoreOptions(), Silent())
    assert read(device) == before
    device.remove_partitions()
    go(writer, device)
    assert read(device)[: 16 * MIB] == source.read_bytes()
