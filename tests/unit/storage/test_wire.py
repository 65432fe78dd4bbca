"""Frames and messages: what was written comes back, and what was not written is an error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imager.storage import wire

sizes = st.integers(0, wire.MAX_OBJECT)
offsets = st.integers(0, (1 << 63) - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=200)
uploads = st.integers(0, (1 << 32) - 1)
requests = st.one_of(
    st.builds(wire.Open, texts),
    st.builds(wire.Read, texts, offsets, st.none() | offsets),
    st.builds(wire.Size, texts),
    st.builds(wire.Exists, texts),
    st.builds(wire.List, texts, st.booleans()),
    st.builds(wire.Create, texts),
    st.builds(wire.Write, uploads, sizes),
    st.builds(wire.Discard, uploads),
    st.builds(wire.Publish, uploads, texts, sizes),
    st.builds(wire.Move, texts, texts),
    st.builds(wire.Delete, texts),
    st.sampled_from([wire.Space(), wire.Strangers(), wire.Sweep(), wire.Begin(), wire.End()]),
)
failures = st.builds(wire.Failure, texts, texts, st.none() | texts)
answers = st.builds(wire.Answer, st.booleans(), st.none() | st.integers(-5, 1 << 62), st.none() | failures)
numbers = st.integers(0, (1 << 32) - 1)


@contextmanager
def arriving(data: bytes) -> Iterator[wire.FrameReader]:
    """A reader of `data`, and then the end."""
    fd = os.memfd_create("frames")
    try:
        os.write(fd, data)
        os.lseek(fd, 0, os.SEEK_SET)
        yield wire.FrameReader(fd)
    finally:
        os.close(fd)


def written(*frames: tuple[int, wire.Request | wire.Answer, bytes]) -> bytes:
    fd = os.memfd_create("frames")
    try:
        writer = wire.FrameWriter(fd)
        for frame in frames:
            writer.frame(*frame)
        return os.pread(fd, 1 << 30, 0)
    finally:
        os.close(fd)


@given(st.lists(st.tuples(numbers, requests, st.binary(max_size=3000)), max_size=5))
def test_requests_come_back(frames: list[tuple[int, wire.Request, bytes]]) -> None:
    with arriving(written(*frames)) as reader:
        for number, request, body in frames:
            frame = reader.frame()
            assert frame is not None
            assert (frame.number, wire.parse_request(frame.head), frame.body) == (number, request, body)
        assert reader.frame() is None


@given(numbers, answers, st.binary(max_size=3000))
def test_answers_come_back(number: int, answer: wire.Answer, body: bytes) -> None:
    with arriving(written((number, answer, body))) as reader:
        frame = reader.frame()
        assert frame is not None
        assert (frame.number, wire.parse_answer(frame.head), frame.body) == (number, answer, body)


@given(requests, st.binary(min_size=1, max_size=50), st.data())
def test_a_frame_cut_short_is_the_end(request: wire.Request, body: bytes, data: st.DataObject) -> None:
    whole = written((1, request, body))
    with arriving(whole[: data.draw(st.integers(0, len(whole) - 1))]) as reader:
        assert reader.frame() is None


@given(st.binary(max_size=300))
@settings(max_examples=300)
def test_garbage_is_an_error(data: bytes) -> None:
    for parse in (wire.parse_request, wire.parse_answer, wire.parse_served, wire.agree, wire.split_lines):
        try:
            parse(data)
        except wire.ProtocolError:
            pass
    with arriving(data) as reader:
        try:
            while reader.frame() is not None:
                pass
        except wire.ProtocolError:
            pass


@given(requests, st.data())
@settings(max_examples=300)
def test_a_damaged_request_is_another_one_or_an_error(request: wire.Request, data: st.DataObject) -> None:
    head = bytearray(wire.encode(request))
    head[data.draw(st.integers(0, len(head) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        wire.parse_request(bytes(head))
    except wire.ProtocolError:
        pass


@pytest.mark.parametrize(
    "value",
    [
        {"verb": "chmod", "name": "config"},
        {"verb": "read"},
        {"verb": "read", "name": ""},
        {"verb": "read", "name": "x" * 5000},
        {"verb": "read", "name": b"config"},
        {"verb": "read", "name": "config", "offset": -1},
        {"verb": "read", "name": "config", "length": -1},
        {"verb": "read", "name": "config", "offset": 1 << 63},
        {"verb": "write", "upload": 1 << 32, "offset": 0},
        {"verb": "publish", "upload": 1, "name": "packs/a", "size": 1 << 32},
        {"verb": "delete", "name": "config", "force": True},
        {"name": "config"},
        ["read", "config"],
        17,
    ],
    ids=str,
)
def test_what_the_protocol_does_not_have(value: object) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.parse_request(msgspec.msgpack.encode(value))


def test_deep_nesting_is_an_error() -> None:
    with pytest.raises(wire.ProtocolError):
        wire.parse_request(b"\x91" * (wire.MAX_HEAD - 1) + b"\xc0")


@pytest.mark.parametrize(
    ("head", "body"), [(0, 0), (wire.MAX_HEAD + 1, 0), (1, wire.PIECE + 1), ((1 << 32) - 1, (1 << 32) - 1)]
)
def test_lengths_are_bounded(head: int, body: int) -> None:
    prefix = b"".join(value.to_bytes(4, "little") for value in (1, head, body))
    with arriving(prefix + bytes(100)) as reader, pytest.raises(wire.ProtocolError, match="too long"):
        reader.frame()


def test_what_is_too_long_is_not_sent() -> None:
    with pytest.raises(wire.ProtocolError, match="too long"):
        written((1, wire.Create("packs/a"), bytes(wire.PIECE + 1)))


@pytest.mark.parametrize(
    ("theirs", "version"),
    [((1, 1), 1), ((1, 9), 2), ((2, 3), 2), ((3, 9), None), ((0, 0), None), ((5, 1), None)],
)
def test_versions(theirs: tuple[int, int], version: int | None) -> None:
    if version is not None:
        assert wire.agree(wire.preamble(theirs), (1, 2)) == version
    else:
        with pytest.raises(wire.ProtocolError, match="versions") as caught:
            wire.agree(wire.preamble(theirs), (1, 2))
        assert caught.value.hint


def test_who_speaks_something_else() -> None:
    for raw in (b"", b"IMGRWIRE", b"SSH-2.0-OpenSSH_9", b"\0" * 16):
        with pytest.raises(wire.ProtocolError, match="does not speak"):
            wire.agree(raw)


NO_NAMES = ["../x", "a/../b", "/etc/passwd", "a//b", "a/", ".", "a/.hidden", "", "a\nb", "a b", "ä", "a..b"]
NO_PATHS = ["", "relative", "~", "~root/x", "/a\nb", "/a\x1bb", "/" + "x" * 5000, "/\ud800"]


@pytest.mark.parametrize("name", [*NO_NAMES, "x" * 600], ids=ascii)
def test_names_that_are_none(name: str) -> None:
    assert not wire.is_name(name)
    with pytest.raises(wire.ProtocolError):
        wire.check_name(name)


@pytest.mark.parametrize("path", NO_PATHS, ids=ascii)
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(wire.ProtocolError):
        wire.check_path(path)


@given(st.text(max_size=50))
def test_what_the_other_end_says_cannot_steer_a_terminal(text: str) -> None:
    assert wire.printable(text + "\x1b[2J\r\n\x9b").isprintable()


@given(st.lists(st.from_regex(r"[a-z0-9/.-]{1,20}", fullmatch=True)))
def test_lists_come_back(items: list[str]) -> None:
    assert wire.split_lines(wire.lines(items)) == items
