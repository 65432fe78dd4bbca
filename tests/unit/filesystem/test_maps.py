"""The dispatcher: one filesystem, one map; anything else, none."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager import command
from imager.filesystem import maps
from imager.filesystem.used import Unknown, Used
from tests.samples import KINDS, PAGE, UNREPLAYED, Sample

MIB = 1 << 20
CRASHED = "its journal is on another device, or missing"


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    number = os.open(tmp_path / "image", os.O_RDWR | os.O_CREAT)
    yield number
    os.close(number)


@pytest.mark.parametrize("name", [name for name in KINDS if name != "btrfs"])
def test_every_page_that_holds_something_is_used(name: str, fd: int) -> None:
    """mkfs writes nothing that is not in use; that of btrfs leaves its first trees behind."""
    sample = Sample(name)
    sample.write(fd)
    answer = maps.used_blocks(fd, 0, sample.size)
    assert isinstance(answer, Used)
    assert answer.kind == KINDS[name]
    outside = [number for number in sample.pages if not touches(answer, number * PAGE)]
    assert not outside
    assert answer.extents.total < sample.size // 2
    position = os.lseek(fd, 0, os.SEEK_CUR)
    assert position == 0


def touches(answer: Used, at: int) -> bool:
    return bool(any(start < at + PAGE and at < end for start, end in answer.extents))


def test_what_follows_the_filesystem_is_used(fd: int) -> None:
    for name in KINDS:
        sample = Sample(name)
        os.ftruncate(fd, 0)
        sample.write(fd)
        alone = maps.used_blocks(fd, 0, sample.size)
        size = sample.size + 3 * MIB + 512
        os.ftruncate(fd, size)
        more = maps.used_blocks(fd, 0, size)
        assert isinstance(alone, Used) and isinstance(more, Used)
        assert more.extents == alone.extents | type(alone.extents).of([(sample.size, size)])


def test_a_filesystem_that_is_cut_short_has_none(fd: int) -> None:
    for name in KINDS:
        sample = Sample(name)
        os.ftruncate(fd, 0)
        sample.write(fd)
        for size in (sample.size - 64 * 1024, sample.size // 2, 2 * MIB):
            answer = maps.used_blocks(fd, 0, size)
            assert isinstance(answer, Unknown)
            assert "larger than the partition" in answer.reason, (name, answer)


def test_two_signatures_are_none(fd: int) -> None:
    btrfs, ext = Sample("btrfs"), Sample("ext4")
    btrfs.write(fd)
    os.pwrite(fd, ext.pages[0], 0)
    answer = maps.used_blocks(fd, 0, btrfs.size)
    assert answer == Unknown("it bears the signatures of btrfs and ext4 at once")


def test_nothing_known(fd: int) -> None:
    os.ftruncate(fd, MIB)
    assert maps.used_blocks(fd, 0, MIB) == Unknown("no filesystem that is known here")
    assert maps.used_blocks(fd, 0, 512) == Unknown("no filesystem that is known here")
    for start, size in ((0, 0), (-512, 1024), (1, 512), (0, 1000)):
        assert isinstance(maps.used_blocks(fd, start, size), Unknown)
    assert isinstance(maps.used_blocks(fd, 1 << 62, 1 << 62), Unknown)


# --- what ext4 says of itself ---------------------------------------------------------------


def patched(fd: int, sample: Sample, at: int, value: bytes) -> Used | Unknown:
    sample.write(fd)
    os.pwrite(fd, value, 1024 + at)
    return maps.used_blocks(fd, 0, sample.size)


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0x3A, b"\0\0", "it was not unmounted cleanly, or is mounted"),
        (0x3A, b"\3\0", "it is marked as having errors"),
        (0xE8, b"\x0c\0\0\0", "it has orphaned inodes that are not cleaned up"),
        (0x60, b"\6\0\0\0", CRASHED),
        (0x60, b"\2\0\0\x40", "it has features that are not known: incompat 0x40000000, ro_compat 0x0"),
        (0x60, b"\x0a\0\0\0", "it is the journal of another filesystem"),
        (0x18, b"\x09\0\0\0", "a block size of 2^19 bytes"),
        (0x28, b"\0\0\0\0", "0 inodes of 256 bytes in a group"),
        (0x04, b"\1\x81\0\0", "it is larger than the partition that it stands on"),
    ],
)  # fmt: skip
def test_ext_says_why(at: int, value: bytes, reason: str, fd: int) -> None:
    answer = patched(fd, Sample("ext2"), at, value)
    assert answer == Unknown(reason, answer.kind)


def test_a_bitmap_that_its_count_belies(fd: int) -> None:
    sample = Sample("ext2")
    sample.write(fd)
    out = command.text(["dumpe2fs", f"/proc/{os.getpid()}/fd/{fd}"])
    bitmap = int(out.split("Block bitmap at ")[1].split()[0].rstrip(","))
    os.pwrite(fd, bytes(64), bitmap * 1024 + 100)
    answer = maps.used_blocks(fd, 0, sample.size)
    assert isinstance(answer, Unknown)
    assert "the bitmap of group 0 has" in answer.reason


# --- sums --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ext4", "xfs5", "btrfs", "unreplayed4"])
def test_every_structure_that_is_read_is_checked(name: str, fd: int) -> None:
    """One bit in any page: the map is the same, because the page has no part in it, or there is none."""
    sample = Sample(name)
    sample.write(fd)
    whole = maps.used_blocks(fd, 0, sample.size)
    refused = 0
    for number, page in sample.pages.items():
        for at in (40, 1500, 3000):
            os.pwrite(fd, bytes([page[at] ^ 1]), number * PAGE + at)
            answer = maps.used_blocks(fd, 0, sample.size)
            os.pwrite(fd, page, number * PAGE)
            assert answer == whole or isinstance(answer, Unknown)
            refused += isinstance(answer, Unknown)
    assert refused > 2


def test_the_second_copy_serves(fd: int, tmp_path: Path) -> None:
    """btrfs keeps two copies of its trees: damage to one changes nothing."""
    subprocess.run(["truncate", "-s", "256M", str(tmp_path / "image")], check=True)
    command.run(["mkfs.btrfs", "-q", "-f", "-m", "dup", str(tmp_path / "image")])
    whole = maps.used_blocks(fd, 0, 256 * MIB)
    assert isinstance(whole, Used)
    chunks = command.text(["btrfs", "inspect-internal", "dump-tree", "-t", "chunk", str(tmp_path / "image")])
    system = chunks.split("type SYSTEM|DUP")[1]
    first = int(system.split("stripe 0 devid 1 offset ")[1].split()[0])
    second = int(system.split("stripe 1 devid 1 offset ")[1].split()[0])
    for start in (first, second):
        kept = os.pread(fd, 8 * MIB, start)
        os.pwrite(fd, bytes(8 * MIB), start)
        assert maps.used_blocks(fd, 0, 256 * MIB) == whole
        os.pwrite(fd, kept, start)
    os.pwrite(fd, bytes(8 * MIB), first)
    os.pwrite(fd, bytes(8 * MIB), second)
    assert isinstance(maps.used_blocks(fd, 0, 256 * MIB), Unknown)


# --- a journal that is not replayed ---------------------------------------------------------------


@pytest.mark.parametrize("name", UNREPLAYED)
def test_the_journal_is_replayed_as_e2fsck_replays_it(name: str, fd: int, tmp_path: Path) -> None:
    """The map of a journal replayed in memory is that of the same filesystem after another's replay."""
    sample = Sample(name)
    sample.write(fd)
    before = maps.used_blocks(fd, 0, sample.size)
    assert isinstance(before, Used), before
    assert before.note.startswith("its journal, not replayed yet, is replayed into the map: ")
    in_place = in_use_by_bitmaps(tmp_path / "image")
    command.run(["e2fsck", "-E", "journal_only", "-y", str(tmp_path / "image")], ok=(0, 1))
    after = maps.used_blocks(fd, 0, sample.size)
    assert isinstance(after, Used) and after.note == ""
    assert after.extents == before.extents
    assert in_use_by_bitmaps(tmp_path / "image") != in_place, "the replay changed the bitmaps"
    command.run(["e2fsck", "-fn", str(tmp_path / "image")])


def in_use_by_bitmaps(image: Path) -> str:
    """What debugfs says of the free blocks, in place."""
    return command.text(["dumpe2fs", "-o", "superblock=1", "-o", "blocksize=1024", str(image)])


def journal(fd: int) -> int:
    """Where the journal's superblock stands."""
    raw = os.pread(fd, os.fstat(fd).st_size, 0)
    [place] = [at for at in range(0, len(raw), 1024) if raw[at : at + 8] == bytes.fromhex("c03b399800000004")]
    return place


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [
        (0x04, "00000003", "its journal has no superblock that is known"),
        (0x28, "00000020", "its journal is not replayed, and may hold fast commits"),
        (0x28, "00000004", "its journal is not replayed, and has features 0x0, 0x4, 0x0"),
        (0x24, "00000001", "its journal is not replayed, and has features 0x1, 0x1, 0x0"),
        (0x28, "00000018", "its journal has two kinds of checksums"),
        (0x28, "00000010", "the checksum of its journal's superblock is wrong"),
        (0x10, "7fffffff", "its journal's superblock makes no sense"),
        (0x1C, "00010000", "its journal's superblock makes no sense"),
        (0x20, "00000005", "its journal was aborted by an error"),
    ],
)
def test_a_journal_that_is_not_replayed_here(at: int, value: str, reason: str, fd: int) -> None:
    sample = Sample("unreplayed3")
    sample.write(fd)
    os.pwrite(fd, bytes.fromhex(value), journal(fd) + at)
    answer = maps.used_blocks(fd, 0, sample.size)
    assert answer == Unknown(reason, "ext3")


def test_a_copy_made_while_it_was_written(fd: int, tmp_path: Path) -> None:
    """A file's inode of a later moment than its bitmap: no map."""
    sample = Sample("unreplayed3")
    sample.write(fd)
    image = str(tmp_path / "image")
    command.run(["e2fsck", "-E", "journal_only", "-y", image], ok=(0, 1))
    command.run(["debugfs", "-w", "-R", "feature needs_recovery", image])
    whole = maps.used_blocks(fd, 0, sample.size)
    assert isinstance(whole, Used) and whole.note.endswith(": 0 blocks of it")
    last = int(command.text(["debugfs", "-R", "blocks last", image]).split()[-1])
    other = int(command.text(["debugfs", "-R", f"ffb 1 {last}", image]).split()[-1])
    for change in (f"setb {other}", f"freeb {last}", "feature needs_recovery"):
        command.run(["debugfs", "-w", "-R", change, image])
    answer = maps.used_blocks(fd, 0, sample.size)
    reason = "files of it take blocks that its bitmaps call free: a copy made while it was written?"
    assert answer == Unknown(reason, "ext3")


JOURNALS = [
    ("-t ext3", "jo"),
    ("-t ext4 -O ^metadata_csum", "jo"),
    ("-t ext4 -O metadata_csum,^64bit", "jo -c -v 2"),
    ("-t ext4 -O metadata_csum,64bit", "jo -c -v 2"),
    ("-t ext4 -O metadata_csum,^64bit", "jo -c -v 3"),
    ("-t ext4 -O metadata_csum,64bit", "jo -c -v 3"),
]
NUMBER = "c03b3998"
"What a block of the log begins with: one that begins so by itself is logged without it."


class Logged:
    """A filesystem whose journal debugfs writes."""

    def __init__(self, folder: Path, options: str, begin: str, group: int = 0) -> None:
        """`bitmap` is that of `group`."""
        self.image = folder / "image"
        with open(self.image, "wb") as file:
            file.truncate(24 * MIB)
        argv = ["mke2fs", "-qF", *options.split(), "-b", "1024", "-J", "size=1", "-N", "512", str(self.image)]
        command.run(argv)
        out = command.text(["dumpe2fs", str(self.image)]).split(f"Group {group}:")[1]
        self.bitmap = int(out.split("Block bitmap at ")[1].split()[0].rstrip(","))
        self._begin = begin
        self._folder = folder

    def block(self, number: int) -> bytes:
        with open(self.image, "rb") as file:
            file.seek(number * 1024)
            return file.read(1024)

    def put(self, number: int, content: bytes) -> None:
        with open(self.image, "r+b") as file:
            file.seek(number * 1024)
            file.write(content)

    def log(self, *steps: str, content: bytes = b"") -> None:
        """Transactions, as debugfs's `jw` takes them; `content` is what they log."""
        (self._folder / "blocks").write_bytes(content)
        lines = [self._begin, *(f"jw {step} {self._folder / 'blocks'}" for step in steps), "jc", ""]
        (self._folder / "script").write_text("\n".join(lines))
        command.run(["debugfs", "-w", "-f", str(self._folder / "script"), str(self.image)])

    def map(self) -> Used | Unknown:
        fd = os.open(self.image, os.O_RDONLY)
        try:
            return maps.used_blocks(fd, 0, self.image.stat().st_size)
        finally:
            os.close(fd)


@pytest.mark.parametrize(("options", "begin"), JOURNALS)
def test_every_format_of_a_journal(options: str, begin: str, tmp_path: Path) -> None:
    """A bitmap that is only in the journal; revoked there; logged again after that."""
    logged = Logged(tmp_path, options, begin)
    clean, bitmap = logged.map(), logged.block(logged.bitmap)
    assert isinstance(clean, Used)
    noise = bytes(range(256)) * 4
    for steps, whole in (
        ([f"-b {logged.bitmap}"], True),
        ([f"-b {logged.bitmap}", f"-r {logged.bitmap}"], False),
        ([f"-b {logged.bitmap}", f"-r {logged.bitmap}", f"-b {logged.bitmap}"], True),
        ([f"-b {logged.bitmap} -c"], False),  # without a commit, nothing is replayed
    ):
        logged.log(*steps, content=bitmap)
        logged.put(logged.bitmap, noise)
        answer = logged.map()
        if whole:
            assert isinstance(answer, Used) and answer.extents == clean.extents, (steps, answer)
        else:
            assert isinstance(answer, Unknown) and "bitmap" in answer.reason, (steps, answer)
        logged.put(logged.bitmap, bitmap)
        command.run(["e2fsck", "-fy", str(logged.image)], ok=(0, 1))


def test_a_logged_block_that_begins_as_the_log_does(tmp_path: Path) -> None:
    logged = Logged(tmp_path, "-t ext3", "jo", group=1)
    bitmap, table = logged.block(logged.bitmap), bytearray(logged.block(2))
    odd = bytes.fromhex(NUMBER) + bitmap[4:]
    free = 8192 - sum(byte.bit_count() for byte in odd)
    table[32 + 12 : 32 + 14] = free.to_bytes(2, "little")
    logged.log(f"-b 2,{logged.bitmap}", content=bytes(table) + odd)
    assert bytes.fromhex(NUMBER) not in (logged.block(logged.bitmap)[:4], bitmap[:4])
    before = logged.map()
    assert isinstance(before, Used), before
    command.run(["e2fsck", "-E", "journal_only", "-y", str(logged.image)], ok=(0, 1))
    assert logged.block(logged.bitmap) == odd
    after = logged.map()
    assert isinstance(after, Used) and after.extents == before.extents


def test_a_journal_with_something_in_it_that_needs_no_recovery(tmp_path: Path) -> None:
    logged = Logged(tmp_path, "-t ext4", "jo -c -v 3")
    logged.log(f"-b {logged.bitmap}", content=logged.block(logged.bitmap))
    command.run(["debugfs", "-w", "-R", "feature ^needs_recovery", str(logged.image)])
    reason = "its journal is not empty, though it says that it needs no recovery"
    assert logged.map() == Unknown(reason, "ext4")
