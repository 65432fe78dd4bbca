from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager import command
from imager.device.luks import KeySlot, Luks, read_luks
from tests import structures

SIZE = 32 << 20


def header(image: bytes) -> Luks | None:
    return read_luks(lambda at, n: bytes(image[at : at + n]), len(image))


def formatted(tmp_path: Path, *options: str) -> Path:
    if command.find("cryptsetup") is None:
        pytest.skip("cryptsetup is not installed")
    path = tmp_path / "volume"
    with path.open("wb") as file:
        file.truncate(SIZE)
    secret = tmp_path / "secret"
    secret.write_text("correct horse")
    argv = ["cryptsetup", "luksFormat", "-q", "--pbkdf-force-iterations", "1000", *options]
    command.run([*argv, str(path), str(secret)])
    return path


def test_luks1(tmp_path: Path) -> None:
    path = formatted(tmp_path, "--type", "luks1", "--hash", "sha512")
    found = header(path.read_bytes())
    assert found is not None
    uuid = command.text(["cryptsetup", "luksUUID", str(path)]).strip()
    assert (found.version, found.uuid, found.cipher) == (1, uuid, "aes-xts-plain64")
    assert (found.hash, found.key_bits, found.slots) == ("sha512", 512, (KeySlot(0, "pbkdf2", 1000),))
    dump = command.text(["cryptsetup", "luksDump", str(path)])
    assert f"Payload offset:\t{found.payload // 512}\n" in dump


def test_luks2(tmp_path: Path) -> None:
    path = formatted(
        tmp_path, "--type", "luks2", "--pbkdf", "pbkdf2", "--label", "my disk", "--sector-size", "4096"
    )
    found = header(path.read_bytes())
    assert found is not None
    uuid = command.text(["cryptsetup", "luksUUID", str(path)]).strip()
    assert (found.version, found.uuid, found.label, found.sector) == (2, uuid, "my disk", 4096)
    assert (found.payload, found.payload_size, found.cipher) == (16 << 20, None, "aes-xts-plain64")
    assert found.slots == (KeySlot(0, "pbkdf2", 1000),) and found.key_bits == 512
    assert not found.problems and not found.from_second


def test_the_second_header(tmp_path: Path) -> None:
    path = formatted(tmp_path, "--type", "luks2", "--pbkdf", "pbkdf2")
    image = bytearray(path.read_bytes())
    first = header(image)
    image[4100] ^= 1
    second = header(image)
    assert first is not None and second is not None and second.from_second
    assert (second.uuid, second.slots, second.payload) == (first.uuid, first.slots, first.payload)
    image[0x4000 + 4100] ^= 1
    assert header(image) is None


TREE: dict[str, Any] = {
    "keyslots": {
        "1": {
            "type": "luks2",
            "key_size": 64,
            "kdf": {"type": "argon2id", "time": 4, "memory": 1048576, "cpus": 4},
        }
    },
    "tokens": {"0": {"type": "systemd-tpm2", "keyslots": ["1"]}},
    "segments": {
        "0": {
            "type": "crypt",
            "offset": "16777216",
            "size": "dynamic",
            "encryption": "aes-xts-plain64",
            "sector_size": 512,
        }
    },
    "digests": {"0": {"type": "pbkdf2", "hash": "sha256"}},
    "config": {"json_size": "12288", "keyslots_size": "16744448"},
}


def test_slots_and_tokens() -> None:
    found = header(structures.luks2(TREE).ljust(1 << 20, b"\0"))
    assert found is not None
    assert found.slots == (KeySlot(1, "argon2id", 4, 1048576, 4),)
    assert found.tokens == ("systemd-tpm2",) and found.label == "label"


def test_a_reencryption_is_told() -> None:
    tree = {**TREE, "config": {**TREE["config"], "requirements": {"mandatory": ["online-reencrypt-v2"]}}}
    found = header(structures.luks2(tree).ljust(1 << 20, b"\0"))
    assert found is not None and "requirements" in found.problems[0]


WORDS = [*TREE, "0", "1", "type", "offset", "size", "kdf", "key_size", "hash", "encryption"]
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
LEAVES = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=6),
    max_leaves=20,
)


@settings(max_examples=300)
@given(JSON)
def test_any_json(tree: Any) -> None:
    import json

    found = header(structures.luks2(None, text=json.dumps(tree).encode()).ljust(1 << 20, b"\0"))
    assert found is None or (found.payload >= 0 and len(found.slots) <= 32)


@pytest.mark.parametrize(
    "text", [b"[" * 8000, b'{"a":' * 2000, b"\xff" * 100, b"", b'{"keyslots":7}', b"9" * 8000]
)
def test_json_that_is_none(text: bytes) -> None:
    header(structures.luks2(None, text=text).ljust(1 << 20, b"\0"))


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 599), st.integers(0, 255)), min_size=1, max_size=10), st.booleans())
def test_changed_headers(changes: list[tuple[int, int]], first: bool) -> None:
    image = bytearray(structures.luks2(TREE).ljust(64 << 10, b"\0"))
    if first:
        image[6:8] = b"\0\1"
    for at, value in changes:
        image[at] = value
    header(image)
