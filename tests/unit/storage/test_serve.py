"""A server and a client that speaks the protocol by hand, and not always as it should."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager.storage import wire
from imager.storage.folder import FolderStorage
from imager.storage.rights import APPEND_ONLY, FULL, READ_ONLY
from imager.storage.serve import Server

CONFIG = b'{"format":"imager","version":1}'
SESSION = "sessions/" + "ab" * 16
SET = "sets/" + "ab" * 16
PACK = "packs/3f/3f" + "00" * 31


class Peer:
    """A client by hand: it sends what a test says, and tells what came back."""

    def __init__(self, root: Path | str | None, **options: object) -> None:
        options.setdefault("mode", FULL)
        self.ours, self.theirs = socket.socketpair()
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._serve, args=[options], daemon=True)
        self.thread.start()
        self.reader = wire.FrameReader(self.ours.fileno())
        self.writer = wire.FrameWriter(self.ours.fileno())
        self.number = 0
        if root is not None:
            self.writer.raw(wire.preamble())
            assert self.reader.preamble() == wire.preamble()
            self.opened = self.ask(wire.Open(str(root)))

    def _serve(self, options: dict) -> None:
        try:
            Server(self.theirs.fileno(), self.theirs.fileno(), **options).run()
        except wire.ProtocolError as error:
            self.error = error
        finally:
            self.theirs.close()

    def tell(self, request: wire.Request, body: bytes = b"") -> None:
        self.number += 1
        self.writer.frame(self.number, request, body)

    def ask(self, request: wire.Request, body: bytes = b"") -> wire.Answer:
        return self.fetch(request, body)[0]

    def fetch(self, request: wire.Request, body: bytes = b"") -> tuple[wire.Answer, bytes]:
        self.tell(request, body)
        return self.answer()

    def answer(self) -> tuple[wire.Answer, bytes]:
        got = b""
        while True:
            frame = self.reader.frame()
            assert frame is not None, "the server has hung up"
            answer = wire.parse_answer(frame.head)
            got += frame.body
            if not answer.more:
                return answer, got

    def kind(self, request: wire.Request, body: bytes = b"") -> str | None:
        """The word of the error; None where it went well."""
        error = self.ask(request, body).error
        return error.kind if error else None

    def hang_up(self) -> None:
        self.ours.shutdown(socket.SHUT_WR)
        self.thread.join(20)
        assert not self.thread.is_alive()

    def gone(self) -> bool:
        """Whether the server ends by itself."""
        self.thread.join(20)
        return not self.thread.is_alive()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "served" / "repo"
    storage = FolderStorage(str(place))
    with storage.initializing():
        storage.create("config", CONFIG)
        storage.create("slots/one", b"a slot")
        storage.create(PACK, b"a pack")
    (tmp_path / "served" / "other").mkdir()
    (tmp_path / "secret").write_text("not yours")
    return place


@pytest.fixture
def peer(root: Path) -> Iterator[Callable[..., Peer]]:
    peers: list[Peer] = []

    def make(where: Path | str | None = root, **options: object) -> Peer:
        peers.append(Peer(where, **options))
        return peers[-1]

    yield make
    for one in peers:
        one.ours.close()
        one.thread.join(20)


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- what everybody needs ------------------------------------------------------------------


def test_objects_come_and_go(peer, root: Path) -> None:
    one = peer()
    assert one.ask(wire.Create("sets/a"), b"hello") == wire.Answer()
    assert one.kind(wire.Create("sets/a"), b"other") == "already-exists"
    assert one.fetch(wire.Read("sets/a")) == (wire.Answer(), b"hello")
    assert one.fetch(wire.Read("sets/a", 1, 3)) == (wire.Answer(), b"ell")
    assert one.fetch(wire.Read("sets/a", 9, 3)) == (wire.Answer(), b"")
    assert one.fetch(wire.Read("sets/a", (1 << 63) - 1, (1 << 63) - 1)) == (wire.Answer(), b"")
    assert one.ask(wire.Size("sets/a")).value == 5
    assert [one.ask(wire.Exists(f"sets/{name}")).value for name in "ab"] == [1, 0]
    assert one.fetch(wire.List("sets/"))[1] == b"sets/a\n"
    assert one.fetch(wire.List("sets", sizes=True))[1] == b"5 sets/a\n"
    assert one.kind(wire.Move("sets/a", "damaged/sets/a")) is None
    assert one.kind(wire.Read("sets/a")) == "not-found"
    assert one.kind(wire.Delete("damaged/sets/a")) is None
    assert one.kind(wire.Delete("damaged/sets/a")) == "not-found"
    assert (one.ask(wire.Space()).value or 0) > 0
    assert one.fetch(wire.Strangers())[1] == b""
    one.hang_up()
    assert one.error is None


def test_large_objects_travel_in_pieces(peer, root: Path) -> None:
    data = os.urandom(3 * wire.PIECE + 17)
    one = peer()
    for offset in range(0, len(data), wire.PIECE):
        one.tell(wire.Write(7, offset), data[offset : offset + wire.PIECE])
    assert one.kind(wire.Publish(7, "packs/aa/aa", len(data))) is None
    assert (root / "packs/aa/aa").read_bytes() == data
    assert one.fetch(wire.Read("packs/aa/aa")) == (wire.Answer(), data)
    assert one.fetch(wire.Read("packs/aa/aa", 5, 2 * wire.PIECE))[1] == data[5 : 5 + 2 * wire.PIECE]


def test_a_long_list_travels_in_pieces(peer, root: Path) -> None:
    names = [f"index/{'x' * 200}{number:04}" for number in range(2500)]
    for name in names:
        (root / name).touch()
    (root / "index/not a name").touch()
    (root / "index" / os.fsdecode(b"\xff")).touch()
    one = peer()
    assert sorted(wire.split_lines(one.fetch(wire.List("index"))[1])) == names
    assert len(wire.split_lines(one.fetch(wire.List("index", sizes=True))[1])) == 2500


def test_many_requests_are_under_way_at_once(peer) -> None:
    one = peer()
    for _ in range(200):
        one.tell(wire.Read(PACK))
    seen = set()
    for _ in range(200):
        frame = one.reader.frame()
        assert frame and frame.body == b"a pack"
        seen.add(frame.number)
    assert len(seen) == 200


def test_a_client_that_dies_leaves_nothing(peer, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(root)
    for nameless in (True, False):
        one = peer()
        if not nameless:
            monkeypatch.setattr(FolderStorage, "stage", FolderStorage._stage_named)
        one.tell(wire.Write(1, 0), bytes(1000))
        one.tell(wire.Write(1, 1000), bytes(1000))
        one.kind(wire.Size("config"))
        if not nameless:
            assert len(os.listdir(root / "tmp")) == 1
        one.ours.sendall(b"\x01\0\0\0\x05\0\0\0\xff\0\0\0half a frame")
        one.hang_up()
        assert tree(root) == before and os.listdir(root / "tmp") == []


def test_making_a_repository(peer, tmp_path: Path) -> None:
    place = tmp_path / "new"
    one = peer(place, mode=APPEND_ONLY)
    assert one.kind(wire.Create("config"), b"{}") == "refused"
    assert one.kind(wire.Begin()) is None
    other = peer(place)
    assert other.kind(wire.Begin()) == "locked"
    assert one.kind(wire.Create("slots/left-over"), b"") is None
    assert one.kind(wire.Delete("slots/left-over")) is None
    assert one.kind(wire.Create("config"), CONFIG) is None
    assert one.kind(wire.End()) is None
    assert one.kind(wire.Create("slots/mine"), b"") == "refused"
    assert one.kind(wire.Begin()) == "refused"
    assert other.kind(wire.Begin()) is None
    other.hang_up()
    assert peer(place).kind(wire.Begin()) is None, "the lock ends with its connection"


def test_by_the_page(root: Path) -> None:
    """A client that knows docs/design/wire-protocol.md and none of our code. Its bytes are version 1."""

    def frame(number: int, head: dict[str, object], body: bytes = b"") -> bytes:
        packed = msgspec.msgpack.encode(head)
        return struct.pack("<III", number, len(packed), len(body)) + packed + body

    said = b"IMGRWIRE" + struct.pack("<HHI", 1, 1, 0)
    said += frame(1, {"verb": "open", "path": str(root)})
    said += frame(2, {"verb": "create", "name": "sets/a"}, b"hello")
    said += frame(3, {"verb": "write", "upload": 9, "offset": 0}, b"by ")
    said += frame(4, {"verb": "write", "upload": 9, "offset": 3}, b"pieces")
    said += frame(5, {"verb": "publish", "upload": 9, "name": "packs/aa/aa", "size": 9})
    said += frame(6, {"verb": "read", "name": "config"})
    said += frame(7, {"verb": "read", "name": "slots/one", "offset": 2, "length": 3})
    said += frame(8, {"verb": "exists", "name": "sets/none"})
    said += frame(9, {"verb": "delete", "name": "sets/none"})
    said += frame(10, {"verb": "list", "prefix": "slots/", "sizes": True})
    done, _ = serve().communicate(said)
    assert done[:16] == b"IMGRWIRE" + struct.pack("<HHI", 1, 1, 0)
    answers: dict[int, tuple[dict[str, object], bytes]] = {}
    at = 16
    while at < len(done):
        number, head, body = struct.unpack_from("<III", done, at)
        at += 12
        value = msgspec.msgpack.decode(done[at : at + head])
        answers[number] = value, done[at + head : at + head + body]
        at += head + body
    assert set(answers) == {1, 2, 5, 6, 7, 8, 9, 10}
    assert msgspec.msgpack.decode(answers[1][1])["mode"] == "full"
    assert answers[2] == ({}, b"") and answers[5] == ({}, b"")
    assert answers[6] == ({}, CONFIG) and answers[7] == ({}, b"slo")
    assert answers[8] == ({"value": 0}, b"")
    error = answers[9][0]["error"]
    assert (
        isinstance(error, dict) and error["kind"] == "not-found" and set(error) == {"kind", "message", "hint"}
    )
    assert answers[10] == ({}, b"6 slots/one\n")
    assert (root / "packs/aa/aa").read_bytes() == b"by pieces"


# --- what nobody may ---------------------------------------------------------------------------

ESCAPES = [
    "../secret",
    "packs/../../../secret",
    "/etc/passwd",
    "packs/3f/../../config",
    "..",
    "packs//x",
    "a\0b",
]


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
def test_names_do_not_lead_out(peer, root: Path, tmp_path: Path, name: str) -> None:
    before = tree(tmp_path)
    one = peer()
    for request in (
        wire.Read(name),
        wire.Size(name),
        wire.Exists(name),
        wire.List(name),
        wire.Create(name),
        wire.Delete(name),
        wire.Move(name, "packs/aa/aa"),
        wire.Move(PACK, name),
    ):
        assert one.kind(request) == "protocol", request
    one.tell(wire.Write(1, 0), b"x")
    assert one.kind(wire.Publish(1, name, 1)) == "protocol"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("mode", [FULL, APPEND_ONLY, READ_ONLY])
@pytest.mark.parametrize(
    "path",
    ["{tmp}", "{tmp}/served/repo/..", "{tmp}/served/../secret", "/etc", "/", "~/x", "{tmp}/served/link",
     "{tmp}/served/repo-other", "{tmp}/served/repo/../other"],
)  # fmt: skip
def test_a_restriction_holds(peer, root: Path, tmp_path: Path, path: str, mode: str) -> None:
    (tmp_path / "served/link").symlink_to("/etc")
    one = peer(path.format(tmp=tmp_path), mode=mode, restrict=[str(root)])
    assert one.opened.error and one.opened.error.kind == "refused" and one.opened.error.hint
    assert one.kind(wire.Read("config")) == "protocol"  # nothing is open


def test_a_restriction_lets_in_what_it_names(peer, root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    for path, restrict in (
        (root, [root]),
        (root, ["/srv", tmp_path]),
        (tmp_path / "alias", [root]),
        (root, [tmp_path / "alias"]),
        (f"{root}/../repo/", [root]),
        (root / "below", [root]),
        (root, ["/"]),
    ):
        one = peer(path, restrict=[str(folder) for folder in restrict])
        assert one.opened.error is None, (path, restrict)


def test_links_within_a_restricted_repository_lead_nowhere(peer, root: Path, tmp_path: Path) -> None:
    (root / "sets/out").symlink_to(tmp_path / "secret")
    (root / "maps/aa").symlink_to(tmp_path)
    one = peer(restrict=[str(root)])
    for request in (
        wire.Read("sets/out"),
        wire.Read("maps/aa/secret"),
        wire.List("maps/aa"),
        wire.Create("maps/aa/new"),
        wire.Delete("maps/aa/secret"),
        wire.Move("maps/aa/secret", "sets/mine"),
        wire.Move("config", "maps/aa/config"),
    ):
        assert one.kind(request) == "refused", request
    assert (tmp_path / "secret").read_text() == "not yours" and not (tmp_path / "new").exists()
    assert peer().fetch(wire.Read("sets/out"))[1] == b"not yours", (
        "without --restrict it's the machine's business"
    )


@pytest.mark.parametrize("restrict", [False, True])
def test_append_only(peer, root: Path, restrict: bool) -> None:
    before = tree(root)
    one = peer(mode=APPEND_ONLY, restrict=[str(root)] if restrict else [])
    refused = [
        wire.Delete(PACK),
        wire.Delete("config"),
        wire.Delete("slots/one"),
        wire.Delete("sessions/" + "00" * 16),
        wire.Move(PACK, "damaged/" + PACK),
        wire.Move("config", "packs/aa/config"),
        wire.Move("probe/a", "packs/aa/aa"),
        wire.Move(PACK, "probe/a"),
        wire.Create("config2"),
        wire.Create("slots/two"),
        wire.Create("epochs/00000002"),
        wire.Create("condemned/00000001"),
        wire.Create("damaged/missing/" + "ab" * 32),
        wire.Create("tmp/x"),
        wire.Create("packsx/x"),
        # What would be in the way of others: a file where their folder, a folder where their object comes.
        wire.Create("packs/3f"),
        wire.Create("packs/4a/3f" + "00" * 31),
        wire.Create(PACK + "/x"),
        wire.Create(SET + "/x"),
        wire.Create("index/aa/" + "aa" * 32),
        wire.Create("forgotten/" + "ab" * 16),
        wire.Create("revoked/" + "ab" * 16),
        wire.Create("pins/" + "ab" * 16),
        wire.Create("checked/" + "ab" * 16),
        wire.Begin(),
    ]
    for request in refused:
        error = one.ask(request).error
        assert error and error.kind == "refused" and "append-only" in error.message and error.hint, request
    one.tell(wire.Write(1, 0), b"x")
    assert one.kind(wire.Publish(1, "slots/two", 1)) == "refused"
    assert one.kind(wire.Create(PACK), b"another") == "already-exists"
    assert one.kind(wire.Create("config"), b"another") == "refused"
    assert tree(root) == before
    names = (SESSION, SET, "packs/aa/" + "aa" * 32, "maps/aa/" + "aa" * 32, "index/" + "aa" * 32)
    for name in (*names, "absent/" + "cd" * 16):
        assert one.kind(wire.Create(name), b"new") is None
    one.tell(wire.Write(1, 0), b"x")
    assert one.kind(wire.Publish(1, "packs/bb/" + "bb" * 32, 1)) is None
    assert one.kind(wire.Delete(SESSION)) == "refused", "its set is there"
    for request in (wire.Create("probe/a"), wire.Move("probe/a", "probe/b"), wire.Delete("probe/b")):
        assert one.kind(request) is None, "what doctor tries is no part of a repository"
    assert one.fetch(wire.Strangers())[1] == b""
    assert one.kind(wire.Sweep()) is None
    one.hang_up()
    assert not (root / "probe").exists()


def test_an_append_only_writer_takes_back_its_own_announcement_only(peer, root: Path) -> None:
    one, other = peer(mode=APPEND_ONLY), peer(mode=APPEND_ONLY)
    assert one.kind(wire.Create(SESSION), b"{}") is None
    assert other.kind(wire.Create(SESSION), b"{}") == "already-exists"
    assert other.kind(wire.Delete(SESSION)) == "refused"
    assert one.kind(wire.Delete(SESSION)) is None
    assert not (root / SESSION).exists()


@pytest.mark.parametrize("part", ["damaged", "condemned", "damaged/packs/3f", "sets/x", "packs/3f"])
@pytest.mark.parametrize("restrict", [False, True])
def test_a_part_of_a_repository_is_no_place_for_another(peer, root: Path, part: str, restrict: bool) -> None:
    """Or what may be appended to that one would be set aside, condemned or revoked in the one around it."""
    before = tree(root), sorted(os.listdir(root))
    for mode in (APPEND_ONLY, READ_ONLY):
        one = peer(root / part, mode=mode, restrict=[str(root)] if restrict else [])
        assert one.opened.error and one.opened.error.kind == "refused", one.opened
        assert "part of the repository" in one.opened.error.message
        assert one.kind(wire.Begin()) == "protocol", "nothing is open"
    assert (tree(root), sorted(os.listdir(root))) == before
    assert peer(root / part).opened.error is None, "who may do everything may do this, too"


@pytest.mark.parametrize("mode", [APPEND_ONLY, READ_ONLY])
def test_few_rights_reach_no_other_folder(peer, tmp_path: Path, mode: str) -> None:
    """Even without a restriction: what is no repository is not read, and none is made on top of it."""
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    (home / "letters").mkdir()
    (home / "letters/one").write_text("dear reader")
    for config in (None, "Host *"):
        if config:
            (home / "config").write_text(config)
        before = tree(home)
        one = peer(home, mode=mode)
        looks = [
            wire.Read("letters/one"),
            wire.Size("letters/one"),
            wire.Exists("letters/one"),
            wire.List("letters"),
        ]
        if config:
            looks += [wire.Read("config"), wire.List("")]
        for request in looks:
            assert one.kind(request) == "refused", request
        assert one.kind(wire.Begin()) == "refused"
        assert one.kind(wire.Create("config")) == "refused"
        assert one.kind(wire.Create("sets/x")) is not None
        assert tree(home) == before
    assert peer(home).fetch(wire.Read("letters/one"))[1] == b"dear reader"


def test_read_only(peer, root: Path) -> None:
    before = tree(root)
    one = peer(mode=READ_ONLY)
    assert one.fetch(wire.Read(PACK))[1] == b"a pack"
    for request in (
        wire.Create(SET),
        wire.Delete(PACK),
        wire.Move(PACK, "packs/a/a"),
        wire.Sweep(),
        wire.Begin(),
    ):
        assert one.kind(request) == "refused"
    one.tell(wire.Write(1, 0), b"x")
    assert one.kind(wire.Publish(1, "packs/bb/bb", 1)) == "refused"
    assert tree(root) == before


# --- what makes no sense ----------------------------------------------------------------------------


def test_requests_out_of_order(peer, root: Path) -> None:
    one = peer(None)
    one.writer.raw(wire.preamble())
    one.reader.preamble()
    for request in (wire.Read("config"), wire.Publish(1, PACK, 0), wire.End()):
        assert one.kind(request) == "protocol"
    assert one.kind(wire.Open(str(root))) is None
    assert one.kind(wire.Open(str(root))) == "protocol"
    assert one.kind(wire.End()) is None  # ends nothing
    assert one.kind(wire.Publish(1, "packs/aa/aa", 0)) == "protocol"
    one.tell(wire.Discard(99))
    assert one.kind(wire.Begin()) is None and one.kind(wire.Begin()) == "protocol"


def test_uploads_that_do_not_add_up(peer, root: Path) -> None:
    before = tree(root)
    one = peer()
    one.tell(wire.Write(1, 5), b"does not begin at the beginning")
    assert one.kind(wire.Publish(1, "packs/aa/aa", 31)) == "protocol"
    one.tell(wire.Write(2, 0), b"abc")
    one.tell(wire.Write(2, 2), b"overlaps")
    assert one.kind(wire.Publish(2, "packs/aa/aa", 11)) == "protocol"
    one.tell(wire.Write(3, 0), b"abc")
    assert one.kind(wire.Publish(3, "packs/aa/aa", 4)) == "protocol"
    assert one.kind(wire.Publish(3, "packs/aa/aa", 3)) == "protocol", "a replay"
    one.tell(wire.Write(4, 0), b"abc")
    one.tell(wire.Discard(4))
    assert one.kind(wire.Publish(4, "packs/aa/aa", 3)) == "protocol"
    assert tree(root) == before
    one.tell(wire.Write(5, 0), b"abc")
    assert one.kind(wire.Publish(5, "packs/aa/aa", 3)) is None
    one.tell(wire.Write(5, 0), b"xyz")
    assert one.kind(wire.Publish(5, "packs/aa/aa", 3)) == "already-exists", "a replay"
    assert (root / "packs/aa/aa").read_bytes() == b"abc"


def test_too_many_uploads(peer) -> None:
    one = peer()
    descriptors = len(os.listdir("/proc/self/fd"))
    for number in range(wire.MAX_UPLOADS + 1):
        one.tell(wire.Write(number, 0), b"x")
    answer, _ = one.answer()
    assert answer.error and "uploads" in answer.error.message
    assert one.gone() and isinstance(one.error, wire.ProtocolError)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.mark.parametrize(
    "junk",
    [
        b"\x01\0\0\0\0\0\0\0\0\0\0\0",
        b"\x01\0\0\0\xff\xff\xff\xff\0\0\0\0",
        b"\x01\0\0\0\x05\0\0\0\xff\xff\xff\xff",
        b"\xff" * 1000,
    ],
)
def test_frames_that_are_none_end_the_connection(peer, root: Path, junk: bytes) -> None:
    before = tree(root)
    one = peer()
    one.ours.sendall(junk)
    answer, _ = one.answer()
    assert answer.error and answer.error.kind == "protocol"
    assert one.gone() and isinstance(one.error, wire.ProtocolError)
    assert tree(root) == before


@pytest.mark.parametrize(
    "first", [b"GET / HTTP/1.0\r\n\r\n", wire.preamble((7, 9)), wire.preamble((0, 0)), b"short"]
)
def test_another_language(peer, first: bytes) -> None:
    one = peer(None)
    one.ours.sendall(first)
    one.ours.shutdown(socket.SHUT_WR)
    assert one.reader.preamble() == wire.preamble()
    assert one.answer()[0].error
    assert one.gone() and isinstance(one.error, wire.ProtocolError)


def test_no_word_at_all(peer) -> None:
    one = peer(None)
    one.hang_up()
    assert one.error is None


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage_harms_nothing(root: Path, data: st.DataObject) -> None:
    """Valid frames, damaged frames and noise, in any order: the server always ends, and nothing is hurt."""
    before = tree(root.parent.parent)
    one = Peer(root, mode=APPEND_ONLY, restrict=[str(root)])
    names = st.sampled_from(["config", PACK, "../secret", "slots/one", "tmp/x", "packs", "x" * 300])
    requests = st.one_of(
        st.builds(wire.Read, names, st.integers(0, 10), st.none() | st.integers(0, 1 << 40)),
        st.builds(wire.Delete, names),
        st.builds(wire.Move, names, names),
        st.builds(wire.List, names, st.booleans()),
        st.builds(wire.Create, st.sampled_from(["config", PACK, "../secret"])),
        st.builds(wire.Write, st.integers(0, 3), st.integers(0, 5)),
        st.builds(wire.Publish, st.integers(0, 3), st.sampled_from(["config", PACK]), st.integers(0, 5)),
        st.just(wire.Begin()),
    )
    frames: list[bytes] = []
    for _ in range(data.draw(st.integers(0, 6))):
        head = bytearray(wire.encode(data.draw(requests)))
        if data.draw(st.booleans()):
            head[data.draw(st.integers(0, len(head) - 1))] ^= data.draw(st.integers(1, 255))
        body = data.draw(st.binary(max_size=5))
        lengths = (data.draw(st.integers(0, 1 << 32 - 1)), len(head), len(body))
        frame = b"".join(n.to_bytes(4, "little") for n in lengths) + bytes(head) + body
        frames.append(data.draw(st.sampled_from([frame, frame, frame, frame[:-1], body])))
    for frame in frames:  # Drawn before: when the server hangs up must not change what is drawn.
        try:
            one.ours.sendall(frame)
        except OSError:
            break  # It has had enough.
    one.ours.close()
    assert one.gone()
    assert one.error is None or isinstance(one.error, wire.ProtocolError)
    after = tree(root.parent.parent)
    assert before.items() <= after.items()
    # A name that was damaged may be another good one: of an object that a writer may add.
    assert all(name.startswith("served/repo/packs/") for name in after.keys() - before.keys())


# --- the real process ------------------------------------------------------------------------------------


def serve(*options: str) -> subprocess.Popen[bytes]:
    # An allocation of what a frame may promise would not fit.
    argv = ["prlimit", f"--as={1 << 30}", sys.executable, "-m", "imager", "serve", "--stdio", *options]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_noise_takes_no_memory(root: Path) -> None:
    """Megabytes of noise, and frames that promise gigabytes: an error, exit 1, and little memory."""
    seed = random.Random(5)
    opened = [(1, wire.Open(str(root)), b"")]
    for attack in (
        wire.preamble() + seed.randbytes(20 << 20),
        wire.preamble() + b"\x01\0\0\0\xff\xff\xff\x7f\xff\xff\xff\x7f" + bytes(20 << 20),
        wire.preamble() + b"\x01\0\0\0\x10\0\0\0\xff\xff\xff\xff" + bytes(20 << 20),
        seed.randbytes(20 << 20),
        wire.preamble() + frames(opened + [(n, wire.Write(n, 0), bytes(wire.PIECE)) for n in range(70)]),
    ):
        process = serve("--append-only")
        _, err = process.communicate(attack)
        assert process.returncode == 1
        assert err.startswith(b"error: ") and b"Traceback" not in err and b"internal" not in err


def frames(items: list[tuple[int, wire.Request, bytes]]) -> bytes:
    fd = os.memfd_create("frames")
    try:
        writer = wire.FrameWriter(fd)
        for item in items:
            writer.frame(*item)
        return os.pread(fd, 1 << 30, 0)
    finally:
        os.close(fd)


def test_it_ends_with_its_input(root: Path) -> None:
    process = serve("--restrict", str(root))
    out, err = process.communicate(wire.preamble() + frames([(1, wire.Open(str(root)), b"")]))
    assert process.returncode == 0 and err == b""
    assert out.startswith(wire.preamble())


def test_it_ends_when_it_is_told_to(root: Path) -> None:
    """In the midst of an upload: nothing of it is left."""
    before = tree(root)
    process = serve("--restrict", str(root))
    assert process.stdin and process.stdout
    process.stdin.write(
        wire.preamble() + frames([(1, wire.Open(str(root)), b""), (2, wire.Write(1, 0), bytes(1000))])
    )
    process.stdin.flush()
    assert process.stdout.read(16) == wire.preamble()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err.startswith(b"error: interrupted by SIGTERM")
    assert tree(root) == before and os.listdir(root / "tmp") == []


def test_its_options(root: Path) -> None:
    for options, word in (
        ([], b"--stdio"),
        (["--stdio", "--append-only", "--read-only"], b"exclude"),
    ):
        argv = [sys.executable, "-m", "imager", "serve", *options]
        done = subprocess.run(argv, capture_output=True, stdin=subprocess.DEVNULL, check=False)
        assert done.returncode == 2 and word in done.stderr and done.stdout == b""
