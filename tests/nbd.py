"""An NBD client of the tests' own, after doc/proto.md of the NBD project: plain sockets, nothing hidden.

Invariant: it checks every magic and cookie that a server sends, and nothing that it sends itself: a
test may send what it likes.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

HELLO = struct.Struct(">QQH")
OPTION = struct.Struct(">QII")
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
IHAVEOPT = 0x49484156454F5054
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META = 1, 2, 3, 5, 6, 7, 8, 9, 10
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
ACK, ERROR = 1, 1 << 31
EPERM, EIO, EINVAL, EOVERFLOW = 1, 5, 22, 75


def text(name: str) -> bytes:
    """A string with its length before it."""
    raw = name.encode()
    return struct.pack(">I", len(raw)) + raw


@dataclass
class Answer:
    """What came back for one request. `errors`: (number, offset or None); `data`: by offset; `holes`."""

    errors: list[tuple[int, int | None]] = field(default_factory=list)
    data: list[tuple[int, bytes]] = field(default_factory=list)
    holes: list[tuple[int, int]] = field(default_factory=list)
    status: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def content(self, offset: int, length: int) -> bytes:
        """The bytes of a read that went well: every one of them came exactly once."""
        out, seen = bytearray(length), bytearray(length)
        assert not self.errors, self.errors
        for at, part in [*self.data, *((at, bytes(size)) for at, size in self.holes)]:
            begin = at - offset
            assert begin >= 0 and begin + len(part) <= length and not any(seen[begin : begin + len(part)])
            out[begin : begin + len(part)] = part
            seen[begin : begin + len(part)] = b"\1" * len(part)
        assert all(seen)
        return bytes(out)


class Client:
    """One connection. After `go` it sends requests."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(path)
        self.structured = False
        self.size = 0
        self.flags = 0
        self._cookie = 0
        magic, opts, flags = HELLO.unpack(self.take(HELLO.size))
        assert (magic, opts, flags & 3) == (0x4E42444D41474943, IHAVEOPT, 3)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def take(self, length: int) -> bytes:
        """Exactly so many bytes; EOFError where the server hung up."""
        out = bytearray()
        while len(out) < length:
            part = self.socket.recv(length - len(out))
            if not part:
                raise EOFError(f"{len(out)} of {length} bytes")
            out += part
        return bytes(out)

    # --- the handshake ------------------------------------------------------------------------

    def hello(self, flags: int = 3) -> None:
        self.socket.sendall(struct.pack(">I", flags))

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """Send an option: its replies, (type, data), to the last."""
        self.socket.sendall(OPTION.pack(IHAVEOPT, option, len(data)) + data)
        replies = []
        while True:
            magic, about, kind, length = OPTION_REPLY.unpack(self.take(OPTION_REPLY.size))
            assert (magic, about) == (0x3E889045565A9, option)
            replies.append((kind, self.take(length)))
            if kind == ACK or kind & ERROR:
                return replies

    def go(self, name: str = "", *, structured: bool = True, contexts: Sequence[str] = ()) -> Client:
        """Negotiate as any client does."""
        self.hello()
        if structured:
            assert self.option(STRUCTURED) == [(ACK, b"")]
            self.structured = True
        if contexts:
            queries = b"".join(text(one) for one in contexts)
            found = self.option(SET_META, text(name) + struct.pack(">I", len(contexts)) + queries)
            assert len(found) == len(contexts) + 1, found
        for kind, data in self.option(GO, text(name) + struct.pack(">H", 0)):
            assert not kind & ERROR, data
            if kind == 3 and data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:])
        return self

    # --- requests --------------------------------------------------------------------------------

    def send(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, more: bytes = b""
    ) -> int:
        """Send a request; its cookie."""
        self._cookie += 1
        self.socket.sendall(REQUEST.pack(0x25609513, flags, command, self._cookie, offset, length) + more)
        return self._cookie

    def answer(self, reads: dict[int, tuple[int, int]]) -> tuple[int, Answer]:
        """The whole answer that comes next, if chunks of others do not come between. `reads`: by cookie."""
        answer = Answer()
        while True:
            magic = struct.unpack(">I", head := self.take(4))[0]
            if magic == 0x67446698:
                _, error, cookie = SIMPLE.unpack(head + self.take(SIMPLE.size - 4))
                if error:
                    answer.errors.append((error, None))
                elif cookie in reads:
                    answer.data.append((reads[cookie][0], self.take(reads[cookie][1])))
                return cookie, answer
            magic, flags, kind, cookie, length = CHUNK.unpack(head + self.take(CHUNK.size - 4))
            assert magic == 0x668E33EF and self.structured
            self._chunk(kind, self.take(length), answer)
            if flags & 1:
                return cookie, answer

    def _chunk(self, kind: int, body: bytes, answer: Answer) -> None:
        if kind == 1:
            answer.data.append((int.from_bytes(body[:8], "big"), body[8:]))
        elif kind == 2:
            answer.holes.append(struct.unpack(">QI", body))
        elif kind == 5:
            pairs = struct.iter_unpack(">II", body[4:])
            answer.status[int.from_bytes(body[:4], "big")] = [(a, b) for a, b in pairs]
        elif kind & 1 << 15:
            number, said = struct.unpack_from(">IH", body)
            rest = body[6 + said :]
            answer.errors.append((number, int.from_bytes(rest, "big") if kind & 2 else None))
        else:
            assert kind == 0 and not body

    def ask(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, more: bytes = b""
    ) -> Answer:
        """One request and its answer."""
        sent = self.send(command, offset, length, flags=flags, more=more)
        cookie, answer = self.answer({sent: (offset, length)} if command == READ else {})
        assert cookie == sent
        return answer

    def read(self, offset: int, length: int, *, flags: int = 0) -> bytes:
        """Bytes that can be had."""
        return self.ask(READ, offset, length, flags=flags).content(offset, length)
