"""What two imagers say to each other over a pipe: frames, requests and answers.

Invariant: nothing that arrives is believed. Every length is checked against
its bound before memory is taken for it, every name and path has its form
checked, and what does not fit ends in a `ProtocolError`, never in another
exception. docs/design/wire-protocol.md describes all of it for who writes a peer.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Sequence
from threading import Lock
from typing import Annotated, NamedTuple, TypeAlias

import msgspec

from imager.errors import StorageError
from imager.storage import base

VERSIONS = (1, 1)
"The oldest and the newest version of the protocol that this program speaks."
MAGIC = b"IMGRWIRE"
MAX_HEAD = 16 << 10
"Bytes of a frame's head at most."
PIECE = 1 << 20
"Bytes of a frame's body at most."
MAX_OBJECT = (4 << 30) - 1
"Bytes of an object at most."
MAX_UPLOADS = 64
"Uploads that one connection may have open at once."
MAX_IN_FLIGHT = 16
"Requests that a client of ours has under way at once; a server takes as many and then reads no further."

_PREAMBLE = struct.Struct("<8sHHI")
_PREFIX = struct.Struct("<III")
_MAX_PATH = 4095


class ProtocolError(StorageError):
    """The other end sent what the protocol does not have; the connection is of no more use."""

    kind = "protocol"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint or "is it the same release of imager at both ends?")


class Refused(StorageError):
    """The other end is not allowed to do this for us (append-only, read-only, outside the restriction)."""

    kind = "refused"


# --- requests --------------------------------------------------------------------------------

_Upload: TypeAlias = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
_Size: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_OBJECT)]
_Offset: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
_Text: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_PATH)]


class _Request(msgspec.Struct, frozen=True, tag_field="verb", tag=str.lower, forbid_unknown_fields=True):
    """What a client asks for; on the wire a map whose `verb` is the class's name in small letters."""


class Open(_Request, frozen=True):
    """Choose the folder that all further requests are about. First, and once."""

    path: _Text


class Read(_Request, frozen=True):
    """Bytes of an object from `offset`, at most `length`; None: to its end."""

    name: _Text
    offset: _Offset = 0
    length: _Offset | None = None


class Size(_Request, frozen=True):
    """Length of an object: `value`."""

    name: _Text


class Exists(_Request, frozen=True):
    """Whether there is such an object: `value` 0 or 1."""

    name: _Text


class List(_Request, frozen=True):
    """Objects below a folder (of all where it is ""), a line each: the name, or `SIZE NAME`."""

    prefix: Annotated[str, msgspec.Meta(max_length=_MAX_PATH)]
    sizes: bool = False


class Create(_Request, frozen=True):
    """Make an object of the body."""

    name: _Text


class Write(_Request, frozen=True):
    """Append the body to an upload. The first one, at offset 0, begins it. No answer."""

    upload: _Upload
    offset: _Size


class Discard(_Request, frozen=True):
    """Forget an upload. No answer."""

    upload: _Upload


class Publish(_Request, frozen=True):
    """Make an object of an upload's `size` bytes. The upload is over, whatever the answer."""

    upload: _Upload
    name: _Text
    size: _Size


class Move(_Request, frozen=True):
    """Give an object another, free name."""

    name: _Text
    target: _Text


class Delete(_Request, frozen=True):
    """Remove an object."""

    name: _Text


class Space(_Request, frozen=True):
    """Bytes that can still be stored: `value`, or none."""


class Strangers(_Request, frozen=True):
    """Names at the top that no repository has, a line each."""


class Sweep(_Request, frozen=True):
    """Remove what dead writers left; the names, a line each."""


class Begin(_Request, frozen=True):
    """Prepare an empty folder for a new repository; keeps others out until `End` or the connection ends."""


class End(_Request, frozen=True):
    """What `Begin` began is over."""


Request: TypeAlias = (
    Open
    | Read
    | Size
    | Exists
    | List
    | Create
    | Write
    | Discard
    | Publish
    | Move
    | Delete
    | Space
    | Strangers
    | Sweep
    | Begin
    | End
)


# --- answers -----------------------------------------------------------------------------------


class Failure(msgspec.Struct, frozen=True):
    """Why a request failed; `kind` is the word of one of our errors."""

    kind: str
    message: str
    hint: str | None = None


class Answer(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A frame of an answer; `more` frames follow or not."""

    more: bool = False
    value: int | None = None
    error: Failure | None = None


class Served(msgspec.Struct, frozen=True):
    """Body of the answer to `Open`: who serves, and what it permits (`full`, `append-only`, `read-only`)."""

    imager: str
    mode: str


_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers = msgspec.msgpack.Decoder(Answer)
_served = msgspec.msgpack.Decoder(Served)
encode = msgspec.msgpack.Encoder().encode


def parse_request(head: bytes) -> Request:
    """A request out of a frame's head. Raises `ProtocolError`."""
    try:
        return _requests.decode(head)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ProtocolError(f"the other end sent what is no request: {error}") from error


def parse_answer(head: bytes) -> Answer:
    """An answer out of a frame's head. Raises `ProtocolError`."""
    try:
        return _answers.decode(head)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ProtocolError(f"the other end sent what is no answer: {error}") from error


def parse_served(body: bytes) -> Served:
    """What is served, out of the body of the first answer. Raises `ProtocolError`."""
    try:
        return _served.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ProtocolError(f"the other end sent what is no greeting: {error}") from error


def is_name(name: str) -> bool:
    """Whether `name` can be an object's."""
    try:
        return ".." not in base.check_name(name)
    except ValueError:
        return False


def check_name(name: str) -> str:
    """`name` if it can be an object's. Raises `ProtocolError`."""
    if not is_name(name):
        raise ProtocolError(f"not an object name: {ascii(name[:100])}")
    return name


def check_path(path: str) -> str:
    """`path` if it can be a folder's: absolute or `~/...`, no control characters. Raises `ProtocolError`."""
    if not path.isprintable() or not path.startswith(("/", "~/")) or len(path.encode()) > _MAX_PATH:
        raise ProtocolError(f"not a path: {ascii(path[:100])}", hint="write an absolute path, or ~/folder")
    return path


def printable(text: str, limit: int = 1000) -> str:
    """What the other end said, fit for a terminal: no control characters, not endless."""
    kept = "".join(char if char.isprintable() else " " for char in text[: limit + 1]).strip()
    return kept if len(kept) <= limit else kept[:limit] + "..."


# --- frames --------------------------------------------------------------------------------------


def preamble(versions: tuple[int, int] = VERSIONS) -> bytes:
    """What each end says first."""
    return _PREAMBLE.pack(MAGIC, *versions, 0)


def agree(raw: bytes, own: tuple[int, int] = VERSIONS) -> int:
    """The version to speak with who sent the preamble `raw`. Raises `ProtocolError`."""
    if len(raw) != _PREAMBLE.size or not raw.startswith(MAGIC):
        raise ProtocolError("the other end does not speak this protocol")
    oldest, newest = int.from_bytes(raw[8:10], "little"), int.from_bytes(raw[10:12], "little")
    version = min(newest, own[1])
    if version < max(oldest, own[0]):
        raise ProtocolError(
            f"the other end speaks versions {oldest} to {newest} of the protocol, "
            f"this imager {own[0]} to {own[1]}",
            hint="bring imager to the same release at both ends",
        )
    return version


class Frame(NamedTuple):
    """A message on its way. `number` is that of the request; the client gives each one under way another.

    Number 0 is for what the server says of the connection itself.
    """

    number: int
    head: bytes
    body: bytes


class FrameReader:
    """Reads frames from a descriptor, which stays the caller's. One thread at a time."""

    def __init__(self, fd: int) -> None:
        self._file = io.BufferedReader(io.FileIO(fd, closefd=False), 64 << 10)

    def preamble(self) -> bytes:
        """The first bytes, fewer at the end and where they cannot become a preamble. Raises OSError."""
        raw = b""
        while len(raw) < _PREAMBLE.size and MAGIC.startswith(raw[: len(MAGIC)]):
            part = self._file.read1(_PREAMBLE.size - len(raw))
            if not part:
                break
            raw += part
        return raw

    def rest(self) -> bytes:
        """What has arrived by now after something that was no preamble. Nothing can be read after it."""
        os.set_blocking(self._file.fileno(), False)
        return self._file.read(200) or b""

    def frame(self) -> Frame | None:
        """The next one; None at the end, even in the midst of a frame. Raises `ProtocolError`, OSError."""
        prefix = self._file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            return None
        number, head_length, body_length = _PREFIX.unpack(prefix)
        if not 0 < head_length <= MAX_HEAD or body_length > PIECE:
            raise ProtocolError(f"a frame of {head_length} and {body_length} bytes is too long")
        head = self._file.read(head_length)
        body = self._file.read(body_length) if body_length else b""
        if len(head) < head_length or len(body) < body_length:
            return None
        return Frame(number, head, body)


class FrameWriter:
    """Writes frames to a descriptor, which stays the caller's. Safe to use from several threads."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = Lock()

    def raw(self, data: bytes) -> None:
        """Bytes that are no frame: a preamble. Raises OSError."""
        with self._lock:
            self._all([data])

    def frame(self, number: int, message: Request | Answer, body: bytes = b"") -> None:
        """One whole frame. Raises OSError; `ProtocolError` where it's longer than a frame may be."""
        head = encode(message)
        if len(head) > MAX_HEAD or len(body) > PIECE:
            raise ProtocolError(f"a frame of {len(head)} and {len(body)} bytes is too long")
        with self._lock:
            self._all([_PREFIX.pack(number, len(head), len(body)) + head, body])

    def close(self, timeout: float = -1) -> None:
        """Write no more: what comes after this is an OSError.

        Waits for a frame that is being written; with `timeout`, no longer than so many seconds.
        """
        held = self._lock.acquire(timeout=timeout)
        self._fd = -1
        if held:
            self._lock.release()

    def _all(self, parts: Sequence[bytes]) -> None:
        left = [memoryview(part) for part in parts if part]
        while left:
            done = os.writev(self._fd, left)
            while left and done >= len(left[0]):
                done -= len(left.pop(0))
            if done:
                left[0] = left[0][done:]


def lines(items: Sequence[str]) -> bytes:
    """A list as a body, or several: a line each."""
    return "".join(f"{item}\n" for item in items).encode()


def split_lines(raw: bytes) -> list[str]:
    """The list again. Raises `ProtocolError`."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("a list that is no text") from error
    if text and not text.endswith("\n"):
        raise ProtocolError("a list that is cut short")
    return text.split("\n")[:-1]
