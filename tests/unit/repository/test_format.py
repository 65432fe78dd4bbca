"""The small objects: canonical, bounded, and refused where anything is odd."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imager.errors import IntegrityError, NoRepository
from imager.repository import format as form

texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(texts, values, max_size=5))
def test_canonical_json_is_what_any_other_writer_makes_of_the_page(value: dict[str, object]) -> None:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert form.canonical(value) == text.encode()
    assert form.parse(text.encode(), "it") == value


def test_bytes_are_hexadecimal_and_odd_paths_are_shown_escaped() -> None:
    assert form.canonical({"key": b"\x01\xff", "list": (1, None)}) == b'{"key":"01ff","list":[1,null]}'
    assert form.canonical([os.fsdecode(b"/dev/\xff")]) == b'["/dev/\\\\udcff"]'
    for wrong in (1.5, {1: 2}, {"a": {1, 2}}):
        with pytest.raises(TypeError):
            form.canonical(wrong)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"[]",
        b'{"a": 1}',
        b'{"b":1,"a":2}',
        b'{"a":1,"a":2}',
        b'{"a":1.0}',
        b'{"a":1}\n',
        b"{" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":"\\u0041"}',
        b'{"a":"\xff"}',
        b'{"a":' + b"1" * 300 + b"}x",
        b'{"a":"' + b"x" * (1 << 20) + b'"}',
    ],
)
def test_what_is_not_canonical_is_damage(raw: bytes) -> None:
    with pytest.raises(IntegrityError):
        form.parse(raw, "it")


@given(st.binary(max_size=300))
def test_garbage_is_an_error_and_nothing_else(raw: bytes) -> None:
    for parser in (form.parse_config, lambda raw: form.parse(raw, "it")):
        try:
            parser(raw)
        except (IntegrityError, NoRepository):
            pass


GOOD: dict[str, object] = {
    "format": "imager",
    "version": 1,
    "repository": "00" * 16,
    "created": 1,
    "encryption": "none",
    "block_size": 0,
    "features": {"read": [], "write": []},
    "id_key": "11" * 32,
    "seal": "22" * 32,
}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format": "other"}, NoRepository),
        ({"version": 2}, NoRepository),
        ({"encryption": "rot13"}, NoRepository),
        ({"repository": "00"}, IntegrityError),
        ({"repository": "0G" * 16}, IntegrityError),
        ({"repository": "AA" * 16}, IntegrityError),
        ({"block_size": 5000}, IntegrityError),
        ({"block_size": 8 << 20}, IntegrityError),
        ({"id_key": "11"}, IntegrityError),
        ({"created": "now"}, IntegrityError),
        ({"features": []}, IntegrityError),
        ({"seal": ""}, IntegrityError),
    ],
)
def test_a_config_is_refused_for_any_odd_value(change: dict[str, object], error: type[Exception]) -> None:
    form.parse_config(form.canonical(GOOD))
    with pytest.raises(error):
        form.parse_config(form.canonical({**GOOD, **change}))


def test_unknown_features_are_refused_by_those_whom_they_concern() -> None:
    def config(**features: list[str]) -> form.Config:
        value = {**GOOD, "features": {"read": [], "write": [], **features}}
        return form.parse_config(form.canonical(value))[0]

    form.check_features(config(), writing=True)
    form.check_features(config(write=["ink"]), writing=False)
    for features, writing in (({"read": ["braille"]}, False), ({"write": ["ink"]}, True)):
        with pytest.raises(NoRepository, match="braille|ink"):
            form.check_features(config(**features), writing=writing)


def test_names_of_objects() -> None:
    name = bytes(range(32))
    assert form.pack_object(form.KIND_DATA, name) == f"packs/00/{name.hex()}"
    assert form.pack_object(form.KIND_MAP, name) == f"maps/00/{name.hex()}"
    assert form.is_id("ab" * 16) and not form.is_id("AB" * 16) and not form.is_id("ab" * 15)
    assert not form.is_id("zz" * 16) and not form.is_id("a " * 16)
    assert form.is_pack_name("ab" * 32) and not form.is_pack_name("ab" * 31)
    assert form.numbered(["epochs/0000000a", "epochs/.tmp", "condemned/00000001"]) == [10, 1]


def test_a_lineage_id_is_that_of_the_page() -> None:
    import blake3

    key = blake3.blake3(b"k" * 32, derive_key_context="imager 2026-11 lineage v1").digest()
    expected = blake3.blake3('["höst","d"]'.encode(), key=key).digest()[:16]
    assert form.lineage_id(b"k" * 32, "höst", "d") == expected
