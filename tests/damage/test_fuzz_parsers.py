"""Every parser in Python of bytes that may be hostile: an `ImagerError`, or a value within its bounds.

What is sealed is sealed here too: a writer with the keys, or anybody where nothing is encrypted,
may put anything into a manifest. IMAGER_FUZZ=N multiplies the number of examples.
"""

from __future__ import annotations

import binascii
import copy as copy_module
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from imager import _native
from imager.changes import given as maps
from imager.device.partition_table import read_table
from imager.engine import verified
from imager.engine.journal import Journal
from imager.errors import ImagerError, UsageError
from imager.repository import keys, manifest, public, writers
from imager.repository.credentials import Credentials
from imager.repository.format import (
    Certificate,
    SessionObject,
    canonical,
    config_message,
    parse,
    parse_config,
    revocation_message,
    shape,
)
from imager.repository.keymemory import KeyMemory
from imager.repository.repository import Repository
from imager.repository.witness import Witness
from imager.storage.folder import FolderStorage
from tests.damage.conftest import Copy
from tests.damage.test_fuzz_repository import settled
from tests.damage.workshop import World

HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.sampled_from([0, 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64]),
    st.text(max_size=12),
    st.sampled_from(["", "00" * 16, "ff" * 32, "AA" * 16, "é" * 16, "\ud7ff"]),
    st.sampled_from(["argon2id", "blake3", "none", "sealed"]),
    st.lists(st.integers(-2, 2**64), max_size=4),
    st.lists(st.lists(st.integers(0, 2**63), min_size=2, max_size=2), max_size=4),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.just([[[[[[[[]]]]]]]]),
)  # fmt: skip


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a tree of JSON."""
    keys_of = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys_of for place in [(value, key), *nodes(value[key])]]


def spoil(data: st.DataObject, value: dict[str, Any]) -> dict[str, Any]:
    """The same object with up to three of its values replaced, removed or added."""
    value = json.loads(json.dumps(value))
    for _ in range(data.draw(st.integers(1, 3))):
        places = nodes(value)
        if not places:
            break
        container, key = places[data.draw(st.integers(0, len(places) - 1))]
        if data.draw(st.integers(0, 5)) == 0:
            del container[key]
        else:
            container[key] = copy_module.deepcopy(data.draw(HOSTILE))
    return value


def encoded(value: dict[str, Any]) -> bytes:
    """As canonical as JSON of these values can be."""
    try:
        return canonical(value)
    except (OverflowError, ValueError, TypeError):  # numbers that msgspec does not write
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ImagerError as error:
        assert error.message and error.exit_code in (1, 2, 10, 11, 12, 30)
        return True
    return False


# --- config, slots, epochs, sessions --------------------------------------------------------


@settled(150)
@given(data=st.data())
def test_configs(worlds: dict[str, World], data: st.DataObject) -> None:
    world = worlds[data.draw(st.sampled_from(["sealed", "none"]))]
    value = spoil(data, json.loads((world.place.root / "config").read_bytes()))
    if not world.sealed and data.draw(st.booleans()):
        try:
            value["seal"] = config_message(value).hex()
        except (OverflowError, ValueError, TypeError):
            pass
    refused(lambda: parse_config(encoded(value)))


@settled(150)
@given(data=st.data())
def test_slots(worlds: dict[str, World], data: st.DataObject) -> None:
    world = worlds["sealed"]
    path = world.place.files("slots")[0]
    value = json.loads(path.read_bytes())
    value = spoil(data, value)
    if isinstance(value.get("kdf"), dict) and data.draw(st.booleans()):
        # Costs above the bounds are refused before they are paid.
        value["kdf"] = {
            "name": "argon2id",
            "salt": "00" * 16,
            "memory_kib": data.draw(st.sampled_from([0, -1, 7, 64, 2**21, 2**40, 2**64])),
            "passes": data.draw(st.sampled_from([0, 1, 17, 2**32])),
            "lanes": data.draw(st.sampled_from([0, 1, 17, 2**32])),
        }
        value["kind"] = "passphrase"
    repository = world.place.reference().config.repository
    secrets = [
        keys.Secret("keyfile", (world.place.folder / "key").read_bytes()),
        keys.passphrase("a passphrase"),
    ]

    def open_it() -> None:
        slot = keys.parse_slot(encoded(value), path.name, repository)
        for secret in secrets:
            keys.open_slot(slot, secret)

    refused(open_it)


@settled(100)
@given(data=st.data())
def test_epochs_and_sessions(worlds: dict[str, World], data: st.DataObject) -> None:
    world = worlds["sealed"]
    config = world.place.reference().config
    epoch = spoil(data, json.loads((world.place.root / "epochs" / "00000001").read_bytes()))
    refused(lambda: keys.parse_epoch(encoded(epoch), "00000001", config.repository, config.key))
    session = spoil(data, json.loads(world.place.files("sessions")[0].read_bytes()))
    refused(lambda: shape(parse(encoded(session), "it"), SessionObject, "it"))
    refused(lambda: manifest.parse_abort_mark(b"IMGRABRT" + encoded(session)))


@settled(200)
@given(
    raw=st.binary(max_size=300)
    | st.sampled_from([b"[" * 5000, b'{"a":' * 5000, b"{}", b"\xff", b'{"a":1.5}', b'{"a":1e999}'])
)
@example(b'{"version":1}' * 2)
def test_garbage(worlds: dict[str, World], raw: bytes) -> None:
    repository = bytes(16)
    assert refused(lambda: parse_config(raw))
    assert refused(lambda: keys.parse_slot(raw, "00" * 16, repository))
    assert refused(lambda: keys.parse_epoch(raw, "00000001", repository, bytes(32)))
    assert refused(lambda: shape(parse(raw, "it"), SessionObject, "it"))
    assert refused(lambda: manifest.parse_abort_mark(b"IMGRABRT" + raw))
    assert refused(lambda: manifest.parse_public(raw, "00" * 16, "00" * 16))
    if not raw.startswith((b"{", b"[")):
        assert refused(lambda: maps.parse(raw, "map")) or not raw.strip()


# --- manifests with a right seal ---------------------------------------------------------------


@pytest.fixture
def opened(world: World, copy: Copy) -> Repository:
    place = copy(world)
    return Repository.open(FolderStorage(str(place.root)), Credentials(keyfile=str(place.folder / "key")))


@settled(100)
@given(data=st.data())
def test_manifests_of_a_hostile_writer(world: World, opened: Repository, data: st.DataObject) -> None:
    set_id = world.sets["third"]
    path = Path(opened.storage.url) / "sets" / set_id
    good = (world.place.root / "sets" / set_id).read_bytes()
    length = int.from_bytes(good[8:12], "little")
    public = json.loads(good[16 : 16 + length])
    envelope = public["envelope"]
    stored = good[16 + length : -64]
    key = opened.open_envelope(bytes.fromhex(envelope))[1] if envelope else None
    if key is not None:
        plain = keys.open_body(key, stored, good[16 : 16 + length])
        assert plain is not None
        stored = plain
    body = json.loads(zlib.decompress(stored))
    which = data.draw(st.sampled_from(["public", "body", "both", "bomb", "tail"]))
    if which in ("public", "both"):
        public = spoil(data, public)
    if which in ("body", "both"):
        body = spoil(data, body)
    packed = zlib.compress(encoded(body))
    if which == "bomb":
        packed = zlib.compress(b" " * (65 << 20), 9)
    elif which == "tail":
        packed += data.draw(st.binary(min_size=1, max_size=9))
    head = encoded(public)
    if key is not None:
        packed = keys.seal_body(key, packed, head)
    signed = struct.pack("<8sII", b"IMGRSET1", len(head), len(packed)) + head + packed
    message = _native.blake3(b"imager set v1" + signed)
    seal = keys.sign(opened.secrets.signing_seed, message) if world.sealed else message + bytes(32)
    raw = signed + seal
    refused(lambda: manifest.decode(opened, set_id, raw))

    # And through the commands: whatever passes for a manifest must not break those that use it.
    path.write_bytes(raw)
    from tests.damage.workshop import Place

    place = Place(path.parents[2])
    out = place.folder / "out"
    for verb in (["list"], ["show", set_id], ["check"], ["verify", set_id], ["diff", set_id, "other"]):
        assert place.imager(*verb).code in (0, 1, 2, 10, 12, 30), verb
    for disk in ("alpha.img", "beta.img"):
        out.unlink(missing_ok=True)
        ended = place.imager("restore", f"{set_id}:{disk}", out)
        assert ended.code in (0, 1, 2, 3, 10, 12, 30)


# --- keys of writers, and pages without a key ------------------------------------------------------


@settled(150)
@given(data=st.data(), raw=st.binary(max_size=200))
def test_revocations_and_certificates(data: st.DataObject, raw: bytes) -> None:
    repository, seed, writer = bytes(range(16)), b"s" * 32, "ab" * 16
    verify_key = keys.public_key(seed)
    good = json.loads(writers.new_revocation(repository, seed, writer, [b"d" * 32, b"e" * 32]))
    changed = spoil(data, good)
    if data.draw(st.booleans()):
        try:
            changed["signature"] = keys.sign(seed, revocation_message(changed)).hex()
        except (OverflowError, ValueError, TypeError):
            pass
    for hostile in (encoded(changed), raw):
        try:
            found = writers.parse_revocation(hostile, writer, repository, verify_key)
        except ImagerError:
            continue
        assert all(len(digest) == 32 for digest in writers.kept(found)) and found.writer == writer
    _, certificate = writers.certify(repository, seed, host="h", label="l")
    value = spoil(data, json.loads(canonical(certificate)))
    try:
        other = shape(value, Certificate, "certificate")
    except ImagerError:
        return
    assert not writers.is_certified(repository, verify_key, other) or other == certificate


@settled(200)
@given(data=st.data(), sealed=st.booleans())
def test_public_parts_of_pages(worlds: dict[str, World], data: st.DataObject, sealed: bool) -> None:
    """As a key that only writes sees them: bytes changed anywhere, and fields by hand with sums that fit."""
    world = worlds["sealed" if sealed else "none"]
    manifest_ = world.place.reference().manifest(bytes.fromhex(world.sets["first"]))
    assert manifest_ is not None
    root = manifest_.public["roots"][0]
    pack = (world.place.root / "maps" / root["pack"][:2] / root["pack"]).read_bytes()
    record = bytearray(pack[root["offset"] : root["offset"] + root["length"]])
    place = public.Place(
        bytes.fromhex(root["pack"]), root["offset"], root["length"], bytes.fromhex(root["id"])
    )
    good = public.parse_page(bytes(record), place, root["level"])
    assert good.targets and all(target.length >= 64 for target in good.targets)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(60, len(record) - 4) | st.integers(64, 84))
        wide = data.draw(st.sampled_from([1, 2, 4]))
        record[at : at + wide] = data.draw(st.binary(min_size=wide, max_size=wide) | st.just(b"\xff" * wide))
    check = struct.pack("<I", _native.xxh3(bytes(record[:60])) & 0xFFFFFFFF)
    record[60:64] = check
    cut = data.draw(st.sampled_from([len(record), 0, 63, 64, 68, 76, len(record) - 1]))
    level = data.draw(st.sampled_from([root["level"], 0, 1, 7]))
    hostile = bytes(record[:cut])
    shorter = public.Place(place.pack, place.offset, data.draw(st.sampled_from([cut, len(record)])), place.id)
    try:
        page = public.parse_page(hostile, shorter, level)
    except ImagerError:
        return
    assert len(page.targets) <= 512
    assert all(64 <= one.length and one.offset + one.length < 1 << 32 for one in page.targets)


@settled(60)
@given(raw=st.binary(max_size=200) | st.sampled_from([b"[" * 5000, b"{}", b'{"epoch":-1}', b'{"revoked":3}']))
def test_what_this_machine_remembers_of_keys(
    quick: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes
) -> None:
    monkeypatch.setenv("IMAGER_STATE_DIR", str(quick))
    (quick / "keys").mkdir(exist_ok=True)
    (quick / "keys" / f"{'00' * 16}.json").write_bytes(raw)
    memory = KeyMemory(bytes(16))
    assert isinstance(memory.slot, str) and isinstance(memory.revoked, dict)
    memory.saw_epoch(1 << 31)
    assert KeyMemory(bytes(16)).epoch >= 1 << 31


# --- maps, tables, and what this machine remembers --------------------------------------------------


@settled(200)
@given(data=st.data())
def test_map_files(data: st.DataObject) -> None:
    bmap = (
        b'<?xml version="1.0" ?><bmap version="2.0"><ImageSize> 1048576 </ImageSize>'
        b"<BlockSize> 4096 </BlockSize><BlocksCount> 256 </BlocksCount>"
        b"<MappedBlocksCount> 3 </MappedBlocksCount><BlockMap><Range> 0-1 </Range><Range> 9 </Range>"
        b"</BlockMap></bmap>"
    )
    ddrescue = b"# comment\n0x00000000 + 1\n0x00000000 0x00001000 ?\n0x00001000 0x00002000 +\n"
    extents = b'{"size":1048576,"extents":[[0,4096],[8192,4096]]}'
    raw = data.draw(st.sampled_from([bmap, ddrescue, extents]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        cut = data.draw(st.integers(0, 6))
        new = data.draw(
            st.binary(max_size=5)
            | st.sampled_from([b"-1", b"9" * 30, b"0x" + b"f" * 20, b"<a>" * 40, b"[" * 40, b"&x;", b"e9"])
        )
        raw = raw[:at] + new + raw[at + cut :]
    try:
        found = maps.parse(raw, "map")
    except UsageError:
        return
    assert all(0 <= start < end for start, end in found.extents)


@settled(200)
@given(
    mbr=st.binary(max_size=64),
    entries=st.integers(0, 2**32 - 1) | st.integers(0, 200),
    size=st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 127, 128, 256]),
    lba=st.integers(0, 2**64 - 1) | st.integers(0, 40),
    table=st.binary(max_size=600),
    sector=st.sampled_from([512, 4096]),
    right=st.booleans(),
)
def test_partition_tables(
    mbr: bytes, entries: int, size: int, lba: int, table: bytes, sector: int, right: bool
) -> None:
    disk = bytearray(64 * sector)
    disk[446 : 446 + len(mbr)] = mbr
    disk[450] = 0xEE if right else disk[450]
    disk[510:512] = b"\x55\xaa"
    disk[2 * sector : 2 * sector + len(table)] = table
    listed = bytes(disk[2 * sector :])[: min(entries * size, len(disk))]
    fields = [1, 63, 34, 60, bytes(16), lba, entries, size, binascii.crc32(listed)]
    header = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *fields)
    header = header[:16] + struct.pack("<I", binascii.crc32(header)) + header[20:]
    disk[sector : sector + len(header)] = header
    found = read_table(lambda at, length: bytes(disk[at : at + min(length, 1 << 20)]), len(disk), sector)
    assert found is None or len(found.entries) <= 4096


@settled(100)
@given(
    raw=st.binary(max_size=200) | st.sampled_from([b"[" * 5000, b'{"x":' * 2000 + b"1", b"{}", b"null"]),
    data=st.data(),
)
def test_what_this_machine_remembers(
    quick: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, data: st.DataObject
) -> None:
    monkeypatch.setenv("IMAGER_STATE_DIR", str(quick))
    journal = Journal(target="t", place=(1, 2), set_id="00" * 16, disk="d", size=1 << 20, block_size=4096)
    Path(journal.path).unlink(missing_ok=True)
    journal.begin(0, 5)
    state = json.loads(Path(journal.path).read_bytes())
    wrong = encoded(spoil(data, state)) if data.draw(st.booleans()) else raw
    Path(journal.path).write_bytes(wrong)
    if journal.load():
        assert all(0 <= start <= end <= 256 for start, end in [*journal.done, *journal.begun])
    witness = Witness(bytes(16).hex())
    (quick / "witness").mkdir(exist_ok=True)
    (quick / "witness" / f"{'00' * 16}.json").write_bytes(raw)
    assert isinstance(witness.observe([]), list)
    (quick / "verified" / "a").mkdir(parents=True, exist_ok=True)
    (quick / "verified" / "a" / "b.json").write_bytes(raw)
    assert verified.last("a", "b") is None
