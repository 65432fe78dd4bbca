"""Used-block maps against their oracles: the kernel, the checkers, partclone, btrfs-progs.

For each of many ways to make a filesystem: one that was filled and used is
restored from its used blocks alone onto random bytes; then its checker is
content and every file is there.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager import command
from imager.extents import Extents
from imager.filesystem.used import Unknown, Used
from imager.lab import rig
from tests import filesystems as fs
from tests.workbench import MEMORY

MIB = 1 << 20
TOOLS = sorted({argv[0] for argv in fs.MAKE.values()} | set(fs.PARTCLONE.values()))
MISSING = [tool for tool in TOOLS if command.find(tool) is None]
WITHOUT = rig.without_devices()

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT)),
]

EXT = [
    "-t ext2",
    "-t ext2 -r 0",
    "-t ext2 -b 1024",
    "-t ext2 -b 2048 -O ^sparse_super,^resize_inode",
    "-t ext3",
    "-t ext3 -b 1024 -O ^resize_inode",
    "-t ext4",
    "-t ext4 -b 1024",
    "-t ext4 -b 2048 -I 512",
    "-t ext4 -O ^metadata_csum",
    "-t ext4 -O ^metadata_csum,uninit_bg -b 1024",
    "-t ext4 -O ^metadata_csum,^uninit_bg",
    "-t ext4 -O ^64bit",
    "-t ext4 -O ^64bit,^metadata_csum,uninit_bg,^flex_bg",
    "-t ext4 -O ^flex_bg -b 1024",
    "-t ext4 -O meta_bg,^resize_inode",
    "-t ext4 -O meta_bg,^resize_inode,^flex_bg -b 1024",
    "-t ext4 -O meta_bg,^resize_inode,^sparse_super -b 1024",
    "-t ext4 -O sparse_super2,^resize_inode -b 1024",
    "-t ext4 -O sparse_super2,^resize_inode -E num_backup_sb=1 -b 1024",
    "-t ext4 -O sparse_super2,^resize_inode -E num_backup_sb=0",
    "-t ext4 -O bigalloc -C 16384",
    "-t ext4 -O bigalloc -C 65536",
    "-t ext4 -O bigalloc -b 1024 -C 16384",
    "-t ext4 -O ^has_journal",
    "-t ext4 -O metadata_csum_seed",
    "-t ext4 -O inline_data",
    "-t ext4 -O casefold,encrypt,ea_inode,large_dir",
    "-t ext4 -O mmp",
    "-t ext4 -G 4 -g 2048 -b 1024",
    "-t ext4 -g 1024 -b 1024 -N 20000",
    "-t ext4 -J size=4 -m 0 -E lazy_itable_init=0,lazy_journal_init=0",
    "-t ext4 -E packed_meta_blocks=1",
    "-t ext4 -O orphan_file",
    "-t ext4 -O fast_commit,stable_inodes",
    "-t ext4 -O ^extents,^64bit -I 128",
    "-t ext4 -O bigalloc,meta_bg,^resize_inode,sparse_super2 -C 8192",
]
XFS = [
    "",
    "-m crc=0",
    "-m crc=0,finobt=0 -b size=1024",
    "-b size=1024",
    "-b size=512 -m crc=0",
    "-b size=2048 -d agcount=3",
    "-d agcount=2",
    "-d agsize=80m",
    "-s size=4096",
    "-m rmapbt=1,reflink=1",
    "-m reflink=0,rmapbt=1",
    "-m finobt=0,reflink=0",
    "-m bigtime=0,inobtcount=0 -i sparse=0",
    "-i nrext64=1 -n size=8192",
    "-d su=65536,sw=2,agcount=4 -l su=32768",
    "-l su=262144",
    "-l version=1 -m crc=0",
    "-l agnum=2",
    "-i size=2048 -n size=16384",
    "-d agcount=3 -m reflink=1,rmapbt=1,inobtcount=1 -i sparse=1",
]
BTRFS = [
    "",
    "--mixed",
    "-m single",
    "-m dup -d dup",
    "-d dup --nodesize 4096",
    "--nodesize 65536",
    "--checksum xxhash",
    "--checksum sha256",
    "--checksum blake2",
    "-O ^no-holes,^skinny-metadata -R ^free-space-tree",
    "-R quota",
    "--mixed -d dup -m dup",
    "-m single -d single --nodesize 32768",
]
CASES = [("ext", o) for o in EXT] + [("xfs", o) for o in XFS] + [("btrfs", o) for o in BTRFS]
SIZES = {"ext": 96 * MIB + 5120, "xfs": 448 * MIB + 4096, "btrfs": 256 * MIB + 8192}
CLONED = ("ext", "xfs")
"Of btrfs, partclone knows no second copies, and marks logical addresses for physical ones."


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="imager-used-", dir=MEMORY) as name:
        yield Path(name)


def known(image: Path) -> Used:
    answer = fs.used(image)
    assert isinstance(answer, Used), answer
    return answer


def lived_in(kind: str, image: Path, seed: int) -> fs.Listing:
    """Two lives: filled; mounted again, filled again."""
    for life in range(2):
        with fs.mount(kind, image) as root:
            folder = root / f"life-{life}"
            folder.mkdir()
            fs.fill(folder, seed + life, kind=kind)
    with fs.mount(kind, image, read_only=True) as root:
        return fs.listing(root)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]} {CASES[n][1]}")
def test_what_is_left_out_is_not_missed(number: int, place: Path) -> None:
    kind, options = CASES[number]
    image, target = place / "image", place / "target"
    fs.make(kind, image, SIZES[kind], options)
    fresh = known(image)
    if not (mounts := fs.mountable(kind, image)):
        fs.make_full(kind, image, SIZES[kind], options, tree(place / "tree"))
    expected = lived_in(kind, image, number) if mounts else {}
    answer = known(image)
    assert answer.note == ""
    assert answer.extents.total > fresh.extents.total
    theirs = fs.domain(kind, image)
    if kind in CLONED and (theirs or "bigalloc" not in options):
        assert theirs and not theirs - answer.extents
        # The free list of each of XFS's groups is what they leave out.
        lists = 16 * 16 * 4096 if kind == "xfs" else 0
        tail = image.stat().st_size % (64 * 1024)
        assert answer.extents.total <= 1.02 * theirs.total + lists + tail
    if kind == "btrfs":
        assert answer.extents == told_by_btrfs(image)
    fs.restore_used(image, answer.extents, target)
    fs.checked(kind, target)
    if not mounts:
        return
    assert len(expected) > 50
    with fs.mount(kind, target, read_only=kind != "btrfs") as root:
        assert fs.listing(root) == expected
        if kind == "btrfs":
            fs.scrubbed(root)


def tree(folder: Path) -> Path:
    """Plain files for mkfs to begin with."""
    folder.mkdir()
    for number in range(60):
        (folder / f"file-{number}").write_bytes(os.urandom(number * 1731 % 90_000))
    return folder


def told_by_btrfs(image: Path) -> Extents:
    """Where btrfs-progs says that extents and superblocks are."""
    chunks = dump(image, "chunk")
    copies: list[tuple[int, int, list[int]]] = []
    for item in re.split(r"item \d+ key ", chunks):
        head = re.match(r"\(FIRST_CHUNK_TREE CHUNK_ITEM (\d+)\)", item)
        length = re.search(r"length (\d+) owner", item)
        if head and length:
            stripes = [int(at) for at in re.findall(r"stripe \d+ devid 1 offset (\d+)", item)]
            copies.append((int(head[1]), int(length[1]), stripes))
    node = int(re.search(r"nodesize\s+(\d+)", dump_super(image))[1])  # type: ignore[index]
    size = image.stat().st_size
    total = int(re.search(r"dev_item.total_bytes\s+(\d+)", dump_super(image))[1])  # type: ignore[index]
    out = [(0, MIB), (64 * MIB, 64 * MIB + 4096), (total, size)]
    for at, kind, length in re.findall(
        r"key \((\d+) (EXTENT_ITEM|METADATA_ITEM) (\d+)\)", dump(image, "extent")
    ):
        begin, span = int(at), node if kind == "METADATA_ITEM" else int(length)
        [(logical, _, stripes)] = [c for c in copies if c[0] <= begin < c[0] + c[1]]
        out += [(stripe + begin - logical, stripe + begin - logical + span) for stripe in stripes]
    return Extents.of(out).clip(size)


def dump(image: Path, tree: str) -> str:
    return command.text(["btrfs", "inspect-internal", "dump-tree", "-t", tree, str(image)])


def dump_super(image: Path) -> str:
    return command.text(["btrfs", "inspect-internal", "dump-super", str(image)])


@pytest.mark.parametrize(
    ("kind", "options"), [("ext", "-t ext4"), ("ext", "-t ext3"), ("xfs", ""), ("btrfs", "")]
)
def test_frozen(kind: str, options: str, place: Path) -> None:
    """A copy made while frozen, as a volume manager's snapshot is, has a map that misses nothing."""
    image, copied, target = place / "image", place / "copied", place / "target"
    fs.make(kind, image, SIZES[kind], options)
    with fs.mount(kind, image) as root:
        fs.fill(root, 7, kind=kind)
        with fs.frozen(root):
            fs.copy(image, copied)
        expected = fs.listing(root)
    answer = known(copied)
    assert answer.note == ("its log holds nothing but its superblock" if kind == "xfs" else "")
    fs.restore_used(copied, answer.extents, target)
    with fs.mount(kind, target) as root:
        assert fs.listing(root) == expected
    fs.checked(kind, target)


UNCLEAN = [
    ("ext", "-t ext4"),
    ("ext", "-t ext4 -b 1024"),
    ("ext", "-t ext4 -O ^metadata_csum,^64bit"),
    ("ext", "-t ext3 -b 2048"),
    ("ext", "-t ext2"),
    ("ext", "-t ext4 -O ^has_journal"),
    ("ext", "-t ext4 -O fast_commit"),
    ("xfs", ""),
    ("btrfs", ""),
]


@pytest.mark.parametrize(("kind", "options"), UNCLEAN)
@pytest.mark.parametrize("seed", range(3))
def test_pulled_out(kind: str, options: str, seed: int, place: Path) -> None:
    """A copy made of a mounted filesystem after fsync: no map, or one that misses nothing."""
    image, copied, target = place / "image", place / "copied", place / "target"
    fs.make(kind, image, SIZES[kind], options)
    with fs.mount(kind, image) as root:
        fs.fill(root, seed, kind=kind, most=4 * MIB)
        fs.syncfs(root)
        late = [root / f"late-{number}" for number in range(1 + 5 * seed)]
        for number, path in enumerate(late):
            path.write_bytes(os.urandom(5000 * (number + 1)))
        fs.sync(late)
        expected = {path.name: path.read_bytes() for path in late}
        fs.copy(image, copied)
    answer = fs.used(copied)
    if "fast_commit" in options:
        assert answer == Unknown("its journal is not replayed, and may hold fast commits", answer.kind)
        return
    if kind == "xfs" or "ext2" in options or "^has_journal" in options:
        assert isinstance(answer, Unknown)
        assert "cleanly" in answer.reason and "mounted" in answer.reason
        return
    assert isinstance(answer, Used), answer
    log = "its tree log, not replayed yet, is taken along"
    assert answer.note.startswith(
        log if kind == "btrfs" else "its journal, not replayed yet, is replayed into"
    )
    assert answer.extents.total < image.stat().st_size // 2
    fs.restore_used(copied, answer.extents, target)
    with fs.mount(kind, target) as root:
        assert {path.name: path.read_bytes() for path in root.glob("late-*")} == expected
        if kind == "btrfs":
            fs.scrubbed(root)
    fs.checked(kind, target)


def test_a_partition_of_a_disk(place: Path) -> None:
    """The map counts from the partition's start, which need not be a multiple of 4 KiB."""
    part, disk = place / "part", place / "disk"
    for kind in fs.MAKE:
        fs.make(kind, part, SIZES[kind])
        alone = known(part)
        size = part.stat().st_size
        start = 63 * 512
        with open(disk, "wb") as out:
            out.truncate(start + size + 512)
        subprocess.run(
            [
                "dd",
                f"if={part}",
                f"of={disk}",
                "bs=1M",
                f"seek={start}",
                "oflag=seek_bytes",
                "conv=sparse,notrunc",
            ],
            check=True,
            capture_output=True,
        )
        fd = os.open(disk, os.O_RDONLY)
        try:
            assert fs.maps.used_blocks(fd, start, size) == alone
            assert isinstance(fs.maps.used_blocks(fd, start, size // 2 // 4096 * 4096), Unknown)
        finally:
            os.close(fd)


def test_through_a_device(place: Path) -> None:
    """Direct reads of a loop device, with sectors of 512 and 4096 bytes, give the same map."""
    image = place / "image"
    for kind in fs.MAKE:
        options = "-s size=4096" if kind == "xfs" else ""
        fs.make(kind, image, SIZES[kind] // 4096 * 4096, options)
        for sector in (512, 4096):
            with fs.attach(image, sector_size=sector) as device:
                fd = os.open(device.path, os.O_RDONLY | os.O_DIRECT)
                try:
                    assert fs.maps.used_blocks(fd, 0, image.stat().st_size, sector=sector) == known(image)
                finally:
                    os.close(fd)
