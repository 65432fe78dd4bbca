from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imager import command
from imager.device.partition_table import Table, is_extended, read_table

SIZE = 8 << 20
UUID = "d9a1c6f8-1111-4222-8333-444455556666"


def table_of(image: bytes, sector: int = 512) -> Table | None:
    return read_table(lambda offset, length: image[offset : offset + length], len(image), sector)


def written(tmp_path: Path, script: str) -> bytearray:
    if command.find("sfdisk") is None:
        pytest.skip("sfdisk is not installed")
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(SIZE)
    command.run(["sfdisk", "-q", str(path)], stdin=script.encode())
    return bytearray(path.read_bytes())


GPT = f"label: gpt\nlabel-id: {UUID}\nsize=1M,name=first\nstart=4M,size=1M,uuid={UUID[:-1]}7\n"


def test_gpt(tmp_path: Path) -> None:
    table = table_of(bytes(written(tmp_path, GPT)))
    assert table is not None and not table.from_backup
    assert (table.scheme, table.uuid) == ("gpt", UUID)
    assert [(e.number, e.start, e.size, e.name) for e in table.entries] == [
        (1, 1 << 20, 1 << 20, "first"), (2, 4 << 20, 1 << 20, None),
    ]  # fmt: skip
    assert table.partition_uuid(2) == UUID[:-1] + "7"
    assert table.partition_uuid(9) is None


def test_the_backup_is_believed_where_the_first_is_damaged(tmp_path: Path) -> None:
    image = written(tmp_path, GPT)
    image[512 + 60] ^= 1
    table = table_of(bytes(image))
    assert table is not None and table.from_backup and table.uuid == UUID


def test_damaged_entries_are_not_believed(tmp_path: Path) -> None:
    image = written(tmp_path, GPT)
    image[1024 + 20] ^= 1
    image[-512 - 60] ^= 1
    image[-512 * 33 + 20] ^= 1
    assert table_of(bytes(image)) is None


def test_mbr(tmp_path: Path) -> None:
    table = table_of(bytes(written(tmp_path, "label: dos\nlabel-id: 0x1234abcd\nsize=1M\ntype=5\n")))
    assert table is not None
    assert (table.scheme, table.uuid) == ("dos", "1234abcd")
    assert table.entries[0].uuid == "1234abcd-01"
    assert table.partition_uuid(5) == "1234abcd-05"
    assert [is_extended(e) for e in table.entries] == [False, True]


def test_a_boot_sector_is_no_table() -> None:
    sector = bytearray(1 << 20)
    sector[510:512] = b"\x55\xaa"
    sector[3:11] = b"NTFS    "
    assert table_of(bytes(sector)) is None
    assert table_of(bytes(1 << 20)) is None
    assert table_of(b"") is None


@given(st.binary(min_size=0, max_size=600), st.binary(max_size=512))
def test_no_bytes_make_it_fail(start: bytes, header: bytes) -> None:
    table_of((start[:510].ljust(510, b"\0") + b"\x55\xaa" + header).ljust(4096, b"\0"))
    table_of(start)


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_reading_is_bounded(count: int, entry_size: int, lba: int) -> None:
    """A header with a right checksum and absurd numbers asks for little."""
    import zlib

    header = bytearray(92)
    struct.pack_into("<8sII", header, 0, b"EFI PART", 0x10000, 92)
    struct.pack_into("<Q", header, 24, 1)
    struct.pack_into("<QIII", header, 72, lba, count, entry_size, 0)
    struct.pack_into("<I", header, 16, zlib.crc32(header))
    image = bytearray(8192)
    image[450] = 0xEE
    image[510:512] = b"\x55\xaa"
    image[512:604] = header
    asked: list[int] = []

    def read(offset: int, length: int) -> bytes:
        asked.append(length)
        return bytes(image[offset : offset + length])

    read_table(read, len(image), 512)
    assert max(asked) <= 4 << 20
