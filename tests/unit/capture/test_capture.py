"""Layouts of what makes no sense, the systems on it, boot entries, and pictures of it."""

from __future__ import annotations

import json
import os
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager.capture import layout
from imager.capture.layout import Layout, Volume, read_layout
from imager.capture.mounted import Folder
from imager.capture.system import Crypt, Mount, parse_release, read_system
from imager.cli import layouts as lines
from imager.device import efi, lvm
from imager.engine import picture
from imager.engine.layouts import Occupied
from imager.extents import Extents
from imager.filesystem.files import LONGEST
from tests import structures

MIB = 1 << 20
KINDS = (Path(__file__).parents[3] / "fixtures" / "tool-output" / "lvm-kinds.vg").read_text()


def captured(raw: bytes) -> Layout:
    fd = os.memfd_create("disk")
    try:
        os.write(fd, raw)
        return read_layout(fd, len(raw), None, maps=True)
    finally:
        os.close(fd)


def sample() -> bytearray:
    """A GPT with an md member, a LUKS2 volume and a physical volume of LVM."""
    raw = structures.gpt(2 * MIB, [(128, 1151), (1152, 1663), (1664, 2687), (2688, 3000)])
    at, block = structures.md_1(1024 * 512, "1.2")
    raw[128 * 512 + at : 128 * 512 + at + 512] = block
    raw[1152 * 512 : 1152 * 512 + 0x4000] = structures.luks2({"segments": {}})
    base = 1664 * 512
    label = bytearray(512)
    struct.pack_into("<8sQII8s", label, 0, b"LABELONE", 1, 0, 32, b"LVM2 001")
    label[32:64] = b"0" * 32
    struct.pack_into("<QQQQQQQQQII", label, 64, 1 << 19, 256 << 10, 0, 0, 0, 4096, 65536, 0, 0, 0, 0)
    struct.pack_into("<I", label, 16, lvm.checksum(bytes(label[20:])))
    raw[base + 512 : base + 1024] = label
    text = KINDS.encode()
    area = bytearray(512)
    struct.pack_into("<16sIQQ", area, 4, b" LVM2 x[5A%r0N*>", 1, 4096, 65536)
    struct.pack_into("<QQII", area, 40, 65536 - 1000, len(text), lvm.checksum(text), 0)
    struct.pack_into("<I", area, 0, lvm.checksum(bytes(area[4:])))
    raw[base + 4096 : base + 4608] = area
    end = base + 4096 + 65536
    raw[end - 1000 : end] = text[:1000]  # the area is a ring
    raw[base + 4608 : base + 4608 + len(text) - 1000] = text[1000:]
    return raw


def test_the_sample() -> None:
    found = captured(bytes(sample()))
    assert [volume.kind for volume in found.volumes] == [
        "linux_raid_member",
        "crypto_LUKS",
        "LVM2_member",
        "",
    ]
    physical = found.volumes[2].lvm
    assert physical is not None and physical.group is not None and physical.text == KINDS
    assert len(found.volumes[2].volumes) == 6
    assert "lie outside" in found.volumes[2].why  # of a volume that is cut short
    told = list(lines.lines(found))
    assert any("kinds/home" in line for line in told)


@settings(max_examples=250, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.integers(0, 2000), st.integers(64 << 10, 72 << 10), st.integers(1152 * 512, 1160 * 512),
                st.integers(1664 * 512, 1664 * 512 + 9000),
            ),
            st.sampled_from([0, 1, 2, 65, 127, 128, 255]),
        ),
        min_size=1,
        max_size=10,
    ),
    st.integers(0, 2 * MIB),
)  # fmt: skip
def test_changed_disks(changes: list[tuple[int, int]], length: int) -> None:
    raw = sample()
    for at, value in changes:
        raw[at] = value
    found = captured(bytes(raw[:length] if length % 3 == 0 else raw))
    plain = msgspec.json.encode(layout.to_plain(found))
    assert layout.from_plain(json.loads(plain)) == found
    "".join(lines.lines(found))


def test_a_layout_stays_small() -> None:
    """A volume group of ten thousand segments is a hostile one, or one that is better kept as blocks."""
    segments = "\n".join(
        f'segment{i} {{ start_extent = {i} extent_count = 1 type = "striped" stripe_count = 1'
        f' stripes = ["pv0", {i}] }}'
        for i in range(1, 40_000)
    )
    text = (
        'g { id = "x" seqno = 1 extent_size = 1'
        ' physical_volumes { pv0 { id = "i" pe_start = 1 pe_count = 9 } }'
        f' logical_volumes {{ v {{ id = "v" status = ["VISIBLE"] segment_count = 39999 {segments} }} }} }}'
    )
    physical = lvm.PhysicalVolume("i", MIB, (), (), (), lvm.parse_group(text), "pv0", text)
    big = Layout(1, MIB, 512, None, (Volume("", 0, MIB, lvm=physical),))
    small = layout._bounded(big)
    assert len(msgspec.json.encode(big)) > layout.MAX_LAYOUT > len(msgspec.json.encode(small))
    assert "more than can be kept" in small.volumes[0].problems[0]


def test_a_disk_that_cannot_be_read() -> None:
    fd = os.open("/", os.O_RDONLY)  # reading a folder fails, as a disk may
    try:
        found = read_layout(fd, MIB, 512)
    finally:
        os.close(fd)
    assert "cannot be read" in found.problems[0] and "cannot be read" in found.volumes[0].problems[0]


# --- systems ---------------------------------------------------------------------------------


def test_os_release() -> None:
    said = parse_release('ID=arch\nNAME="Arch Linux"\n#X=1\nA B=2\nVERSION_ID=\nBROKEN="x\nX=\'a b\' c\n')
    assert said == {"ID": "arch", "NAME": "Arch Linux", "VERSION_ID": "", "X": "a b"}


def test_a_folder_is_not_left(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (tmp_path / "secret").write_text("host\n")
    (root / "etc/hostname").symlink_to("../../secret")
    (root / "etc/fstab").write_text("a /b c d\n" + "x" * LONGEST)
    os.mkfifo(root / "etc/crypttab")
    os.makedirs(os.fsencode(root) + b"/boot/vmlinuz-\xff6.1")
    only_kernel = read_system(Folder(str(root)))
    assert only_kernel is not None and only_kernel.kernels == ("\ufffd6.1",)
    assert only_kernel.hostname == "" and only_kernel.fstab == () == only_kernel.crypttab
    (root / "etc/fstab").write_text("UUID=1 / ext4\nshort\n#UUID=2 /b c d\n")
    system = read_system(Folder(str(root)))
    assert system is not None and system.hostname == ""
    assert system.fstab == (Mount("UUID=1", "/", "ext4", ""),)


@given(
    st.dictionaries(
        st.sampled_from(["etc/fstab", "etc/crypttab", "etc/os-release", "etc/hostname"]), st.binary()
    )
)
def test_any_files(content: dict[str, bytes]) -> None:
    class Some:
        def read(self, path: str) -> bytes | None:
            return content.get(path)

        def names(self, path: str) -> tuple[str, ...]:
            return ()

    system = read_system(Some())
    if system is not None:
        msgspec.json.encode(system)
        assert all(isinstance(line, Crypt) for line in system.crypttab)


# --- boot entries ------------------------------------------------------------------------------


def _path(partition: bytes, file: str) -> bytes:
    name = file.encode("utf-16-le") + b"\0\0"
    disk = struct.pack("<BBHIQQ16sBB", 4, 1, 42, 1, 2048, 4096, partition, 2, 2)
    return disk + struct.pack("<BBH", 4, 4, 4 + len(name)) + name + b"\x7f\xff\4\0"


def _entry(title: str, path: bytes, active: int = 1) -> bytes:
    return struct.pack("<IH", active, len(path)) + title.encode("utf-16-le") + b"\0\0" + path + b"data"


def test_boot_entries(tmp_path: Path) -> None:
    folder = tmp_path / "efivars"
    folder.mkdir()
    suffix = "-8be4df61-93ca-11d2-aa0d-00e098032b8c"
    attributes = b"\x07\0\0\0"
    guid = bytes(range(16))
    variables = {
        "BootOrder": struct.pack("<HH", 3, 0x1A),
        "BootCurrent": struct.pack("<H", 0x1A),
        "Boot0003": _entry("debian", _path(guid, "\\EFI\\debian\\shimx64.efi")),
        "Boot001A": _entry("Network", b"\x7f\xff\4\0", 0),
        "Boot00FF": b"\1",
    }
    for name, value in variables.items():
        (folder / (name + suffix)).write_bytes(attributes + value)
    (folder / f"Boot0001-{'0' * 8}").write_bytes(b"another vendor's")
    debian, network = efi.boot_entries(str(tmp_path))
    assert (debian.number, debian.description, debian.active, debian.order, debian.current) == (
        "0003", "debian", True, 0, False,
    )  # fmt: skip
    assert debian.partition == "03020100-0504-0706-0809-0a0b0c0d0e0f"
    assert debian.path == "\\EFI\\debian\\shimx64.efi"
    assert (network.order, network.current, network.active, network.partition) == (1, True, False, None)
    assert efi.boot_entries(str(tmp_path / "none")) == ()


@given(st.binary(max_size=200))
def test_any_boot_entry(raw: bytes) -> None:
    efi.parse_entry("0000", raw, [], None)
    efi.parse_entry("0000", struct.pack("<IH", 1, len(raw)) + b"a\0\0\0" + raw, [], None)


# --- pictures ----------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.text(max_size=40),
    st.integers(0, 1 << 62),
    st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 1 << 30)), max_size=20),
)
def test_any_picture_is_well_formed(name: str, size: int, ranges: list[tuple[int, int]]) -> None:
    extents = Extents.of((start, start + length) for start, length in ranges).clip(size)
    volumes = tuple(Volume(name, start, length, kind=name) for start, length in ranges)
    some = Layout(1, size, 512, None, volumes)
    occupied = Occupied(extents, extents.complement(size), extents, extents, extents)
    drawn = picture.draw(name, name, [picture.Disk(name, size, some, occupied, name)])
    ElementTree.fromstring(drawn.encode())
    assert len(drawn) < 400_000


def test_a_picture_of_no_disk() -> None:
    ElementTree.fromstring(picture.draw("<&>\"'", "\x00\ud800", []))


@pytest.mark.parametrize("data", [0, 1, 500, 1000])
def test_columns_are_to_scale(data: int) -> None:
    """Half of a disk that holds data is half of the columns, to the column."""
    columns = picture._fractions(Extents.of([(0, data)]), 1000)
    assert abs(sum(columns) - 960 * data / 1000) < 0.001
