from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager.device import lvm, lvm_text

KINDS = (Path(__file__).parents[3] / "fixtures" / "tool-output" / "lvm-kinds.vg").read_text()


def test_the_grammar() -> None:
    tree = lvm_text.parse('# a\na = 1\nb { c = "x \\"y\\" \\\\ z" d = [1, "two", 3.5,] e = -7 # f\n }')
    assert tree == {"a": 1, "b": {"c": 'x "y" \\ z', "d": [1, "two", 3.5], "e": -7}}
    assert lvm_text.parse("") == {} and lvm_text.parse("a = []") == {"a": []}


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a = ",
        "a {",
        "}",
        "a = [1",
        "a = [1 2]",
        "a = {",
        'a = "x',
        "a = b",
        "= 1",
        "a = 1 a = 2",
        "a ? 1",
    ],
)
def test_what_does_not_fit(text: str) -> None:
    with pytest.raises(ValueError, match="metadata|character|list"):
        lvm_text.parse(text)


def test_bounds() -> None:
    with pytest.raises(ValueError, match="deeper"):
        lvm_text.parse("a {" * 5000)
    with pytest.raises(ValueError, match="longer"):
        lvm_text.parse(" " * (lvm_text.MAX_TEXT + 1))
    assert len(lvm_text.parse("a = [" + "1," * 100_000 + "1]")["a"]) == 100_001
    lvm_text.parse("#" * 1_000_000)
    with pytest.raises(ValueError, match="makes no sense"):
        lvm_text.parse('a = "' + "\\x" * 500_000)


def test_a_group() -> None:
    group = lvm.parse_group(KINDS)
    assert (group.name, group.sequence, group.extent) == ("kinds", 7, 1 << 20)
    kinds = {volume.name: (volume.kind, volume.size >> 20) for volume in group.volumes if volume.visible}
    assert kinds == {
        "root": ("linear", 12), "fast": ("striped", 6), "safe": ("raid1", 4), "old": ("mirror", 2),
        "pool": ("thin-pool", 10), "home": ("thin", 50),
    }  # fmt: skip
    home = next(volume for volume in group.volumes if volume.name == "home")
    assert home.segments[0].refers == (("thin_pool", "pool"),) and not home.segments[0].pieces


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("extent_size = 2048", "extent_size = 0"),
        ("extent_size = 2048", 'extent_size = "x"'),
        ("extent_count = 8", "extent_count = 99999999999999999999"),
        ("extent_count = 8", "extent_count = 9000000000000000"),
        ("segment_count = 2", "segment_count = 3"),
        ("stripe_count = 2", "stripe_count = 0"),
        ("stripe_count = 2", "stripe_count = 5"),
        ('["pv0", 0]', '["pv7", 0]'),
        ('["pv0", 0]', '["pv0", -1]'),
        ('["pv0", 0]', "[1, 2]"),
        ('["pv0", 0]', '"pv0"'),
        ("physical_volumes {", "physical_volumes = 1 x {"),
    ],
)
def test_numbers_that_cannot_be(old: str, new: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        lvm.parse_group(KINDS.replace(old, new, 1))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, len(KINDS) - 1), st.integers(0, 8), st.text(max_size=6)), max_size=6)
)
def test_changed_texts(changes: list[tuple[int, int, str]]) -> None:
    text = KINDS
    for at, gone, new in changes:
        text = text[:at] + new + text[at + gone :]
    try:
        lvm.parse_group(text)
    except ValueError:
        pass


@settings(max_examples=200)
@given(st.text(alphabet='{}[]=",# \n\\ab01.-', max_size=200))
def test_any_text(text: str) -> None:
    try:
        lvm_text.parse(text)
    except ValueError:
        pass


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=8))
def test_changed_labels(changes: list[tuple[int, int]]) -> None:
    import struct

    raw = bytearray(64 << 10)
    struct.pack_into("<8sQII8s", raw, 512, b"LABELONE", 1, 0, 32, b"LVM2 001")
    raw[544:576] = b"0" * 32
    struct.pack_into("<QQQQQQQQQII", raw, 576, 1 << 20, 8192, 0, 0, 0, 4096, 4096, 0, 0, 0, 0)
    for at, value in changes:
        raw[512 + at] = value
    struct.pack_into("<I", raw, 528, lvm.checksum(bytes(raw[532:1024])))
    lvm.read_physical(lambda at, n: bytes(raw[at : at + n]), len(raw))
