from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager import command
from imager.device.md import Member, read_member
from tests import structures

SIZE = 16 << 20


def member(image: bytes) -> Member | None:
    return read_member(lambda at, n: bytes(image[at : at + n]), len(image))


def image_of(version: str, **more: int) -> bytearray:
    image = bytearray(SIZE)
    at, raw = structures.md_0(SIZE) if version == "0.90" else structures.md_1(SIZE, version, **more)
    image[at : at + len(raw)] = raw
    return image


@pytest.mark.parametrize("version", ["0.90", "1.0", "1.1", "1.2"])
def test_as_mdadm_reads_it(tmp_path: Path, version: str) -> None:
    """The superblock is made here, byte by byte; mdadm finds the same in it, its checksum included."""
    if command.find("mdadm") is None:
        pytest.skip("mdadm is not installed")
    path = tmp_path / "member"
    path.write_bytes(image_of(version))
    said = command.text(["mdadm", "--examine", str(path)])
    fields = dict(re.findall(r"^\s*([A-Za-z ]+?) : (.*)$", said, re.M))
    found = member(path.read_bytes())
    assert found is not None and found.whole
    assert fields["Checksum"].endswith("correct"), said
    assert found.version == version and fields["Version"].startswith(version)
    uuid = fields["Array UUID"] if version != "0.90" else fields["UUID"]
    assert found.uuid == uuid.split(" ")[0]
    assert found.level == fields["Raid Level"] and found.devices == int(fields["Raid Devices"])
    if version == "0.90":
        assert fields["Events"] == str(found.events) and found.clean == (fields["State"] == "clean")
        assert (found.role, found.data_size) == ("0", 10240 << 10)
        return
    assert fields["Events"] == str(found.events) and fields["Device Role"] == f"Active device {found.role}"
    assert found.name == fields["Name"].split(" ")[0] and found.device_uuid == fields["Device UUID"]
    assert found.data_offset == int(fields.get("Data Offset", "0 sectors").split(" ")[0]) * 512
    assert found.chunk == 64 << 10 and fields["Chunk Size"] == "64K"


def test_roles() -> None:
    found = member(image_of("1.2", role=9))
    assert found is not None and found.role == "spare"


def test_damage() -> None:
    image = image_of("1.2")
    image[4096 + 200] ^= 1
    found = member(image)
    assert found is not None and not found.whole
    image[4096] ^= 1
    assert member(image) is None
    assert member(bytes(SIZE)) is None and member(b"") is None


@settings(max_examples=200)
@given(
    st.sampled_from(["0.90", "1.0", "1.1", "1.2"]),
    st.lists(st.tuples(st.integers(4, 4095), st.integers(0, 255)), min_size=1, max_size=10),
)
def test_no_bytes_make_it_fail(version: str, changes: list[tuple[int, int]]) -> None:
    image = bytearray(256 << 10)
    at, raw = structures.md_0(len(image)) if version == "0.90" else structures.md_1(len(image), version)
    image[at : at + len(raw)] = raw
    for offset, value in changes:
        if at + offset < len(image):
            image[at + offset] = value
    found = member(image)
    assert found is None or found.data_size < 1 << 63
