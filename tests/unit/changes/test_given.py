"""Maps that someone gives: every format, every misfit, and other tools as oracles."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager.changes import formats
from imager.changes import given as maps
from imager.changes.collect import MOST, Collector
from imager.changes.provider import Base, Changes, Request, Unknown
from imager.changes.scan import HashScan
from imager.command import find
from imager.device.identity import Identity
from imager.errors import UsageError
from imager.extents import Extents

SET, DIGEST = "ab" * 16, "cd" * 32
SIZE = 1 << 20
IDENTITY = Identity("disk", "/dev/sdz", "sdz", "serial:S1", size=SIZE, serial="S1")


def request(size: int = SIZE, base: Base | None = None, identity: Identity = IDENTITY) -> Request:
    return Request(-1, size, identity, base or Base(SET, DIGEST, SIZE, {"key": "serial:S1"}))


def document(**more: Any) -> bytes:
    return json.dumps({"extents": [[4096, 8192]], **more}).encode()


sizes = st.integers(1, 1 << 40)


@st.composite
def images(draw: st.DrawFn) -> tuple[Extents, int]:
    size = draw(sizes)
    ends = st.integers(0, size)
    pairs = draw(st.lists(st.tuples(ends, ends), max_size=12))
    return Extents.of((min(p), max(p)) for p in pairs), size


@given(images(), st.sampled_from(["json", "ddrescue"]))
def test_round_trip(image: tuple[Extents, int], format: str) -> None:
    extents, size = image
    back = maps.parse(formats.render(format, extents, size))
    assert (back.format, back.extents, back.size) == (format, extents, size)


@given(images())
def test_round_trip_bmap_widens_to_blocks(image: tuple[Extents, int]) -> None:
    extents, size = image
    back = maps.parse(formats.render("bmap", extents, size))
    assert back.size == size
    assert back.extents == extents.blocks(4096).scale(4096).clip(size)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    st.binary(max_size=200), st.sampled_from([b"", b"<", b"{", b"#", b"0x0 ? 1\n", b'<bmap version="2.0">'])
)
def test_any_bytes_are_read_or_refused(data: bytes, head: bytes) -> None:
    try:
        maps.parse(head + data)
    except UsageError as error:
        assert error.exit_code == 2


@given(images(), st.integers(0, 1 << 20), st.integers(0, 255))
def test_an_edited_bmap_is_refused_or_equal(image: tuple[Extents, int], at: int, byte: int) -> None:
    data = bytearray(formats.render("bmap", *image))
    honest = maps.parse(bytes(data))
    data[at % len(data)] = byte
    try:
        assert maps.parse(bytes(data)).extents == honest.extents
    except UsageError:
        pass


def test_json_extents_are_start_and_length() -> None:
    assert maps.parse(document()).extents.ranges == ((4096, 12288),)


@pytest.mark.parametrize(
    "text",
    [
        b'{"extents": [[0, -1]]}',
        b'{"extents": [[-1, 1]]}',
        b'{"extents": [[0, 1.5]]}',
        b'{"extents": [[0, 99999999999999999999999]]}',
        b'{"extents": [[0, 1152921504606846977]]}',
        b'{"extents": [[10, 10]], "size": 19}',
        b'{"extents": [], "size": -1}',
        b'{"extents": 1}',
        b'{"size": 1}',
        b'{"extents": [[0, 1, 2]]}',
        b'{"extents": [',
        b"{" + b'"extents": ' + b"[" * 100000,
        b"",
        b"hello",
        b"\x00\x01",
        b"# nothing\n",
        b"0x0 ? 1\n",
        b"0 ? 1\n0 4096 ?\n8192 4096 +\n",
        b"0 ? 1\n0 4096 %\n",
        b"0 ? 1\n0 4096\n",
        b"0 Q 1\n0 4096 +\n",
        b"0 ? 1\n0 0xFFFFFFFFFFFFFFFF +\n",
        b"<bmap/>",
        b"<other/>",
        b"<bmap version='3.0'/>",
        b"<bmap version='2.0'><ImageSize>1</ImageSize><BlockSize>0</BlockSize></bmap>",
        b"<bmap version='2.0'><ImageSize>10</ImageSize><BlockSize>4</BlockSize><BlockMap>"
        b"<Range>0-3</Range></BlockMap></bmap>",
        b"<bmap version='2.0'><ImageSize>10</ImageSize><BlockSize>4</BlockSize>"
        b"<BlocksCount>4</BlocksCount></bmap>",
        b"<bmap version='2.0'><ImageSize>10</ImageSize><BlockSize>4</BlockSize>"
        b"<MappedBlocksCount>2</MappedBlocksCount><BlockMap><Range>1</Range></BlockMap></bmap>",
        b"<bmap version='2.0'><ChecksumType>blub</ChecksumType><BmapFileChecksum>00</BmapFileChecksum>"
        b"<ImageSize>10</ImageSize><BlockSize>4</BlockSize></bmap>",
        b"<a>" * 100000,
    ],
)
def test_nonsense_is_refused(text: bytes) -> None:
    with pytest.raises(UsageError):
        maps.parse(text)


def test_entities_are_never_expanded() -> None:
    bomb = b'<?xml version="1.0"?><!DOCTYPE bmap [<!ENTITY a "1111111111"><!ENTITY b "&a;&a;&a;&a;&a;&a;">]>'
    bomb += b'<bmap version="2.0"><ImageSize>&b;</ImageSize></bmap>'
    with pytest.raises(UsageError, match="document type"):
        maps.parse(bomb)


def test_bmap_1_3_with_sha1() -> None:
    zero = "0" * 40
    text = f"""<?xml version="1.0" ?>
<bmap version="1.3">
    <ImageSize> 20000 </ImageSize> <BlockSize> 4096 </BlockSize> <BlocksCount> 5 </BlocksCount>
    <MappedBlocksCount> 3 </MappedBlocksCount> <BmapFileSHA1> {zero} </BmapFileSHA1>
    <BlockMap> <Range sha1="00"> 0-1 </Range> <Range sha1="00"> 4 </Range> </BlockMap>
</bmap>
""".encode()
    good = text.replace(zero.encode(), hashlib.sha1(text).hexdigest().encode())
    assert maps.parse(good).extents.ranges == ((0, 8192), (16384, 20000))
    with pytest.raises(UsageError, match="checksum is wrong"):
        maps.parse(good.replace(b"0-1", b"0-0").replace(b"> 3 <", b"> 2 <"))


def test_bmap_1_2_without_checksums() -> None:
    text = (
        b"<bmap version='1.2'><ImageSize> 10 </ImageSize><BlockSize>4</BlockSize><BlocksCount>3</BlocksCount>"
    )
    text += b"<MappedBlocksCount>1</MappedBlocksCount><BlockMap><Range> 2 </Range></BlockMap></bmap>"
    assert maps.parse(text) == maps.GivenMap("map", "bmap", Extents.of([(8, 10)]), 10)


def test_ddrescue_statuses() -> None:
    text = (
        b"# Mapfile\n0x0 ? 1 # status\n0x10 16 +\n0x20 020 ?\n0x30 16 *\n64 16 /\n0x50 0x10 -\n0x60 0x10 ?\n"
    )
    got = maps.parse(text)
    assert got.size == 0x70
    # before 0x10 the map says nothing, so it counts as changed
    assert got.extents.ranges == ((0, 0x20), (0x30, 0x60))


def test_used_where_all_fits() -> None:
    got = maps.parse(document(size=SIZE, source={"key": "serial:S1"}, base=SET[:8])).changes(request())
    assert got == Changes(Extents.of([(4096, 12288)]), "given:json", exact=False)
    assert isinstance(maps.parse(document(base=DIGEST.upper())).changes(request()), Changes)
    assert isinstance(maps.parse(document(source={"serial": "S1", "size": 7})).changes(request()), Changes)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"size": SIZE + 1}, "bytes"),
        ({"extents": [[SIZE, 1]]}, "past the end"),
        ({"source": {"key": "serial:S2"}}, "another source"),
        ({"source": {"serial": "S2"}}, "another source"),
        ({"source": {"wwn": "5000"}}, "another source"),
        ({"base": "00" * 16}, "starts at set"),
        ({"base": "ab"}, "starts at set"),
    ],
)
def test_misfits_are_unknown(fields: dict[str, Any], reason: str) -> None:
    got = maps.parse(document(**fields)).changes(request())
    assert isinstance(got, Unknown)
    assert reason in got.reason


def test_misfits_of_the_base() -> None:
    given_map = maps.parse(document())
    assert isinstance(given_map.changes(Request(-1, SIZE, IDENTITY, None)), Unknown)
    assert isinstance(given_map.changes(request(base=Base(SET, DIGEST, SIZE - 1))), Unknown)
    assert isinstance(given_map.changes(request(base=Base(SET, DIGEST, SIZE, {"key": "serial:S9"}))), Unknown)
    stream = Identity("stream", "-", "-", "stream:")
    assert isinstance(given_map.changes(request(identity=stream)), Unknown)


def test_scan_names_everything() -> None:
    assert HashScan().changes(request(77)) == Changes(Extents.whole(77), "scan", exact=True)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the map"):
        maps.read(tmp_path / "none")


def sparse_image(path: Path) -> int:
    size = 3_000_001
    with open(path, "wb") as file:
        file.truncate(size)
        for at, length in ((0, 700), (40960, 100_000), (size - 5, 5)):
            file.seek(at)
            file.write(os.urandom(length))
    return size


@pytest.mark.skipif(find("bmaptool") is None, reason="bmaptool is not installed")
def test_bmaptool_is_read_and_reads_ours(tmp_path: Path) -> None:
    image = tmp_path / "a.img"
    size = sparse_image(image)
    theirs = subprocess.run(["bmaptool", "create", image], capture_output=True, check=True).stdout
    (tmp_path / "a.bmap").write_bytes(theirs)
    got = maps.read(tmp_path / "a.bmap")
    assert (got.format, got.size) == ("bmap", size)
    assert all(point in got.extents for point in (0, 41000, 140959, size - 1))
    assert 1_000_000 not in got.extents

    data = image.read_bytes()
    ours = formats.render("bmap", got.extents, size, read=lambda start, end: [data[start:end]])
    (tmp_path / "b.bmap").write_bytes(ours)
    copy = ["bmaptool", "copy", "--bmap", f"{tmp_path}/b.bmap", f"{image}", f"{tmp_path}/out.img"]
    subprocess.run(copy, capture_output=True, check=True)
    assert (tmp_path / "out.img").read_bytes() == data
    (tmp_path / "b.bmap").write_bytes(ours.replace(b'chksum="', b'chksum="0', 1))
    assert subprocess.run(copy, capture_output=True, check=False).returncode != 0


@pytest.mark.skipif(find("ddrescue") is None, reason="ddrescue is not installed")
def test_ddrescue_is_read_and_reads_ours(tmp_path: Path) -> None:
    image, out = tmp_path / "a.img", tmp_path / "out.img"
    size = sparse_image(image)
    wanted = Extents.of([(40960, 81920), (2_000_000, 2_000_512)])
    (tmp_path / "domain").write_bytes(formats.render("ddrescue", wanted, size))
    argv = ["ddrescue", "-q", "-m", f"{tmp_path}/domain", f"{image}", f"{out}", f"{tmp_path}/map"]
    subprocess.run(argv, check=True)
    got = maps.read(tmp_path / "map")
    assert (got.format, got.extents) == ("ddrescue", wanted)
    data, copied = image.read_bytes(), out.read_bytes()
    assert copied[40960:81920] == data[40960:81920]
    assert not any(copied[:40960])


@given(
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 5000)), max_size=300),
    st.integers(1, 20),
)
def test_collected_extents_cover_what_was_added(pairs: list[tuple[int, int]], most: int) -> None:
    size = (1 << 20) + 5000
    collector = Collector(most)
    for start, length in pairs:
        collector.add(start, start + length)
    exact = Extents.of((start, start + length) for start, length in pairs)
    found = collector.result(size)
    assert not exact - found
    assert len(found) <= most
    if not collector.coarsened:
        assert found == exact
    elif len(exact) < 2 * most and len(pairs) < 2 * most:
        gaps = sorted(b[0] - a[1] for a, b in pairwise(exact.ranges))
        assert found.total == exact.total + sum(gaps[: len(exact) - most])


def test_a_map_of_very_many_extents_is_coarsened() -> None:
    count = 600_000
    lines = ["0 ? 1"]
    lines += [f"{2 * n} 1 +\n{2 * n + 1} 1 ?" for n in range(count)]
    got = maps.parse("\n".join(lines).encode())
    assert got.coarsened and got.size == 2 * count
    assert len(got.extents) == MOST
    assert got.extents.total == 2 * count - MOST
