"""Whatever bytes a repository holds, the reference reader reads the image or raises its own error.

Each parser gets mutated, cut and hostile input, with the checksums made right
again where they would hide what lies behind them. Memory is measured: nothing
may reserve what its bound does not allow.
"""

from __future__ import annotations

import json
import struct
import tempfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager import reference
from imager.reference import Config, ReadError, Repository, Secrets
from tests import reference_vectors as v
from tests import reference_writer as w

LIMIT = 48 << 20  # above the largest block and what it is read through, far below any length a field can hold
FAST = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

SEALED = Config(v.REPOSITORY, True, 0, w.public_of(v.SEED))
PLAIN = Config(v.REPOSITORY, False, 0, v.ID_KEY)
SECRETS = Secrets(v.ID_KEY, {1: v.EPOCH})


@contextmanager
def contained(limit: int = LIMIT) -> Iterator[None]:
    """Only the reader's own errors, within a bound of memory."""
    tracemalloc.start()
    try:
        yield
    except ReadError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < limit, f"{peak} bytes reserved"


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` with bytes or fields changed, cut off, or grown."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["byte", "field", "cut", "insert", "delete"])):
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "field":
                size = draw(st.sampled_from([2, 4, 8]))
                top = (1 << 8 * size) - 1
                edges = st.sampled_from([0, 1, top, top - 1, top // 2, 1 << 16, 65535])
                value = draw(edges | st.integers(0, top))
                data[at : at + size] = (value & top).to_bytes(size, "little")
            case "cut":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=20))
            case "delete":
                del data[at : at + draw(st.integers(1, 40))]
    return bytes(data)


def some(good: bytes) -> st.SearchStrategy[bytes]:
    """Mutations of `good`, and bytes that have nothing to do with it."""
    return mutated(good) | st.binary(max_size=300)


# Bytes ----------------------------------------------------------------------------------------------

HEAD = w.head(1, 1, 0, 4096, 100, b"\1" * 32, v.NONCE)
HEADER = w.pack_header(1, v.REPOSITORY, v.SESSION, 3, [v.envelope()])
NAME, PACK = w.pack(HEADER, [HEAD + bytes(100), HEAD + bytes(100)])
TAIL = PACK[len(HEADER) + 2 * 164 :]
PUBLIC, INNER = w.page(1, 0, [(w.SELF, 80, 200, b"\1" * 32), 0, 0, 1, (b"\2" * 32, 80, 200, b"\3" * 32)])


@FAST
@given(some(HEAD), st.booleans())
def test_head(data: bytes, repair: bool) -> None:
    if repair:
        data = data[:60] + struct.pack("<I", reference.xxh3(data[:60]) & 0xFFFFFFFF)
    with contained():
        head = reference.parse_head(data)
        assert head.plain_length <= 4 << 20 and head.payload_length <= head.plain_length + 65536


@FAST
@given(some(HEADER), st.booleans())
def test_pack_header(data: bytes, repair: bool) -> None:
    if repair:
        data = data[:-8] + struct.pack("<Q", reference.xxh3(data[:-8]))
    with contained():
        assert reference.header_length(data) <= 72 + 104 * 1024
        reference.parse_header(data, 1, v.REPOSITORY)


@FAST
@given(some(TAIL), st.booleans())
def test_trailer(data: bytes, repair: bool) -> None:
    if repair:
        data = data[:-8] + struct.pack("<Q", reference.xxh3(data[-32:-8]))
    with contained():
        reference.parse_trailer(HEADER, data, reference.b3(b"imager pack v1" + HEADER + data))


@FAST
@given(some(v.envelope()))
def test_envelope(data: bytes) -> None:
    with contained():
        assert reference.open_envelope(data, SEALED, SECRETS)[1] == v.SESSION_KEY


@FAST
@given(some(PUBLIC), some(INNER), st.integers(0, 6), st.integers(1, 256))
def test_page(public: bytes, sealed: bytes, level: int, slots: int) -> None:
    for one, other in ((public, INNER), (PUBLIC, sealed), (public, sealed)):
        with contained():
            runs = reference.parse_page(one, other, 1, 0, 5, bytes(32))
            assert sum(length for length, _ in runs) == 5
            assert all(len(targets) in (0, length) for length, targets in runs)
        with contained():
            reference.parse_page(one, other, level, 0, slots, bytes(32))


@FAST
@given(st.sampled_from([0, 1, 2, 3, 255]), st.data(), st.sampled_from([1, 4096, 65536, 4 << 20]))
def test_decode(codec: int, data: st.DataObject, size: int) -> None:
    coded = data.draw(some(w.encode(codec, b"imager" * 700)) if codec <= 2 else st.binary())
    with contained():
        assert len(reference.decode(codec, coded, size)) == size


@pytest.mark.parametrize("codec", [w.LZ4, w.ZSTD])
def test_bombs(codec: int) -> None:
    """Content that decodes to far more than stated is not decoded."""
    bomb = w.encode(codec, bytes(64 << 20))
    for size in (4096, 4 << 20):
        with contained(16 << 20), pytest.raises(reference.Damaged):
            reference.decode(codec, bomb, size)


def test_body_bomb() -> None:
    """A manifest's body is decompressed to 64 MiB, and not further."""
    stream = zlib.compressobj()
    body = b"".join(stream.compress(bytes(1 << 20)) for _ in range(256)) + stream.flush()
    manifest = reference.Manifest(v.SESSION, {"version": 1, "envelope": None}, b"", body)
    with contained(160 << 20), pytest.raises(reference.Damaged, match="too large"):
        reference.open_body(manifest, PLAIN, SECRETS)


def test_large_windows_are_refused() -> None:
    """A Zstandard frame does not make the reader hold a large window."""
    import zstandard

    options = zstandard.ZstdCompressionParameters(window_log=27)
    stream = zstandard.ZstdCompressor(compression_params=options).compressobj()
    frame = stream.compress(b"x" * 4096) + stream.flush()
    with pytest.raises(reference.Damaged):
        reference.decode(w.ZSTD, frame, 4096)


# JSON -----------------------------------------------------------------------------------------------

LEAF = (
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.just(1.5)
    | st.binary(max_size=40).map(bytes.hex) | st.sampled_from([1 << 63, 1 << 31, -1, "0" * 32, "ff" * 104])
)  # fmt: skip
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner)
)


@st.composite
def altered(draw: st.DrawFn, good: Any) -> Any:
    """A JSON value like `good`, with some values at some depth replaced or left out."""
    if isinstance(good, dict) and good and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(good)))
        if draw(st.integers(0, 5)) == 0:
            return {name: value for name, value in good.items() if name != key}
        return good | {key: draw(altered(good[key]))}
    if isinstance(good, list) and good and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(good) - 1))
        return [*good[:at], draw(altered(good[at])), *good[at + 1 :]]
    return draw(JSON)


def encoded(value: Any) -> bytes:
    """Canonical where that can be."""
    try:
        return reference.canonical(value)
    except UnicodeEncodeError:
        return json.dumps(value).encode()


CONFIG = json.loads(w.config(v.REPOSITORY, v.TIME, id_key=v.ID_KEY, signing_seed=v.SEED))
KDF = {"name": "argon2id", "salt": v.SALT.hex(), "memory_kib": 64, "passes": 1, "lanes": 1}
INSIDE = {"id_key": v.ID_KEY.hex(), "signing_seed": v.SEED.hex(), "epochs": {"1": v.EPOCH.hex()}}
SLOT = json.loads(w.slot(v.REPOSITORY, v.SLOT, "passphrase", "full", KDF, v.NONCE, b"p", INSIDE))


@FAST
@given(st.one_of(some(reference.canonical(CONFIG)), JSON.map(encoded), st.binary(max_size=100_000)))
def test_json(data: bytes) -> None:
    with contained():
        assert reference.canonical(reference.parse_json(data)) == data


@pytest.mark.parametrize(
    "data",
    [b'{"a":1.0}', b'{"a":1e3}', b'{"a":NaN}', b'{"a":-0}', b'{"a":1,"a":1}', b'{"b":1,"a":1}', b'{"a": 1}',
     b"{}\n", b"\xef\xbb\xbf{}", b'{"a":"\\u00e9"}', b'{"a":"\\/"}', b'{"a":"\\ud800"}', b'{"a":"\xff"}',
     b"[]", b"", b"null", b'{"a":' + b"[" * 100_000, b'{"a":' + b"9" * 5000 + b"}", b'{"a":"\x7f\n"}'],
)  # fmt: skip
def test_json_that_is_not_canonical(data: bytes) -> None:
    with pytest.raises(reference.Damaged):
        reference.parse_json(data)


@FAST
@given(altered(CONFIG), st.booleans())
def test_config(obj: Any, repair: bool) -> None:
    data = encoded(obj)
    if repair and isinstance(obj, dict):
        try:
            data = w.seal_config({key: value for key, value in obj.items() if key != "seal"}, v.SEED)
        except UnicodeEncodeError:
            pass
    with contained():
        config = reference.parse_config(data)
        assert (len(config.repository), len(config.key)) == (16, 32)


@FAST
@given(altered(SLOT) | altered(KDF).map(lambda kdf: SLOT | {"kdf": kdf}), altered(INSIDE), st.booleans())
def test_slot(obj: Any, inside: Any, hostile_payload: bool) -> None:
    if hostile_payload:
        try:
            data = w.slot(v.REPOSITORY, v.SLOT, "passphrase", "full", KDF, v.NONCE, b"p", inside)
        except UnicodeEncodeError:
            return
    else:
        data = encoded(obj)
        kdf = obj.get("kdf") if isinstance(obj, dict) else None
        numbers = [n for n in (kdf.values() if isinstance(kdf, dict) else ()) if type(n) is int]
        if any(64 < n <= 1 << 20 for n in numbers):
            return  # within bounds, and slow: not what is tested
    with contained():
        reference.open_slot(data, v.SLOT, SEALED, b"p", b"k" * 32)


ROOT = {"pack": "01" * 32, "offset": 176, "length": 400, "id": "02" * 32, "level": 0}
PART = {
    "repository": v.REPOSITORY.hex(), "set": v.SESSION.hex(), "version": 1, "features": [], "created": 1,
    "lineage": "00" * 16, "sequence": 1, "previous": None, "envelope": v.envelope().hex(),
    "roots": [ROOT, None],
}  # fmt: skip
IMAGE = {"disk": "d", "size": 8192, "block_size": 4096, "unreadable": [[0, 512]], "source": {}}
BODY = {"name": "n", "host": "h", "images": [IMAGE, IMAGE | {"size": 0, "unreadable": []}]}


@FAST
@given(altered(PART), altered(BODY), st.sampled_from(["public", "body", "both", "bytes"]), st.data())
def test_manifest(part: Any, body: Any, which: str, data: st.DataObject) -> None:
    try:
        plain = zlib.compress(reference.canonical(BODY if which == "public" else body))
        public = PART if which in ("body", "bytes") else part
        raw = w.manifest(public, plain, v.SEED, v.SESSION_KEY, v.NONCE)
    except UnicodeEncodeError:
        return
    if which == "bytes":
        raw = w.seal_manifest(data.draw(some(raw[:-64])), v.SEED)
    with contained():
        manifest = reference.parse_manifest(raw, v.SESSION, SEALED)
        body = reference.open_body(manifest, SEALED, SECRETS)
        for image in reference.parse_images(manifest, body, SEALED):
            assert 0 <= image.unreadable and 0 <= image.size < 1 << 63


@FAST
@given(st.data())
def test_manifest_without_encryption(data: st.DataObject) -> None:
    good = w.manifest(PART | {"envelope": None}, zlib.compress(reference.canonical(BODY)), None)
    raw = w.seal_manifest(data.draw(some(good[:-64])), None)
    with contained():
        manifest = reference.parse_manifest(raw, v.SESSION, PLAIN)
        reference.parse_images(manifest, reference.open_body(manifest, PLAIN, SECRETS), PLAIN)


# Whole repositories ---------------------------------------------------------------------------------

Made = tuple[Path, str, w.Disk]


@pytest.fixture(scope="module", params=["none", "sealed"])
def made(request: pytest.FixtureRequest) -> Iterator[Made]:
    """A small repository, a set, and its disk."""
    with tempfile.TemporaryDirectory() as folder:
        slots = (("keyfile", b"k" * 32),) if request.param == "sealed" else ()
        writer = w.Writer(Path(folder), *slots)
        disk = w.Disk.of(bytes(range(256)) * 60 + bytes(8192) + b"end")
        yield Path(folder), writer.write_set("d", [disk]), disk


def repair(path: Path) -> Callable[[bytes], bytes]:
    """Makes the checksums of a file right again, as one can who knows no key."""

    def pack(data: bytes) -> bytes:
        if len(data) > 80:
            length = int.from_bytes(data[12:16], "little")
            if 72 <= length <= len(data):
                check = struct.pack("<Q", reference.xxh3(data[: length - 8]))
                data = data[: length - 8] + check + data[length:]
            at = data.find(b"IREC")
            if at >= 0 and len(data) >= at + 64:
                check = struct.pack("<I", reference.xxh3(data[at : at + 60]) & 0xFFFFFFFF)
                data = data[: at + 60] + check + data[at + 64 :]
        return data

    def manifest(data: bytes) -> bytes:
        return w.seal_manifest(data[:-64], None)

    if path.parts[-2] == "sets":
        return manifest
    return pack if path.parts[-3] in ("packs", "maps") else bytes


@settings(FAST, max_examples=300)
@given(data=st.data(), repaired=st.booleans())
def test_repository(made: Made, data: st.DataObject, repaired: bool) -> None:
    """One file changed: the exact image, or an error."""
    root, set_id, disk = made
    path = data.draw(st.sampled_from(sorted(path for path in root.rglob("*") if path.is_file())))
    good = path.read_bytes()
    bad = data.draw(mutated(good))
    path.write_bytes(repair(path)(bad) if repaired else bad)
    try:
        with contained():
            repository = Repository(str(root), None, b"k" * 32)
            (image,) = repository.images(repository.resolve(set_id))
            got = dict(repository.blocks(image))
            if repository.config.sealed or path.parts[-2] != "sets":
                assert image.size == disk.size
                assert got == {number * 4096: part for number, part in disk.blocks.items()}
    finally:
        path.write_bytes(good)


# Images ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("0abcur"), max_size=700),
    st.integers(0, 4095),
    st.sampled_from([4096, 8192, 65536]),
    st.sampled_from([w.STORED, w.LZ4, w.ZSTD]),
    st.sampled_from([w.AES, w.CHACHA, None]),
    st.integers(1, 100_000),
)
def test_any_image_reads_back(
    kinds: list[str], tail: int, block_size: int, codec: int, cipher: int | None, pack_bytes: int
) -> None:
    """Any pattern of blocks, two sets that share, any packs: what was written comes back."""
    size = max(0, len(kinds) * block_size - tail)
    used = kinds[: -(-size // block_size)]
    cut = [min(block_size, size - n * block_size) for n in range(len(used))]
    blocks = {n: kind.encode() * cut[n] for n, kind in enumerate(used) if kind in "abc"}
    by_kind = [frozenset(n for n, kind in enumerate(used) if kind == one) for one in "ur"]
    disk = w.Disk("d", size, block_size, blocks, *by_kind)
    other = w.Disk("e", size, block_size, {n: part for n, part in blocks.items() if n % 3})
    with tempfile.TemporaryDirectory() as folder:
        writer = w.Writer(Path(folder), *((("keyfile", b"k" * 32),) if cipher else ()))
        writer.write_set("d", [other], codec=codec, pack_bytes=pack_bytes)
        more: dict[str, Any] = {"codec": codec, "cipher": cipher or w.AES, "pack_bytes": pack_bytes}
        set_id = writer.write_set("d", [disk, other], **more)
        repository = Repository(folder, None, b"k" * 32)
        for image, written in zip(repository.images(repository.resolve(set_id)), (disk, other), strict=True):
            out = Path(folder) / f"out {written.name}"
            reference.write_image(repository, image, str(out))
            assert out.read_bytes() == written.content()
