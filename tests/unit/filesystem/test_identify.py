"""What identify says is what blkid says."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager import command
from imager.device.window import Spread, Window
from imager.filesystem.identify import Filesystem, identify
from tests.workbench import MEMORY

MIB = 1 << 20
MAKERS = [
    ("ext2", 8, "mke2fs -qF -t ext2 -L one"),
    ("ext2", 8, "mke2fs -qF -t ext2 -b 1024"),
    ("ext3", 16, "mke2fs -qF -t ext3 -L two"),
    ("ext4", 16, "mke2fs -qF -t ext4 -b 4096"),
    ("ext4", 16, "mke2fs -qF -t ext4 -O ^has_journal -L three"),
    ("ext4", 16, "mke2fs -qF -t ext4 -O 64bit,bigalloc -L four"),
    ("jbd", 16, "mke2fs -qF -O journal_dev"),
    ("xfs", 320, "mkfs.xfs -qf -L five"),
    ("xfs", 320, "mkfs.xfs -qf -m crc=0 -b size=1024"),
    ("btrfs", 128, "mkfs.btrfs -qf -L six"),
    ("vfat", 4, "mkfs.fat -F 12 -n SEVEN"),
    ("vfat", 20, "mkfs.fat -F 16"),
    ("vfat", 40, "mkfs.fat -F 32 -s 1 -n NINE"),
    ("exfat", 8, "mkfs.exfat -L ten"),
    ("exfat", 8, "mkfs.exfat"),
    ("ntfs", 8, "mkntfs -QqF -L eleven"),
    ("ntfs", 8, "mkntfs -QqF -c 512 -L a_label_that_is_longer"),
    ("swap", 8, "mkswap -L twelve"),
    ("swap", 8, "mkswap -p 16384"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="identify-", dir=MEMORY) as name:
        yield Path(name)


def identified(image: Path) -> Filesystem | None:
    with image.open("rb") as file:
        return identify(Window(file.fileno(), 0, os.fstat(file.fileno()).st_size))


def blkid(image: Path) -> dict[str, str]:
    said = command.text(["blkid", "-p", "-o", "export", str(image)])
    return dict(line.split("=", 1) for line in said.splitlines() if "=" in line)


def compare(image: Path) -> Filesystem:
    found, theirs = identified(image), blkid(image)
    assert found is not None
    assert (found.type, found.label, found.uuid) == (
        theirs["TYPE"], theirs.get("LABEL", "").replace("\\ ", " ") or None, theirs.get("UUID"),
    ), theirs  # fmt: skip
    if "FSSIZE" in theirs and found.type not in ("xfs", "btrfs"):  # blkid leaves their logs and metadata out
        assert found.size == int(theirs["FSSIZE"])
    if "FSBLOCKSIZE" in theirs:
        assert found.block == int(theirs["FSBLOCKSIZE"])
    return found


@pytest.mark.parametrize(("kind", "size", "maker"), MAKERS)
def test_as_blkid(folder: Path, kind: str, size: int, maker: str) -> None:
    argv = maker.split()
    if command.find(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(size * MIB)
    command.run([*argv, str(image)])
    found = compare(image)
    assert found.type == kind and 0 < found.size <= size * MIB


def test_a_fat_with_its_label_in_the_root_folder(folder: Path) -> None:
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(20 * MIB)
    command.run(["mkfs.fat", "-F", "16", "-n", "BOOTLABEL", str(image)])
    command.run(["mlabel", "-i", str(image), "::another one"], env={"MTOOLS_SKIP_CHECK": "1"})
    assert compare(image).label == "ANOTHER ONE"


def test_squashfs_and_iso(folder: Path) -> None:
    if command.find("mksquashfs") is None or command.find("genisoimage") is None:
        pytest.skip("mksquashfs or genisoimage is not installed")
    tree = folder / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(random.Random(1).randbytes(100_000))
    command.run(["mksquashfs", str(tree), str(folder / "squash"), "-quiet", "-no-progress"])
    command.run(["genisoimage", "-quiet", "-V", "A DISC", "-o", str(folder / "iso"), str(tree)])
    assert compare(folder / "squash").type == "squashfs"
    assert compare(folder / "iso").label == "A DISC"


def test_nothing(folder: Path) -> None:
    for content in (b"", bytes(1000), bytes(MIB), random.Random(2).randbytes(MIB)):
        (folder / "image").write_bytes(content)
        assert identified(folder / "image") is None


def test_pieces(folder: Path) -> None:
    """A window in pieces reads as the same bytes in one."""
    raw = random.Random(3).randbytes(40_000)
    (folder / "image").write_bytes(raw)
    with (folder / "image").open("rb") as file:
        fd = file.fileno()
        spread = Spread(
            (Window(fd, 10_000, 5000), Window(fd, 0, 0), Window(fd, 100, 7000), Window(fd, 20_000, 99))
        )
        whole = raw[10_000:15_000] + raw[100:7100] + raw[20_000:20_099]
        assert spread.size == len(whole)
        for at, length in ((0, 10), (4990, 20), (0, 99999), (5000, 7000), (12_090, 50), (12_099, 1), (-1, 5)):
            assert spread.read(at, length) == (whole[at : at + length] if at >= 0 else b"")
        window = Window(fd, 39_000, 99_999)
        assert window.read(0, 5000) == raw[39_000:] and window.read(1000, 1) == b""
        assert window.part(500, 100).read(0, 200) == raw[39_500:39_600]


@pytest.fixture(scope="module")
def samples() -> list[bytes]:
    out = []
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        for kind, _, maker in MAKERS:
            argv = maker.split()
            if kind in ("xfs", "btrfs", "jbd") or command.find(argv[0]) is None:
                continue
            image = Path(name) / "image"
            with image.open("wb") as file:
                file.truncate(40 * MIB if "32" in argv else 4 * MIB if kind == "vfat" else 8 * MIB)
            command.run([*argv, str(image)], ok=(0, 1))
            out.append(image.read_bytes()[: 5 * MIB])
    return out


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_bytes_make_it_fail(samples: list[bytes], data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(samples)))
    changes = st.tuples(st.integers(0, 2048), st.integers(0, 255))
    for at, value in data.draw(st.lists(changes, min_size=1, max_size=10)):
        raw[at] = value
    fd = os.memfd_create("sample")
    try:
        os.write(fd, raw)
        found = identify(Window(fd, 0, len(raw)))
        assert found is None or 0 <= found.size < 1 << 63
    finally:
        os.close(fd)
