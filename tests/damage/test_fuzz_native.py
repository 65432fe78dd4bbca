"""Whatever bytes and numbers the native core is handed, it raises an exception or answers.

A panic of Rust arrives as `PanicException`, which is no `Exception`, and so fails the test; an
abort ends the whole run. IMAGER_FUZZ=N multiplies the number of examples.
"""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from imager import _native
from imager._native import DATA, Gather, Known, Names, PackWriter, Slots, Vault
from tests.damage.conftest import Copy
from tests.damage.test_fuzz_repository import settled
from tests.damage.workshop import World, pack_path, patched, with_footer_sum, with_head_sum, with_header_sum
from tests.reference_writer import index_segment

REPOSITORY, ID_KEY = bytes(range(16)), bytes(range(32))
NATURAL = st.one_of(st.integers(0, 9), st.integers(0, 2**64 - 1), st.sampled_from([2**31, 2**32 - 1, 2**63]))
SMALL = st.one_of(st.integers(0, 600), st.integers(0, 2**20))
U32 = st.one_of(st.integers(0, 5000), st.integers(0, 2**32 - 1))
IDS = st.sampled_from([bytes(32), bytes([1]) * 32, bytes([255]) * 32])
REFUSALS = (ValueError, OSError, IndexError, OverflowError, TypeError, MemoryError)


def file_of(data: bytes) -> int:
    fd = os.memfd_create("fuzz")
    os.write(fd, data)
    return fd


@contextmanager
def file_closed(data: bytes) -> Iterator[int]:
    """A file that holds `data`, closed in the end."""
    fd = file_of(data)
    try:
        yield fd
    finally:
        os.close(fd)


# --- records and pages -----------------------------------------------------------------------


def page_record(public: bytes, sealed: bytes, *, plain: int | None = None) -> bytes:
    """A record of a map page that is not encrypted, whose id and checksum are right."""
    key = blake3(ID_KEY, derive_key_context="imager 2026-11 map page v1").digest()
    payload = struct.pack("<I", len(public)) + public + sealed
    head = struct.pack(
        "<4sBBHII32s12s",
        b"IREC",
        2,
        0,
        0xFFFF,
        len(sealed) if plain is None else plain,
        len(payload),
        blake3(payload, key=key).digest(),
        bytes(12),
    )
    return head + struct.pack("<I", xxh3_64_intdigest(head) & 0xFFFFFFFF) + payload


PUBLICS = st.builds(
    lambda level, version, packs, targets, names, entries: (
        struct.pack("<BBHHH", level, version, packs, targets, 0) + names + entries
    ),
    st.integers(0, 9) | st.integers(0, 255),
    st.sampled_from([1, 1, 1, 2]),
    st.integers(0, 3) | st.integers(0, 65535),
    st.integers(0, 3) | st.integers(0, 65535),
    st.binary(max_size=96),
    st.binary(max_size=130),
)
SEALED = st.builds(
    lambda first, slots, runs: struct.pack("<QH", first, slots) + b"".join(runs),
    NATURAL,
    st.integers(0, 256) | st.integers(0, 65535),
    st.lists(
        st.builds(
            lambda kind, length, numbers: bytes([kind, length]) + numbers,
            st.integers(0, 5),
            st.integers(0, 255),
            st.binary(max_size=20),
        ),
        max_size=5,
    ),
)


@settled(300)
@given(
    public=PUBLICS | st.binary(max_size=200),
    sealed=SEALED | st.binary(max_size=100),
    plain=NATURAL | st.none(),
)
def test_pages_with_right_ids(public: bytes, sealed: bytes, plain: int | None) -> None:
    vault, names = Vault(REPOSITORY, ID_KEY), Names()
    record = page_record(public, sealed, plain=plain and plain & 0xFFFFFFFF)
    try:
        _, level, _, slots = vault.open_page(record, [], names, names.reserve())
    except _native.DamagedError:
        return
    assert level < 8 and 1 <= len(slots) <= 256


@settled(300)
@given(record=st.binary(max_size=300), keys=st.lists(st.none() | st.integers(0, 3), max_size=3))
def test_page_garbage(record: bytes, keys: list[int | None]) -> None:
    vault = Vault(REPOSITORY, ID_KEY)
    vault.add_key(1, bytes(32))
    with pytest.raises(REFUSALS):
        vault.open_page(record, keys, Names(), 0)


# --- packs -------------------------------------------------------------------------------------


@settled(200)
@given(data=st.data())
def test_damaged_packs(worlds: dict[str, World], data: st.DataObject) -> None:
    world = worlds[data.draw(st.sampled_from(["sealed", "none"]))]
    kind = data.draw(st.sampled_from(["packs", "maps"]))
    name = (world.packs if kind == "packs" else world.maps)["third"][0]
    pack = pack_path(world.place.root, kind, name).read_bytes()
    whole = pack
    for _ in range(data.draw(st.integers(1, 3))):
        near = data.draw(st.sampled_from([0, len(pack) - 200, data.draw(st.integers(0, len(pack)))]))
        at = min(max(0, near + data.draw(st.integers(0, 199))), len(pack) - 1)
        new = data.draw(st.binary(min_size=1, max_size=8) | st.just(b"\xff" * 4))[: len(pack) - at]
        pack = patched(pack, at, new)
        if data.draw(st.booleans()):
            pack = with_footer_sum(with_header_sum(with_head_sum(pack, 72 + 104 * world.sealed)))
    repository = world.place.reference().config.repository
    fd = file_of(pack)
    try:
        report = _native.check_pack(fd, name, repository)
        assert report.ok == (pack == whole)
        for given_name in (name, None):
            try:
                records = _native.pack_records(fd, given_name, repository)
            except (_native.DamagedError, _native.ReadError):
                continue
            assert all(offset + length <= len(pack) for _, _, offset, length in records)
        try:
            assert len(_native.pack_envelopes(pack[: 72 + 104 * 1024], repository)) <= 1024
        except _native.DamagedError:
            pass
    finally:
        os.close(fd)


@settled(200)
@given(header=st.binary(max_size=400), fix=st.booleans())
def test_header_garbage(header: bytes, fix: bool) -> None:
    if fix and len(header) > 80:
        header = with_header_sum(b"IMGRPACK" + header[8:])
    with pytest.raises(_native.DamagedError):
        _native.pack_envelopes(header, REPOSITORY)
    fd = file_of(header)
    try:
        with pytest.raises((_native.DamagedError, _native.ReadError)):
            _native.pack_records(fd, None, REPOSITORY)
        assert not _native.check_pack(fd, bytes(32), REPOSITORY).ok
    finally:
        os.close(fd)


@settled(60)
@given(
    kind=st.integers(0, 255),
    sequence=NATURAL,
    envelope=st.none() | st.binary(max_size=120) | st.just(bytes(104)),
    key=st.none() | st.integers(0, 3),
    pages=st.lists(
        st.tuples(st.integers(0, 255), NATURAL, st.integers(0, 300), st.integers(0, 255)), max_size=3
    ),
)
def test_writing_packs(
    kind: int, sequence: int, envelope: bytes | None, key: int | None, pages: list[tuple[int, int, int, int]]
) -> None:
    vault, names = Vault(REPOSITORY, ID_KEY), Names()
    vault.add_key(2, bytes(32))
    with tempfile.TemporaryFile() as file:
        try:
            writer = PackWriter(
                vault,
                file.fileno(),
                kind=kind,
                session=bytes(16),
                sequence=sequence,
                envelope=envelope,
                key=key,
                number=names.reserve(),
            )
            for level, first, count, slot_kind in pages:
                if slot_kind != DATA:
                    writer.add_page(level, first, Slots(count, slot_kind), names)
        except REFUSALS:
            return
        writer.finish()
        for late in (writer.finish, lambda: writer.add_page(0, 0, Slots(1), names)):
            with pytest.raises(ValueError):
                late()


# --- index ----------------------------------------------------------------------------------------


def resealed(segment: bytes) -> bytes:
    """All checksums fit again: only what they are made over is hostile."""
    segment = patched(segment, 64, xxh3_64_intdigest(segment[:64]).to_bytes(8, "little"))
    names = int.from_bytes(segment[12:16], "little")
    if names < 100:
        check = xxh3_64_intdigest(segment[4096 : 4096 + 32 * names]).to_bytes(8, "little")
        segment = patched(segment, 4096 + 32 * names, check)
    for at in range(8192, len(segment) - 4095, 4096):
        check = xxh3_64_intdigest(segment[at + 8 : at + 4096]).to_bytes(8, "little")
        segment = patched(segment, at, check)
    return segment


@settled(200)
@given(data=st.data())
def test_damaged_segments(worlds: dict[str, World], data: st.DataObject) -> None:
    """Any of it damaged: header, names, pages, filter. Looked up in, and merged with one that is whole."""
    world = worlds["none"]
    repository = world.place.reference().config.repository
    segment = (world.place.root / "index" / world.index["first"][0]).read_bytes()
    ids = [hashlib.sha256(bytes([number % 256, number // 256])).digest() for number in range(400)]
    _, whole = index_segment(repository, [bytes(32)], [(one, 0, 72, 100) for one in ids])
    if data.draw(st.booleans()):
        segment = index_segment(repository, [b"p" * 32], [(one, 0, 72, 100) for one in ids])[1]
    for _ in range(data.draw(st.integers(1, 3))):
        page = data.draw(st.integers(0, len(segment) // 4096 - 1)) * 4096
        at = page + data.draw(st.integers(0, 80) | st.integers(0, 4090))
        segment = patched(segment, at, data.draw(st.binary(min_size=1, max_size=4) | st.just(b"\xff" * 4)))
    if data.draw(st.booleans()):
        segment = segment[: data.draw(st.integers(0, len(segment)))]
    if data.draw(st.booleans()) and len(segment) > 12288 - 1:
        segment = resealed(segment)
    known = Known(Names())
    with file_closed(segment) as fd, file_closed(whole) as other, file_closed(b"") as out:
        known.load(other, repository, b"w" * 32)
        try:
            known.load(fd, repository, b"s" * 32)
        except (_native.DamagedError, _native.ReadError):
            assert known.count(b"".join(ids)) == len(ids)
            return
        for record in world.records(world.packs["first"][0]):
            known.find(record.id)
        assert known.find(bytes(32)) is None and known.find(b"\xff" * 32) is None
        assert known.count(b"".join(ids)) == len(ids), "the one that is whole has them all"
        job = known.merge([b"s" * 32, b"w" * 32], out, repository, [])
        while job.step():
            pass
        merged = Known(Names())
        merged.load(out, repository)
        assert merged.count(b"".join(ids)) == len(ids) and merged.damaged_pages == 0


# --- slots, and what is fetched by them --------------------------------------------------------------


@st.composite
def hostile_slots(draw: st.DrawFn) -> Slots:
    slots = Slots(draw(st.integers(0, 12)), draw(st.sampled_from([0, 1, 2, 4, 255])))
    for _ in range(draw(st.integers(0, 8))):
        at = draw(st.integers(0, 12))
        try:
            slots.set_data(at, draw(IDS), draw(st.integers(0, 2) | U32), draw(U32), draw(U32))
        except IndexError:
            assert at >= len(slots)
    return slots


@settled(300)
@given(one=hostile_slots(), two=hostile_slots(), a=NATURAL, b=NATURAL, kind=st.integers(0, 255))
def test_slots_out_of_range(one: Slots, two: Slots, a: int, b: int, kind: int) -> None:
    names = Names()
    names.reserve()
    calls: list[Any] = [
        lambda: one.slice(a, b),
        lambda: one.put(a, two),
        lambda: one.fill(a, b, kind),
        lambda: one.get(a),
        lambda: one.resize(a % 100, kind),
        lambda: one.set_data(a, bytes(32), b, b, b),
        lambda: one.set_data(0, bytes(kind), 0, 0, 0),
        lambda: _native.diff_slots(one, two),
        lambda: one.extend(two),
        lambda: (
            one.runs(),
            one.counts(),
            one.packs(),
            one.uniform(),
            one.copy() == one,
            one.same_places(two),
        ),
        lambda: one.drop_absent(names),
        lambda: names.resolve(a & 0xFFFFFFFF, bytes(32)),
        lambda: names.name(b & 0xFFFFFFFF),
    ]
    for call in calls:
        try:
            call()
        except REFUSALS:
            pass


RANGES = st.lists(st.tuples(NATURAL, NATURAL), max_size=3)


@settled(300)
@given(
    parts=st.lists(st.tuples(NATURAL, hostile_slots(), st.none() | RANGES), max_size=3),
    bounds=st.tuples(SMALL, SMALL),
    image_size=NATURAL,
    block_size=st.sampled_from([0, 1, 511, 512, 4096, 4097, 65536, 4 << 20, 8 << 20]),
    content=st.binary(max_size=300),
    threads=st.integers(0, 3),
)
def test_fetching_from_anywhere(
    parts: list[tuple[int, Slots, list[tuple[int, int]] | None]],
    bounds: tuple[int, int],
    image_size: int,
    block_size: int,
    content: bytes,
    threads: int,
) -> None:
    vault, gather = Vault(REPOSITORY, ID_KEY), Gather()
    fd, target = file_of(content), os.memfd_create("target")
    packs: dict[int, tuple[int, list[int | None]]] = {0: (fd, []), 1: (fd, [None])}
    try:
        for first, slots, ranges in parts:
            if ranges is None:
                gather.add(first, slots)
            else:
                gather.add_ranges(first, slots, sorted(ranges))
        gather.sort()
        gather.slice_end(*bounds)
        gather.packs(*bounds)
        sizes = {"image_size": image_size, "block_size": block_size}
        done, failures = _native.fetch(
            vault, packs, gather, 0, len(gather), **sizes, target=target, threads=threads
        )
        assert done == 0 and len(failures) == len(gather)
        _native.fetch(
            vault, packs, gather, *bounds, image_size=image_size, block_size=block_size, threads=threads
        )
        _native.read_blocks(vault, packs, gather, **sizes)
    except REFUSALS:
        pass
    finally:
        assert os.fstat(target).st_size == 0
        os.close(fd)
        os.close(target)


@settled(200)
@given(
    source=st.binary(max_size=9000),
    ranges=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5) | st.integers(0, 300)), max_size=3),
    image_size=st.integers(0, 20000) | NATURAL,
    block_size=st.sampled_from([0, 512, 4096, 4097, 4 << 20, 8 << 20]),
    base=hostile_slots(),
    codec=st.integers(0, 4),
    level=st.integers(-5, 99),
    threads=st.integers(0, 3),
    offset=NATURAL,
    sector=st.integers(0, 5000),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
@example(b"", [(0, 1)], 4096, 4096, Slots(1), 1, 1, 1, 0, 0, (True, True, True, True))
def test_scanning_anything(
    source: bytes,
    ranges: list[tuple[int, int]],
    image_size: int,
    block_size: int,
    base: Slots,
    codec: int,
    level: int,
    threads: int,
    offset: int,
    sector: int,
    flags: tuple[bool, bool, bool, bool],
) -> None:
    vault, names = Vault(REPOSITORY, ID_KEY), Names()
    fd, out = file_of(source), os.memfd_create("pack")
    from_file, direct, skip, store = flags
    try:
        writer = PackWriter(
            vault, out, kind=1, session=bytes(16), sequence=0, envelope=None, key=None, number=names.reserve()
        )
        found = _native.scan(
            vault,
            fd if from_file else source,
            ranges,
            image_size=image_size,
            block_size=block_size,
            base=base,
            pack=writer if store else None,
            known=Known(names) if store else None,
            codec=codec,
            level=level,
            threads=threads,
            direct=direct and from_file,
            source_offset=offset,
            skip_errors=skip,
            sector=sector,
        )
        assert len(found.slots) == sum(end - start for start, end in ranges) == len(base)
    except REFUSALS:
        pass
    finally:
        os.close(fd)
        os.close(out)


@settled(100)
@given(
    content=st.binary(max_size=5000),
    start=NATURAL,
    end=NATURAL,
    grain=st.integers(0, 9000),
    direct=st.booleans(),
)
def test_comparing_anything(content: bytes, start: int, end: int, grain: int, direct: bool) -> None:
    a, b = file_of(content), file_of(content[::-1])
    try:
        for call in (
            lambda: _native.compare_files(a, b, start, end, grain=grain, direct=direct),
            lambda: _native.non_zero(a, start, end, direct=direct),
            lambda: _native.compare_files(a, 9999, start, end),
            lambda: _native.non_zero(-1, start, end),
        ):
            try:
                call()
            except REFUSALS:
                pass
    finally:
        os.close(a)
        os.close(b)


def test_the_small_ones_of_wrong_lengths(world: World, copy: Copy) -> None:
    vault = Vault(REPOSITORY, ID_KEY)
    for call in (
        lambda: Vault(b"", ID_KEY),
        lambda: Vault(REPOSITORY, b"short"),
        lambda: vault.add_key(3, bytes(32)),
        lambda: vault.add_key(1, bytes(31)),
        lambda: _native.blake3(b"", b"short"),
        lambda: Names().intern(b"x"),
        lambda: Names().set_present([b"x"]),
        lambda: Known(Names()).find(b"x"),
        lambda: Known(Names()).load(-1, REPOSITORY),
        lambda: Known(Names()).load(9999, REPOSITORY),
        lambda: Known(Names()).load(0, b""),
    ):
        with pytest.raises(REFUSALS):
            call()
    assert len(vault.block_id(b"")) == len(_native.blake3_derive("x", b"")) == 32


@pytest.mark.parametrize("count", [2**40, 2**60, 2**64 - 1])
def test_more_slots_than_memory(count: int) -> None:
    """In a process of its own: an allocator that fails would end it."""
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
from imager._native import Slots
for call in (lambda: Slots({count}), lambda: Slots(1).resize({count}, 0)):
    try:
        call()
    except MemoryError:
        continue
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
