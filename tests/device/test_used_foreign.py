"""Used-block maps of FAT, exFAT and NTFS against their oracles: their checkers, partclone, every file."""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager import command
from imager.extents import Extents
from imager.filesystem.used import Unknown, Used
from tests import foreign
from tests.filesystems import MIB, restore_used, used
from tests.workbench import MEMORY

MISSING = sorted(tool for tool in set(foreign.TOOLS) if command.find(tool) is None)
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
fuse = [
    pytest.mark.root,
    pytest.mark.skipif(foreign.without_fuse() is not None, reason="needs root and FUSE"),
]

FAT = [
    (4, "-F 12"),
    (2, "-F 12 -f 1"),
    (3, "-F 12 -s 4 -r 512"),
    (6, "-F 12 -S 1024"),
    (8, "-F 12 -s 8 -R 7"),
    (16, "-F 16"),
    (16, "-F 16 -f 1"),
    (24, "-F 16 -s 1"),
    (24, "-F 16 -s 2 -R 9 -r 256"),
    (24, "-F 16 -S 2048 -s 1"),
    (24, "-F 16 -n LABEL -i 12345678 -h 2048"),
    (40, "-F 16 -a"),
    (40, "-F 32 -s 1"),
    (40, "-F 32 -s 1 -f 1"),
    (40, "-F 32 -s 1 -R 100 -b 9"),
    (70, "-F 32 -s 2"),
    (70, "-F 32 -s 1 -a"),
    (300, "-F 32 -S 4096 -s 1"),
    (300, "-F 32 -n BOOT"),
]
EXFAT = [
    (8, ""),
    (8, "-c 512"),
    (16, "-c 4K"),
    (24, "-c 32K -L label"),
    (40, "-c 128K"),
    (40, "-b 4M"),
    (40, "--pack-bitmap"),
    (40, "-c 4K --pack-bitmap -b 2M"),
    (300, ""),
    (300, "-c 512"),
]
NTFS = [
    (16, ""),
    (16, "-c 512"),
    (16, "-c 1024 -L label"),
    (24, "-c 2048"),
    (24, "-s 1024 -c 4096"),
    (24, "-s 2048 -c 8192"),
    (32, "-s 4096 -c 4096"),
    (32, "-c 16384"),
    (48, "-c 32768"),
    (64, "-c 65536"),
    (64, "-C -z 2"),
    (300, "-c 512"),
    (300, "-p 2048 -H 16 -S 63"),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="foreign-", dir=MEMORY) as name:
        yield Path(name)


def domain(kind: str, image: Path) -> Extents:
    """What partclone calls used. Its exit code says nothing."""
    out = image.with_suffix(".domain")
    argv = [foreign.PARTCLONE[kind], "-q", "-D", "-L", "/dev/null", "-s", str(image), "-o", str(out)]
    subprocess.run(argv, capture_output=True, check=False)
    lines = [line.split() for line in out.read_text().splitlines() if not line.startswith("#")]
    areas = [(int(a, 16), int(b, 16)) for a, b, mark in (f for f in lines if len(f) == 3) if mark == "+"]
    return Extents.of((start, start + length) for start, length in areas)


def prove(kind: str, image: Path, size: int, options: str) -> Used:
    """Make, fill, map; then judge the map by partclone, by the checker, and by every file."""
    foreign.make(kind, image, size * MIB, options)
    foreign.fill(kind, image, size, min(size * MIB // 4, 12 * MIB))
    foreign.checked(kind, image)
    answer = used(image)
    assert isinstance(answer, Used), answer
    # partclone 0.3.23 reads the entries of FAT12 as if they had 16 bits: mtools says there what files take.
    theirs = foreign.clusters(image) if answer.kind == "fat12" else domain(kind, image)
    assert theirs.total > 0
    assert not (theirs - answer.extents).clip(size * MIB), "another's map is contained in ours"
    # What we call used beyond it is what stands before the clusters and at the end, not clusters.
    assert answer.extents.total <= theirs.total + 4 * MIB
    target = image.with_name("restored")
    restore_used(image, answer.extents, target)
    foreign.checked(kind, target)
    assert foreign.found(kind, target) == foreign.found(kind, image) != {}
    return answer


@pytest.mark.parametrize(("size", "options"), FAT)
def test_fat(folder: Path, size: int, options: str) -> None:
    kind = options.split()[1]
    assert prove("fat", folder / "image", size, options).kind == f"fat{kind}"


@pytest.mark.parametrize(("size", "options"), [pytest.param(*one, marks=fuse) for one in EXFAT])
def test_exfat(folder: Path, size: int, options: str) -> None:
    assert prove("exfat", folder / "image", size, options).kind == "exfat"


@pytest.mark.parametrize(("size", "options"), [pytest.param(*one, marks=fuse) for one in NTFS])
def test_ntfs(folder: Path, size: int, options: str) -> None:
    assert prove("ntfs", folder / "image", size, options).kind == "ntfs"


# --- what is not believed ---------------------------------------------------------------


def reason(image: Path) -> str:
    answer = used(image)
    assert isinstance(answer, Unknown), answer
    return answer.reason


def test_bad_clusters_are_left_out(folder: Path) -> None:
    image = folder / "image"
    bad = folder / "bad"
    bad.write_text("9000\n9001\n")  # in blocks of 1 KiB
    foreign.make("fat", image, 16 * MIB, f"-F 16 -s 1 -l {bad}")
    answer = used(image)
    assert isinstance(answer, Used)
    assert 9000 * 1024 not in answer.extents and 9001 * 1024 + 512 not in answer.extents


def test_dirty_fat(folder: Path) -> None:
    image = folder / "image"
    foreign.make("fat", image, 40 * MIB, "-F 32 -s 1")
    fat = 32 * 512

    def table(raw: bytearray) -> None:
        for start in (fat, fat + struct.unpack_from("<I", raw, 36)[0] * 512):
            raw[start + 7] &= ~0x08

    assert "dirty flag in its table" in reason(foreign.changed(image, table))
    assert "dirty flag in its boot" in reason(foreign.changed(image, lambda raw: raw.__setitem__(65, 1)))
    assert "differ" in reason(foreign.changed(image, lambda raw: raw.__setitem__(fat + 400, 3)))


def test_dirty_exfat(folder: Path) -> None:
    image = folder / "image"
    foreign.make("exfat", image, 16 * MIB)
    assert isinstance(used(image), Used)
    assert "dirty" in reason(foreign.changed(image, lambda raw: raw.__setitem__(106, 2)))
    assert "checksum" in reason(foreign.changed(image, lambda raw: raw.__setitem__(520, 2)))


def _record(raw: bytearray, number: int) -> int:
    """Where a file record of an NTFS with clusters of 4 KiB begins."""
    return int(struct.unpack_from("<Q", raw, 48)[0]) * 4096 + number * 1024


def _attribute(raw: bytearray, record: int, kind: int) -> int:
    at = record + struct.unpack_from("<H", raw, record + 20)[0]
    while struct.unpack_from("<I", raw, at)[0] != kind:
        at += struct.unpack_from("<I", raw, at + 4)[0]
    return int(at)


def test_dirty_ntfs(folder: Path) -> None:
    image = folder / "image"
    foreign.make("ntfs", image, 16 * MIB)

    def dirty(raw: bytearray) -> None:
        for start in (_record(raw, 3), int(struct.unpack_from("<Q", raw, 56)[0]) * 4096 + 3 * 1024):
            at = _attribute(raw, start, 0x70)
            raw[at + struct.unpack_from("<H", raw, at + 20)[0] + 10] |= 1

    def only_one(raw: bytearray) -> None:
        raw[_record(raw, 1) + 30] ^= 1

    def torn(raw: bytearray) -> None:
        raw[_record(raw, 6) + 510] ^= 1

    assert "dirty" in reason(foreign.changed(image, dirty))
    assert "copy" in reason(foreign.changed(image, only_one))
    assert "not written whole" in reason(foreign.changed(image, torn))


def test_a_log_with_changes(folder: Path) -> None:
    image = folder / "image"
    foreign.make("ntfs", image, 16 * MIB)
    log = Path(folder / "log")

    def restart(clients: int, flags: int, lsn: int) -> bytes:
        page = bytearray(4096)
        struct.pack_into("<4sHHQIIHHH", page, 0, b"RSTR", 30, 9, 0, 4096, 4096, 48, 1, 1)
        struct.pack_into("<QHHHH", page, 48, lsn, 1, 0xFFFF, clients, flags)
        return bytes(page)

    for pages, clean in (
        ([(0xFFFF, 0, 5), (0xFFFF, 0, 4)], True),
        ([(0, 2, 5), (0, 2, 4)], True),
        ([(0, 0, 5), (0xFFFF, 0, 4)], False),
        ([(0xFFFF, 0, 4), (0, 0, 5)], False),
    ):
        log.write_bytes(b"".join(restart(*page) for page in pages))

        def put(raw: bytearray) -> None:
            at = _attribute(raw, _record(raw, 2), 0x80)
            runs = at + struct.unpack_from("<H", raw, at + 32)[0]
            long, far = raw[runs] & 15, raw[runs] >> 4
            place = int.from_bytes(raw[runs + 1 + long : runs + 1 + long + far], "little")
            raw[place * 4096 : place * 4096 + 8192] = log.read_bytes()

        copy = foreign.changed(image, put)
        if clean:
            assert isinstance(used(copy), Used)
        else:
            assert "not replayed" in reason(copy)


def test_hibernation(folder: Path) -> None:
    image, file = folder / "image", folder / "file"
    foreign.make("ntfs", image, 16 * MIB)
    for index in range(60):  # so that the root folder's index leaves its record
        file.write_bytes(b"x" * 100)
        command.run(["ntfscp", "-q", str(image), str(file), f"a rather long name of a file {index}"])
    file.write_bytes(bytes(8192))
    command.run(["ntfscp", "-q", str(image), str(file), "hiberfil.sys"])
    assert isinstance(used(image), Used), "after a full shutdown, the file is empty"
    file.write_bytes(b"HIBR" + bytes(8188))
    command.run(["ntfscp", "-q", str(image), str(file), "hiberfil.sys"])
    assert "hibernated" in reason(image)


def test_the_copy_of_the_boot_sector_behind_the_volume(folder: Path) -> None:
    """mkntfs makes the volume one sector shorter than its partition, whose last sector holds the copy."""
    image = folder / "image"
    foreign.make("ntfs", image, 16 * MIB)
    raw = image.read_bytes()
    assert raw[-512:] == raw[:512]
    answer = used(image)
    assert isinstance(answer, Used) and 16 * MIB - 512 in answer.extents


@pytest.mark.parametrize(("kind", "options"), [("fat", "-F 16"), ("exfat", ""), ("ntfs", "")])
def test_what_stands_behind_it_is_kept(folder: Path, kind: str, options: str) -> None:
    """A RAID keeps its superblock behind the filesystem."""
    image = folder / "image"
    foreign.make(kind, image, 16 * MIB, options)
    with open(image, "r+b") as file:
        file.truncate(64 * MIB)
    answer = used(image)
    assert isinstance(answer, Used)
    assert 64 * MIB - 1 in answer.extents and 63 * MIB in answer.extents
    assert 32 * MIB not in answer.extents
