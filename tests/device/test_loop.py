from __future__ import annotations

import errno
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from imager import command
from imager.device import blockio, loop_ioctl, sysfs
from imager.device.identity import identify, same_source
from imager.device.loop import attach
from imager.errors import TargetError

MIB = 1 << 20

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="needs loop devices"),
]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(8 * MIB))
    return path


def partitioned(image: Path) -> Path:
    script = b"label: gpt\nstart=1MiB,size=2MiB\nsize=2MiB\n"
    command.run(["sfdisk", "-q", "--wipe", "always", str(image)], stdin=script)
    return image


def free_again(name: str, image: Path) -> bool:
    info = loop_ioctl.read_status(f"/dev/{name}")
    return info is None or info.file != (image.stat().st_dev, image.stat().st_ino)


def test_it_reads_as_the_file_and_is_gone_after(image: Path) -> None:
    with attach(image) as device:
        assert Path(device.path).read_bytes() == image.read_bytes()
        assert device.backing == str(image)
    assert free_again(device.name, image)
    device.detach()


def test_sector_size_offset_and_limit(image: Path) -> None:
    with attach(image, sector_size=4096, offset=MIB, sizelimit=2 * MIB) as device:
        with open(device.path, "rb") as file:
            assert blockio.sector_sizes(file.fileno())[0] == 4096
            assert blockio.size(file.fileno()) == 2 * MIB
            assert file.read() == image.read_bytes()[MIB : 3 * MIB]
        assert identify(device.path).key == f"file:{image}@{MIB}"


def test_read_only(image: Path) -> None:
    with attach(image, read_only=True) as device:
        fd = os.open(device.path, os.O_RDONLY)
        try:
            assert blockio.read_only(fd)
        finally:
            os.close(fd)


def test_partitions_come_and_go(image: Path) -> None:
    with attach(partitioned(image)) as device:
        assert device.partitions() == {}
        assert device.add_partitions() == {1: f"{device.path}p1", 2: f"{device.path}p2"}
        assert Path(f"{device.path}p1").read_bytes() == image.read_bytes()[MIB : 3 * MIB]
        command.run(["sfdisk", "-q", "--no-reread", "--no-tell-kernel", "--delete", device.path, "2"])
        assert sorted(device.add_partitions()) == [1]
        device.remove_partitions()
        assert device.partitions() == {}
        device.add_partitions()
    assert not sysfs.read_node(f"{device.name}p1")


def test_a_missing_node_is_made(image: Path) -> None:
    with attach(partitioned(image)) as device:
        os.unlink(device.add_partitions()[1])
        device.add_partitions()
        assert Path(f"{device.path}p1").is_block_device()


def test_a_partition_in_use_is_not_removed(image: Path) -> None:
    with attach(partitioned(image)) as device:
        held = os.open(device.add_partitions()[1], os.O_RDONLY | os.O_EXCL)
        try:
            with pytest.raises(TargetError, match="in use"):
                device.remove_partitions()
        finally:
            os.close(held)


def test_the_device_grows_with_the_file(image: Path) -> None:
    with attach(image) as device:
        os.truncate(image, 16 * MIB)
        assert device.update_capacity() == 16 * MIB


def test_a_file_and_a_loop_over_it_are_one_source(image: Path) -> None:
    with attach(partitioned(image)) as device:
        device.add_partitions()
        assert same_source(identify(device.path), identify(image))
        assert not same_source(identify(f"{device.path}p1"), identify(image))
        assert not same_source(identify(f"{device.path}p1"), identify(f"{device.path}p2"))
        with attach(device.path) as over:
            assert same_source(identify(over.path), identify(image))


def test_many_at_once(tmp_path: Path) -> None:
    """The race for free devices is lost and tried again, never lost for good."""

    def one(number: int) -> bytes:
        path = tmp_path / str(number)
        path.write_bytes(bytes([number]) * MIB)
        with attach(path) as device:
            return Path(device.path).read_bytes()[:1]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(12))) == [bytes([n]) for n in range(12)]


def test_a_killed_process_leaves_nothing(image: Path) -> None:
    partitioned(image)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        device = attach(image)
        device.add_partitions()
        os.write(write, device.name.encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    name = os.read(read, 100).decode()
    os.close(read)
    os.close(write)
    for _ in range(100):
        if free_again(name, image):
            break
        time.sleep(0.01)
    assert free_again(name, image)


def test_errors_are_clear(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match="No such file"):
        attach(tmp_path / "none")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(loop_ioctl, "configure", refuse)
    with pytest.raises(TargetError, match="not permitted") as error:
        attach(image)
    assert "root" in (error.value.hint or "")


def test_block_io_on_a_device(image: Path) -> None:
    with attach(image) as device:
        fd = os.open(device.path, os.O_RDWR)
        try:
            assert blockio.size(fd) == 8 * MIB
            assert blockio.disk_sequence(fd)
            assert blockio.alignment(fd).offset in (512, 4096)
            blockio.zero_range(fd, MIB, 2 * MIB)
            assert os.pread(fd, 4 * MIB, 0)[MIB : 3 * MIB] == bytes(2 * MIB)
            if blockio.zero_capability(fd).discard:
                assert blockio.discard(fd, 0, 4096)
            blockio.drop_cache(fd)
            assert os.pread(fd, 8 * MIB, 0)[MIB : 3 * MIB] == bytes(2 * MIB)
        finally:
            os.close(fd)
