"""Small files read out of ext and FAT filesystems, as their own tools put them there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager import command
from imager.device.window import Spread, Window
from imager.filesystem.ext_files import ExtFiles
from imager.filesystem.fat_files import FatFiles
from imager.filesystem.files import LONGEST, Files

MIB = 1 << 20
EXT = {
    "ext2": ["-t", "ext2", "-b", "1024"],
    "ext2, old": ["-t", "ext2", "-r", "0"],
    "ext3": ["-t", "ext3"],
    "ext4": ["-t", "ext4"],
    "ext4, blocks of 1 KiB": ["-t", "ext4", "-b", "1024"],
    "ext4, blocks of 64 KiB": ["-t", "ext4", "-b", "65536"],
    "ext4, meta_bg": ["-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode,64bit"],
    "ext4, sparse_super2": ["-t", "ext4", "-O", "sparse_super2,meta_bg,^resize_inode", "-b", "1024"],
    "ext4, inline data": ["-t", "ext4", "-O", "inline_data", "-I", "256"],
    "ext4, bigalloc": ["-t", "ext4", "-O", "bigalloc", "-C", "16384"],
    "ext4, small inodes": ["-t", "ext4", "-I", "128", "-O", "^64bit,^metadata_csum"],
}
FAT = {
    "12": (4, []),
    "16": (20, []),
    "32": (40, ["-F", "32", "-s", "1"]),
    "large clusters": (80, ["-s", "32"]),
}


def tree(root: Path) -> Path:
    """What a system has, links of all kinds, and a folder of many blocks."""
    (root / "usr/lib").mkdir(parents=True)
    (root / "etc/many").mkdir(parents=True)
    (root / "usr/lib/os-release").write_text("ID=debian\n")
    (root / "etc/os-release").symlink_to("../usr/lib/os-release")
    (root / "etc/absolute").symlink_to("/usr/lib/os-release")
    (root / "lib").symlink_to("usr/lib")
    (root / ("l" * 70)).symlink_to("./" * 60 + "usr/lib/os-release")
    (root / "etc/loop").symlink_to("loop")
    (root / "etc/empty").write_bytes(b"")
    (root / "etc/largest").write_bytes(os.urandom(LONGEST))
    (root / "etc/too-large").write_bytes(bytes(LONGEST + 1))
    with (root / "etc/holes").open("wb") as file:
        file.seek(40_000)
        file.write(b"behind a hole")
    for number in range(1500):
        (root / f"etc/many/a-name-that-takes-some-room-{number}").touch()
    return root


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tree(tmp_path_factory.mktemp("tree"))


def links(place: str, names: list[str]) -> list[str]:
    """FAT has none."""
    return [name for name in names if Path(place, name).is_symlink()]


def window(image: Path) -> Window:
    return Window(os.open(image, os.O_RDONLY), 0, image.stat().st_size)


def is_same(files: Files, root: Path) -> None:
    for path in ("usr/lib/os-release", "etc/empty", "etc/largest", "etc/holes"):
        assert files.read(path) == (root / path).read_bytes(), path
    assert set(files.names("etc/many")) == set(os.listdir(root / "etc/many"))
    assert files.read("etc/too-large") is None
    assert files.read("etc/none") is None and files.read("etc") is None
    assert files.names("none") == files.names("usr/lib/os-release") == ()


def made_ext(place: Path, root: Path, options: list[str]) -> Path:
    image = place / "ext"
    with image.open("wb") as file:
        file.truncate(48 * MIB)
    command.run(["mke2fs", "-q", "-F", "-N", "4096", "-d", str(root), *options, str(image)])
    return image


@pytest.mark.parametrize("options", EXT.values(), ids=EXT)
def test_ext(tmp_path: Path, content: Path, options: list[str]) -> None:
    files = ExtFiles(window(made_ext(tmp_path, content, options)))
    is_same(files, content)
    for path in ("etc/os-release", "etc/absolute", "lib/os-release", "l" * 70, "etc/../../lib/os-release"):
        assert files.read(path) == b"ID=debian\n", path
    assert files.read("etc/loop") is None
    assert set(files.names("")) == {*os.listdir(content), "lost+found"}


@pytest.mark.parametrize(("size", "options"), FAT.values(), ids=FAT)
def test_fat(tmp_path: Path, content: Path, size: int, options: list[str]) -> None:
    image = tmp_path / "fat"
    with image.open("wb") as file:
        file.truncate(size * MIB)
    command.run(["mkfs.fat", *options, str(image)])
    plain = tmp_path / "plain"
    shutil.copytree(content, plain, ignore=links)
    for path in plain.rglob("many/*"):
        if int(path.name.rsplit("-", 1)[1]) >= 150:
            path.unlink()
    (plain / "SHORT.TXT").write_text("short")
    (plain / "lower.txt").write_text("lower")
    copied = ["mcopy", "-s", "-i", str(image), *(str(path) for path in sorted(plain.iterdir())), "::/"]
    command.run(copied, env={"MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": "/dev/null"})
    files = FatFiles(window(image))
    is_same(files, plain)
    assert files.read("USR/lib/OS-release") == b"ID=debian\n"
    assert set(files.names("")) == {"SHORT.TXT", "lower.txt", "etc", "usr"}


def test_a_filesystem_in_pieces(tmp_path: Path, content: Path) -> None:
    """As a logical volume may be."""
    whole = window(made_ext(tmp_path, content, ["-t", "ext4"]))
    pieces = Spread(tuple(whole.part(at, 5 * MIB) for at in range(0, 48 * MIB, 5 * MIB)))
    is_same(ExtFiles(pieces), content)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, content: Path) -> dict[str, bytearray]:
    """One of each kind, so small that changes hit what is read."""
    place = tmp_path_factory.mktemp("small")
    root = place / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/hostname").write_text("a" * 5000)
    (root / "link").symlink_to("etc/hostname")
    out = {}
    for kind, options in (("ext4", ["-t", "ext4"]), ("ext2", ["-t", "ext2"])):
        image = place / kind
        with image.open("wb") as file:
            file.truncate(256 << 10)
        command.run(["mke2fs", "-q", "-F", "-b", "1024", "-N", "16", "-d", str(root), *options, str(image)])
        out[kind] = bytearray(image.read_bytes())
    image = place / "fat"
    with image.open("wb") as file:
        file.truncate(128 << 10)
    command.run(["mkfs.fat", str(image)])
    command.run(["mcopy", "-s", "-i", str(image), str(root / "etc"), "::/"], env={"MTOOLSRC": "/dev/null"})
    out["fat"] = bytearray(image.read_bytes())
    return out


@settings(max_examples=400, deadline=None)
@given(
    kind=st.sampled_from(["ext4", "ext2", "fat"]),
    changes=st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(0, 255)), min_size=1, max_size=24),
    near=st.sampled_from([0, 1024, 1 << 20]),
)
def test_changed_filesystems(
    small: dict[str, bytearray], kind: str, changes: list[tuple[int, int]], near: int
) -> None:
    """No error and no more work than is bounded, wherever a byte is changed among those that are not zero."""
    raw = bytearray(small[kind])
    places = [at for at in range(min(len(raw), near + 4096 if near < MIB else len(raw))) if raw[at]]
    for at, value in changes:
        raw[places[at % len(places)]] = value
    fd = os.memfd_create("changed")
    try:
        os.write(fd, raw)
        files = (FatFiles if kind == "fat" else ExtFiles)(Window(fd, 0, len(raw)))
        for path in ("etc/hostname", "link"):
            content = files.read(path)
            assert content is None or len(content) <= LONGEST
        files.names("etc")
        files.names("")
    finally:
        os.close(fd)


def test_a_tree_without_an_end(small: dict[str, bytearray]) -> None:
    """An extent tree whose every entry leads on to a full node of itself ends all the same."""
    raw = bytearray(small["ext4"])
    fd = os.memfd_create("endless")
    node = bytearray(1024)
    node[:8] = (0xF30A).to_bytes(2, "little") + (84).to_bytes(2, "little") * 2 + (4).to_bytes(2, "little")
    for at in range(12, 1012, 12):
        node[at : at + 12] = bytes(4) + (200).to_bytes(4, "little") + bytes(4)
    raw[200 * 1024 : 201 * 1024] = node
    inode = raw.index(b"\x0a\xf3")  # the root folder's tree is the first on the disk
    raw[inode : inode + 24] = (
        node[:2] + (1).to_bytes(2, "little") + (4).to_bytes(2, "little") + (5).to_bytes(2, "little")
        + bytes(4) + node[12:24]
    )  # fmt: skip
    try:
        os.write(fd, raw)
        assert ExtFiles(Window(fd, 0, len(raw))).names("") == ()
    finally:
        os.close(fd)
