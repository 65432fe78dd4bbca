"""Manifests keep what they say, and a text means one image set or none."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager.errors import ImagerError, IntegrityError, NoRepository, UsageError, WrongKey
from imager.repository import imageset, keys
from imager.repository.format import canonical
from imager.repository.imageset import NoSuchSet, Selector
from imager.repository.manifest import decode, encode, root_level
from imager.repository.repository import Repository
from tests.unit.repository.building import BLOCK, Lab, noise


def test_a_manifest_comes_back(lab: Lab) -> None:
    manifest = lab.backup(sda=noise(3), sdb=b"")
    assert [(image.disk, image.size, image.block_size) for image in manifest.images] == [
        ("sda", 3 * BLOCK, BLOCK),
        ("sdb", 0, BLOCK),
    ]
    assert manifest.images[0].root is not None and manifest.images[1].root is None
    assert manifest.name == "d" and manifest.sequence == 1 and manifest.previous is None
    assert imageset.read_set(lab.reopen(), manifest.id) == manifest
    later = lab.backup(sda=noise(3))
    assert later.sequence == 2 and later.previous is not None
    assert (later.previous.set, later.previous.digest) == (manifest.id, manifest.digest.hex())


def test_odd_content_comes_back(lab: Lab) -> None:
    manifest = lab.backup(sda=noise(3))
    image = msgspec.structs.replace(
        manifest.images[0],
        unreadable=((0, 512), (4096, 512)),
        source={"path": "/dev/ünïcode", "serial": None, "wwn": b"\x01\x02"},
        layout={"table": "gpt", "partitions": [{"n": 1}]},
    )
    body = msgspec.structs.replace(manifest).content
    body = msgspec.structs.replace(
        body, images=(image,), tags=("a", "b"), stats={"read": 1 << 62}, changes="hash"
    )
    session_key = lab.repository.open_envelope(manifest.envelope)[1] if manifest.envelope else None
    raw = encode(lab.repository, manifest.public, body, session_key)
    back = decode(lab.repository, manifest.id, raw)
    assert back.images[0].unreadable == image.unreadable
    assert back.images[0].source == {"path": "/dev/ünïcode", "serial": None, "wwn": "0102"}
    assert back.content.stats == {"read": 1 << 62} and back.content.tags == ("a", "b")


def test_every_bit_of_a_manifest_counts(lab: Lab) -> None:
    manifest = lab.backup(sda=noise(3))
    raw = lab.paths("sets")[0].read_bytes()
    for at in range(len(raw)):
        changed = bytearray(raw)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(IntegrityError):
            decode(lab.repository, manifest.id, bytes(changed))
    for cut in (0, 5, 16, 80, len(raw) - 1):
        with pytest.raises(IntegrityError):
            decode(lab.repository, manifest.id, raw[:cut])
    with pytest.raises(IntegrityError):
        decode(lab.repository, manifest.id, raw + b"\0")


def test_manifests_cannot_be_swapped_or_borrowed(make_lab: Callable[[str], Lab]) -> None:
    lab, other = make_lab("keyfile"), make_lab("keyfile")
    one, two, foreign = lab.backup(sda=noise(1)), lab.backup(sda=noise(2)), other.backup(sda=noise(1))
    raw = lab.storage.read(f"sets/{one.id}")
    with pytest.raises(IntegrityError, match="copy"):
        decode(lab.repository, two.id, raw)
    with pytest.raises(IntegrityError, match="another repository"):
        decode(lab.repository, foreign.id, other.storage.read(f"sets/{foreign.id}"))
    # Signed by somebody who knows all but the signing key:
    forger = msgspec.structs.replace(lab.repository.secrets, signing_seed=os.urandom(32))
    forged = Repository(lab.storage, lab.repository.config, forger)
    key = lab.repository.open_envelope(one.envelope or b"")[1]
    with pytest.raises(IntegrityError, match="seal"):
        decode(lab.repository, one.id, encode(forged, one.public, one.content, key))


def test_the_body_is_sealed_and_a_write_only_key_does_without(make_lab: Callable[[str], Lab]) -> None:
    lab = make_lab("keyfile")
    manifest = lab.backup(name="secretname", sda=noise(2))
    raw = lab.storage.read(f"sets/{manifest.id}")
    assert b"secretname" not in raw and b"sda" not in raw
    writer = keys.Secrets(lab.repository.secrets.id_key, lab.repository.secrets.signing_seed, {})
    repository = Repository(lab.storage, lab.repository.config, writer)
    seen = decode(repository, manifest.id, raw)
    assert seen.body is None and seen.digest == manifest.digest
    for use in (lambda: seen.images, lambda: seen.name):
        with pytest.raises(WrongKey):
            use()
    assert imageset.resolve(repository, "secretname", host="host").id == manifest.id


def rebuilt(lab: Lab, manifest: imageset.Manifest, plain: bytes, **public: object) -> bytes:
    """A manifest with a right seal and any content: what a hostile writer with the keys could make."""
    import struct

    from imager import _native

    head = canonical({**msgspec.to_builtins(manifest.public), **public})
    if manifest.envelope:
        plain = keys.seal_body(lab.repository.open_envelope(manifest.envelope)[1], plain, head)
    signed = struct.pack("<8sII", b"IMGRSET1", len(head), len(plain)) + head + plain
    message = _native.blake3(b"imager set v1" + signed)
    if lab.repository.sealed:
        return signed + keys.sign(lab.repository.secrets.signing_seed, message)
    return signed + message + bytes(32)


def test_hostile_bodies_are_refused_without_much_memory(lab: Lab) -> None:
    manifest = lab.backup(sda=noise(3))
    image = {"disk": "sda", "size": 3 * BLOCK, "block_size": BLOCK, "unreadable": []}
    good = {"name": "d", "host": "h", "images": [image], "more": "is fine"}
    raw = rebuilt(lab, manifest, zlib.compress(canonical(good)))
    assert decode(lab.repository, manifest.id, raw).name == "d"
    bodies = [
        b"",
        b"garbage",
        zlib.compress(b"null"),
        zlib.compress(b"[" * 1_000_000),
        zlib.compress(bytes((64 << 20) + 1), 1),
        zlib.compress(canonical(good)) + b"x",
        zlib.compress(canonical(good))[:-3],
    ]
    for change in (
        {"size": -1},
        {"size": 1 << 63},
        {"size": 1 << 40},
        {"size": 0},
        {"block_size": 0},
        {"block_size": 4097},
        {"block_size": "x"},
        {"unreadable": [[0, 1 << 40]]},
        {"unreadable": [[5, 0]]},
        {"unreadable": [[8192, 10], [0, 10]]},
        {"disk": None},
    ):
        bodies.append(zlib.compress(canonical({**good, "images": [{**image, **change}]})))
    bodies.append(zlib.compress(canonical({**good, "images": []})))
    bodies.append(zlib.compress(canonical({**good, "images": [image, image]})))
    for body in bodies:
        with pytest.raises(IntegrityError):
            decode(lab.repository, manifest.id, rebuilt(lab, manifest, body))
    body = zlib.compress(canonical(good))
    root = msgspec.to_builtins(manifest.public.roots[0])
    for public in (
        {"sequence": 0},
        {"sequence": 2},
        {"lineage": "x"},
        {"roots": []},
        {"roots": [None]},
        {"roots": [{**root, "pack": "zz"}]},
        {"roots": [{**root, "offset": 1 << 33}]},
        {"roots": [{**root, "length": 1 << 20}]},
        {"roots": [{**root, "level": 1}]},
        {"roots": [{**root, "level": 200}]},
        {"roots": [{**root, "id": ""}]},
        {"created": "x"},
        {"set": "00" * 16},
    ):
        with pytest.raises(IntegrityError):
            decode(lab.repository, manifest.id, rebuilt(lab, manifest, body, **public))
    for public in ({"features": ["patch"]}, {"version": 2}):
        with pytest.raises(NoRepository):
            decode(lab.repository, manifest.id, rebuilt(lab, manifest, body, **public))


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=300), magic=st.booleans())
def test_garbage_is_an_error_and_nothing_else(lab: Lab, raw: bytes, magic: bool) -> None:
    with pytest.raises(IntegrityError):
        decode(lab.repository, "00" * 16, (b"IMGRSET1" if magic else b"") + raw)


def test_the_height_of_a_map() -> None:
    assert [root_level(n) for n in (1, 256, 257, 65536, 65537, 1 << 24)] == [0, 0, 1, 1, 2, 2]


# --- choosing ---------------------------------------------------------------------------

DAY = 86_400_000_000
NOON = 1_795_305_600_000_000  # 2026-11-22 00:00 UTC, in microseconds


def test_what_a_text_means(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    old = lab.backup(name="web", created=NOON + 13 * 3600 * 1_000_000, a=noise(1))
    new = lab.backup(name="web", created=NOON + DAY, a=noise(2))
    other = lab.backup(name="db", created=NOON + 2 * DAY, a=noise(3), b=noise(1))

    def means(text: str) -> str:
        return imageset.resolve(lab.repository, text, host="host").id

    assert means("latest") == other.id
    assert means("web") == new.id and means("db") == other.id
    assert means(old.id) == old.id and means(old.id[:10]) == old.id and means(old.id[:10].upper()) == old.id
    assert means("web@2026-11-22") == old.id and means("web@2026-11-23") == new.id
    assert means("web@2026-11-22 13:00") == old.id and means("web@2026-11-22T13:00:00Z") == old.id
    assert means("web@2026-11-22T14:00+01:00") == old.id
    assert means("latest@2026-11-23") == new.id
    assert imageset.resolve(lab.repository, "web", host="elsewhere").id == new.id
    for text in ("nobody", "web@2026-11-21", "00" * 16, "web@2026-11-22 12:59", "ab", "nobody@2026-11-22"):
        with pytest.raises(NoSuchSet) as caught:
            means(text)
        assert caught.value.hint
    for text in ("web@yesterday", "web@2026-13-01", "web@"):
        with pytest.raises(UsageError):
            means(text)
    assert imageset.select_image(old, None).disk == "a"
    assert imageset.select_image(other, "b").size == BLOCK
    for disk in (None, "c"):
        with pytest.raises(UsageError, match="a, b"):
            imageset.select_image(other, disk)


def test_an_ambiguous_prefix_lists_what_it_may_mean(lab: Lab) -> None:
    manifest = lab.backup(sda=noise(1))
    twin = manifest.id[:6] + ("0" if manifest.id[6] != "0" else "1") + manifest.id[7:]
    (lab.root / "sets" / twin).write_bytes(b"damaged, but there")
    with pytest.raises(UsageError, match=twin) as caught:
        imageset.resolve(lab.repository, manifest.id[:6])
    assert manifest.id in caught.value.message
    with pytest.raises(IntegrityError):
        imageset.resolve(lab.repository, twin[:8])


def test_a_name_goes_before_a_prefix(lab: Lab) -> None:
    first = lab.backup(name="other", sda=noise(1))
    named = lab.backup(name=first.id[:6], sda=noise(2))
    assert imageset.resolve(lab.repository, first.id[:6], host="host").id == named.id
    assert imageset.resolve(lab.repository, first.id[:7], host="host").id == first.id


def test_a_damaged_set_does_not_hide_the_others(lab: Lab) -> None:
    first, second = lab.backup(sda=noise(1)), lab.backup(sda=noise(2))
    path = lab.root / "sets" / second.id
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))
    (lab.root / "sets" / ".DS_Store").write_bytes(b"x")
    listing = imageset.list_sets(lab.repository)
    assert [manifest.id for manifest in listing.sets] == [first.id]
    assert [problem.id for problem in listing.problems] == [second.id]
    lineage = bytes.fromhex(first.lineage)
    found, damaged = imageset.latest_of(lab.repository, lineage)
    assert found is not None and found.id == first.id and [item.id for item in damaged] == [second.id]
    with pytest.raises(IntegrityError):  # what is asked for is damaged: an older one is not taken silently
        imageset.resolve(lab.repository, "d", host="host")


def test_abort_marks_are_no_sets(lab: Lab) -> None:
    manifest = lab.backup(sda=noise(1))
    mark = b"IMGRABRT" + canonical({"session": "ab" * 16, "created": 1, "reason": "gone"})
    lab.storage.create("sets/" + "ab" * 16, mark)
    listing = imageset.list_sets(lab.repository)
    assert [item.id for item in listing.sets] == [manifest.id]
    assert listing.aborted == ("ab" * 16,) and not listing.problems
    with pytest.raises(NoSuchSet, match="aborted"):
        imageset.read_set(lab.repository, "ab" * 16)
    assert [head.id for head in imageset.heads(lab.repository)[0]] == [manifest.id]


def test_the_chain_tells_of_what_is_missing_or_exchanged(make_lab: Callable[[str], Lab]) -> None:
    lab = make_lab("none")  # here anybody can make a right seal
    first, second, third = (lab.backup(sda=noise(n)) for n in (1, 2, 3))
    assert imageset.chain_problems(imageset.list_sets(lab.repository)) == []
    path = lab.root / "sets" / second.id
    body = zlib.compress(canonical({"name": "x", "host": "h", "images": [
        {"disk": "sda", "size": 2 * BLOCK, "block_size": BLOCK}]}))  # fmt: skip
    path.write_bytes(rebuilt(lab, second, body))
    ((hurt, text),) = imageset.chain_problems(imageset.list_sets(lab.repository))
    assert hurt == third.id and second.id in text and "another" in text
    path.unlink()
    ((hurt, text),) = imageset.chain_problems(imageset.list_sets(lab.repository))
    assert hurt == third.id and second.id in text and "missing" in text
    assert first.id


def test_selectors() -> None:
    split = imageset.split_selector
    assert split("web") == Selector("web")
    assert split("web:sda") == Selector("web", "sda")
    assert split("web:sda:2") == Selector("web", "sda", 2)
    assert split("web@2026-11-22 13:40") == Selector("web@2026-11-22 13:40")
    assert split("web@2026-11-22 13:40:sda") == Selector("web@2026-11-22 13:40", "sda")
    assert split("web@2026-11-22T13:40:05+01:00:sda:3") == Selector("web@2026-11-22T13:40:05+01:00", "sda", 3)
    assert split("web@2026-11-22:sda") == Selector("web@2026-11-22", "sda")
    assert split("a disk.img") == Selector("a disk.img")
    for wrong in ("", ":", "web:", ":sda", "web:sda:x", "web:sda:0", "a:b:1:2"):
        with pytest.raises(UsageError):
            split(wrong)


@given(st.text(max_size=30))
def test_any_text_is_taken_apart_or_refused(text: str) -> None:
    for work in (imageset.split_selector, imageset.parse_time, imageset.check_name):
        try:
            work(text)
        except ImagerError:
            pass


def test_times_mean_the_end_of_what_they_name() -> None:
    assert imageset.parse_time("2026-11-22Z") == NOON + DAY - 1
    assert imageset.parse_time("2026-11-22T00:00Z") == NOON + 60_000_000 - 1
    assert imageset.parse_time("2026-11-22 00:00:00Z") == NOON + 1_000_000 - 1
    assert imageset.parse_time("2026-11-22 00:00:00.5Z") == NOON + 500_000
    assert imageset.parse_time("2026-11-22T00:00:00+0100") == NOON - 3_600_000_000 + 1_000_000 - 1
    assert imageset.parse_time("9999-12-30") > NOON


def test_names() -> None:
    assert imageset.check_name("my disk.img") == "my disk.img"
    for wrong in ("", "a:b", "a@b", "-x", "latest", "ab" * 16, "a\n", " a", "x" * 256):
        with pytest.raises(UsageError):
            imageset.check_name(wrong)


def test_listing_many_sets_is_quick(make_lab: Callable[[str], Lab], tmp_path: Path) -> None:
    """A manifest takes well below a millisecond, so a thousand sets take no noticeable time."""
    import time

    lab = make_lab("keyfile")
    manifest = lab.backup(sda=noise(1))
    raw = lab.storage.read(f"sets/{manifest.id}")
    decode(lab.repository, manifest.id, raw)
    begun = time.process_time()
    for _ in range(200):
        decode(lab.repository, manifest.id, raw)
    assert (time.process_time() - begun) / 200 < 0.002
