from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager import command
from imager.device.partitioning import MAX_LOGICAL, Partitioning, read_partitioning
from tests import structures

MIB = 1 << 20
SIZE = 8 * MIB


def read(image: bytes, sector: int | None = None) -> Partitioning | None:
    return read_partitioning(lambda at, n: bytes(image[at : at + n]) if at >= 0 else b"", len(image), sector)


def whole(image: bytes, sector: int | None = None) -> Partitioning:
    found = read(image, sector)
    assert found is not None
    return found


def written(tmp_path: Path, script: str) -> bytearray:
    for tool in ("sfdisk", "sgdisk"):
        if command.find(tool) is None:
            pytest.skip(f"{tool} is not installed")
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    command.run(["sfdisk", "-q", str(path)], stdin=script.encode())
    return bytearray(path.read_bytes())


GPT = (
    "label: gpt\nlabel-id: D9A1C6F8-1111-4222-8333-444455556666\n"
    'start=2048,size=2048,type=U,name="EFI system"\n'
    'start=8192,size=2048,type=L,attrs="RequiredPartition GUID:63"\n'
)


def test_gpt(tmp_path: Path) -> None:
    found = whole(written(tmp_path, GPT))
    assert (found.scheme, found.sector, found.mbr, found.backup) == ("gpt", 512, "protective", "equal")
    assert found.uuid == "d9a1c6f8-1111-4222-8333-444455556666" and not found.problems and not found.hybrid
    one, two = found.partitions
    assert (one.number, one.start, one.size, one.name) == (1, MIB, MIB, "EFI system")
    assert one.type == "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" and one.attributes == 0
    assert two.attributes == 1 | 1 << 63
    assert found.backup_at == SIZE - 512
    assert [(gap.start, gap.size) for gap in found.gaps] == [
        (34 * 512, MIB - 34 * 512), (2 * MIB, 2 * MIB), (5 * MIB, 3 * MIB - 33 * 512),
    ]  # fmt: skip


@pytest.mark.parametrize("sector", [512, 1024, 2048, 4096])
def test_sectors(sector: int) -> None:
    """An image file says nothing of its sectors: the table does."""
    found = whole(structures.gpt(SIZE, [(256, 511)], sector=sector))
    assert found.sector == sector and found.backup == "equal"
    assert (found.partitions[0].start, found.partitions[0].size) == (256 * sector, 256 * sector)
    assert read(structures.gpt(SIZE, [], sector=sector), sector=sector) == whole(
        structures.gpt(SIZE, [], sector=sector)
    )


def test_the_backup() -> None:
    image = structures.gpt(SIZE, [(2048, 4095)])
    image[512 + 60] ^= 1
    found = whole(image)
    assert found.backup == "only" and len(found.partitions) == 1
    assert any("damaged" in problem for problem in found.problems)
    image = structures.gpt(SIZE, [(2048, 4095)])
    image[-512:] = bytes(512)
    assert whole(image).backup == "missing"
    image = structures.gpt(SIZE, [(2048, 4095)])
    image[-500] ^= 1
    assert whole(image).backup == "damaged"
    image = structures.gpt(SIZE, [(2048, 4095)])
    other = structures.gpt(SIZE, [(2048, 4097)])
    image[-33 * 512 :] = other[-33 * 512 :]
    assert whole(image).backup == "differs"


def test_a_disk_that_grew() -> None:
    image = structures.gpt(SIZE, [(2048, 4095)]) + bytes(SIZE)
    found = whole(image)
    assert found.backup == "equal" and found.backup_at == SIZE - 512
    assert any("not at the disk's end" in problem for problem in found.problems)


def test_hybrid(tmp_path: Path) -> None:
    written(tmp_path, GPT)
    command.run(["sgdisk", "-h", "1:2", str(tmp_path / "disk")])
    found = whole((tmp_path / "disk").read_bytes())
    assert found.mbr == "hybrid"
    assert [(entry.start, entry.type) for entry in found.hybrid] == [(MIB, "ef"), (4 * MIB, "83")]
    assert len(found.partitions) == 2


LOGICAL = (
    "label: dos\nlabel-id: 0x1234abcd\nsize=1M,type=c,bootable\nsize=5M,type=5\nsize=512K\n"
    "size=512K,type=82\nsize=512K\n"
)


def test_logical_partitions(tmp_path: Path) -> None:
    found = whole(written(tmp_path, LOGICAL))
    assert (found.scheme, found.uuid, found.mbr) == ("dos", "1234abcd", "plain")
    dump = command.text(["sfdisk", "-d", str(tmp_path / "disk")])
    theirs = []
    for line in dump.splitlines():
        if "start=" in line:
            fields = dict(f.strip().split("=") for f in line.split(" : ")[1].split(",") if "=" in f)
            number = int(line.split(" : ")[0].strip().removeprefix(str(tmp_path / "disk")))
            theirs.append((number, int(fields["start"]) * 512, int(fields["size"]) * 512, fields["type"]))
    ours = [(p.number, p.start, p.size, p.type.lstrip("0")) for p in found.partitions]
    assert ours == theirs and len(ours) == 5
    assert [p.number for p in found.partitions if p.logical] == [5, 6]
    assert found.partitions[0].attributes == 0x80 and found.partitions[4].uuid == "1234abcd-06"


def test_a_circle_of_logical_partitions() -> None:
    image = structures.mbr(SIZE, [(0x0F, 2048, 8192)])
    structures.boot_record(image, 2048, [(0x83, 8, 100), (0x05, 1000, 100)])
    structures.boot_record(image, 3048, [(0x83, 8, 100), (0x05, 1000, 100)])
    found = whole(image)
    assert [p.number for p in found.partitions] == [1, 5, 6]
    assert any("back to itself" in problem for problem in found.problems)


def test_an_endless_chain() -> None:
    image = structures.mbr(SIZE, [(0x05, 1, 16000)])
    for link in range(600):
        structures.boot_record(image, 1 + link, [(0x83, 1, 1), (0x05, link + 1, 1)])
    found = whole(image)
    assert sum(p.logical for p in found.partitions) == MAX_LOGICAL
    assert any("more than" in problem for problem in found.problems)


def test_a_broken_chain() -> None:
    image = structures.mbr(SIZE, [(0x05, 2048, 100), (0x83, 1, 10)])
    found = whole(image)
    assert any("breaks off" in problem for problem in found.problems)
    assert [p.number for p in found.partitions] == [1, 2]


def test_what_lies_between() -> None:
    image = structures.mbr(SIZE, [(0x83, 2048, 2048)])
    image[5 * 512 : 6 * 512] = b"x" * 512
    image[-100:] = b"y" * 100
    before, behind = whole(image).gaps
    assert (before.start, before.data) == (512, 512)
    assert (behind.start, behind.size, behind.data) == (2 * MIB, 6 * MIB, 100)


def test_overlaps_and_ends() -> None:
    found = whole(structures.gpt(SIZE, [(2048, 4095), (4000, 5000), (10000, 20000)]))
    assert [p for p in found.problems if "overlap" in p] == ["partitions 1 and 2 overlap"]
    assert any("beyond the disk's end" in problem for problem in found.problems)


def test_no_table() -> None:
    assert read(bytes(MIB)) is None
    assert read(b"") is None
    boot = bytearray(MIB)
    boot[3:11] = b"NTFS    "
    boot[510:512] = b"\x55\xaa"
    assert read(boot) is None


CHANGES = st.lists(st.tuples(st.integers(0, 3 * 512), st.integers(0, 255)), min_size=1, max_size=8)


@settings(max_examples=300)
@given(CHANGES, st.booleans())
def test_changed_tables(changes: list[tuple[int, int]], repair: bool) -> None:
    """Whatever the header says, with or without the right checksum."""
    import zlib

    image = structures.gpt(256 << 10, [(64, 100), (200, 300)])
    for at, value in changes:
        image[at] = value
    if repair:
        image[528:532] = bytes(4)
        length = struct.unpack_from("<I", image, 524)[0]
        struct.pack_into("<I", image, 528, zlib.crc32(image[512 : 512 + min(length, 512)]))
    found = read(image)
    if found is not None:
        assert len(found.partitions) <= 1024 and all(p.start >= 0 for p in found.partitions)


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 63), st.integers(0, 3), st.binary(min_size=16, max_size=16)), max_size=30
    )
)
def test_chains_of_anything(entries: list[tuple[int, int, bytes]]) -> None:
    image = structures.mbr(64 * 512, [(0x05, 1, 63)])
    for sector, index, raw in entries:
        at = sector * 512 + 446 + 16 * index
        image[at : at + 16] = raw
        image[sector * 512 + 510 : sector * 512 + 512] = b"\x55\xaa"
    image[446:462] = struct.pack("<B3xB3xII", 0, 5, 1, 63)
    found = read(image)
    if found is not None:
        assert len(found.partitions) <= MAX_LOGICAL + 4
