"""One connection to an `imager serve` at the other end of a pipe, shared by many threads.

Invariant: each request gets its own answer, in whatever order answers come,
or an error: `Lost` where the connection ended first, and then whether it took
effect is not known. A connection that is lost stays lost.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable

from imager.errors import ImagerError, Locked, StorageError
from imager.storage import wire
from imager.storage.errors import AlreadyExists, Gone, NotFound, Unavailable
from imager.storage.spool import refused

Sink = Callable[[bytes], None]

_ERRORS: dict[str, type[ImagerError]] = {
    kind.kind: kind
    for kind in (NotFound, AlreadyExists, Gone, Locked, wire.Refused, wire.ProtocolError, StorageError)
}


class Lost(Unavailable):
    """The connection ended before the answer came."""


class _Pending:
    """A request under way. `room`: bytes of answer that may still come."""

    __slots__ = ("answer", "done", "error", "room", "sink")

    def __init__(self, sink: Sink | None, room: int) -> None:
        self.sink = sink
        self.room = room
        self.done = threading.Event()
        self.answer: wire.Answer | None = None
        self.error: ImagerError | None = None

    def take(self, answer: wire.Answer, body: bytes) -> None:
        """One frame of the answer. What the sink raises is the request's failure, not the connection's."""
        self.room -= len(body)
        if self.room < 0:
            raise wire.ProtocolError("the answer is longer than what was asked for")
        if answer.error is not None:
            self.error = _error(answer.error)
        elif body and self.error is None:
            if self.sink is None:
                raise wire.ProtocolError("an answer with bytes that nobody asked for")
            try:
                self.sink(body)
            except StorageError as error:
                self.error = error
        if not answer.more:
            self.answer = answer
            self.done.set()


class Connection:
    """Speaks through `source` (to read from) and `sink` (to write to), which stay the caller's.

    `ended()` is asked for the reason when the other end is gone.
    """

    def __init__(self, source: int, sink: int, *, ended: Callable[[], StorageError]) -> None:
        self._reader = wire.FrameReader(source)
        self._writer = wire.FrameWriter(sink)
        self._ended = ended
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._pending: dict[int, _Pending] = {}
        self._lost: StorageError | None = None
        self._thread = threading.Thread(target=self._listen, name="answers", daemon=True)
        self.requests = 0
        "How many answers were waited for."

    def open(self, path: str) -> wire.Served:
        """Agree on a version and choose the folder `path` there: what is served.

        Raises what `ended` gives, `StorageError`.
        """
        self._greet()
        self._thread.start()
        body: list[bytes] = []
        self.call(wire.Open(path), body.append)
        return wire.parse_served(b"".join(body))

    def _greet(self) -> None:
        try:
            self._writer.raw(wire.preamble())
        except OSError:
            pass  # It has ended already; what it said tells why.
        raw = self._reader.preamble()
        if raw.startswith(wire.MAGIC[: len(raw)]) and len(raw) < len(wire.preamble()):
            raise self._ended()
        if not raw.startswith(wire.MAGIC):
            said = wire.printable((raw + self._reader.rest()).decode(errors="replace"), 100)
            raise wire.ProtocolError(
                f"the far end says {said!r} where imager should answer",
                hint="its shell must print nothing for programs: look at ~/.bashrc there, "
                "or at command= in authorized_keys",
            )
        wire.agree(raw)

    @property
    def lost(self) -> bool:
        """Whether it is of no more use."""
        return self._lost is not None

    def close(self) -> None:
        """Send nothing any more. What is under way gets `Lost` when the other end hangs up."""
        self._writer.close()

    def join(self, timeout: float) -> bool:
        """Wait until nothing is read any more; False where something still may be."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- answers ------------------------------------------------------------------------

    def _listen(self) -> None:
        try:
            while (frame := self._reader.frame()) is not None:
                answer = wire.parse_answer(frame.head)
                with self._lock:
                    pending = self._pending.get(frame.number)
                if pending is None:
                    raise _unasked(answer)
                pending.take(answer, frame.body)
                if not answer.more:
                    with self._lock:
                        del self._pending[frame.number]
            error: StorageError = self._ended()
        except StorageError as caught:
            error = caught
        except OSError as caught:
            error = StorageError(f"reading from the far end failed: {os.strerror(caught.errno or 0)}")
        self._lose(error)

    def _lose(self, error: StorageError) -> None:
        with self._lock:
            if self._lost is None:
                self._lost = error
            left, self._pending = list(self._pending.values()), {}
        for pending in left:
            pending.error = self._why()
            pending.done.set()

    def _why(self) -> StorageError:
        reason = self._lost
        if isinstance(reason, wire.ProtocolError | wire.Refused):
            return reason
        if reason is None:
            return Lost("the connection was lost")
        return Lost(reason.message, hint=reason.hint)

    # --- requests -----------------------------------------------------------------------

    def _send(self, number: int, message: wire.Request, body: bytes) -> None:
        if self._lost is not None:
            raise self._why()
        try:
            self._writer.frame(number, message, body)
        except OSError as error:
            # The listener learns why; it needs a moment, for the last words may still be on their way.
            self._thread.join(10)
            self._lose(StorageError(f"writing to the far end failed: {os.strerror(error.errno or 0)}"))
            raise self._why() from error
        except BaseException:
            # Interrupted: a frame may be cut short, and what came after it would be taken for its rest.
            self._lose(StorageError("the connection was given up"))
            raise

    def call(
        self,
        request: wire.Request,
        sink: Sink | None = None,
        *,
        room: int = wire.MAX_OBJECT,
        body: bytes = b"",
    ) -> int | None:
        """Send a request and wait for its answer: its `value`. Bytes of the answer go to `sink`.

        `room`: bytes that may come. Raises `Lost`, and what the other end or the sink failed with.
        """
        pending = _Pending(sink, room)
        with self._lock:
            number = next(self._ids)
            self._pending[number] = pending
            self.requests += 1
        try:
            self._send(number, request, body)
            pending.done.wait()
        except BaseException:
            pending.sink = _drop  # Interrupted: the answer may still come, and has nowhere to go.
            raise
        if pending.error is not None:
            raise pending.error
        assert pending.answer is not None
        return pending.answer.value

    def upload(self, fd: int, size: int, name: str) -> None:
        """Make the object `name` of the first `size` bytes of `fd`.

        Raises `AlreadyExists`, `Lost`, `StorageError`.
        """
        if size <= wire.PIECE:
            self.call(wire.Create(name), body=_piece(fd, 0, size))
            return
        with self._lock:
            number = next(self._ids)
        for offset in range(0, size, wire.PIECE):
            piece = _piece(fd, offset, min(wire.PIECE, size - offset))
            self._send(number, wire.Write(number, offset), piece)
        self.call(wire.Publish(number, name, size))


def _drop(data: bytes) -> None:
    """Where bytes go that nobody waits for any more."""


def _piece(fd: int, offset: int, size: int) -> bytes:
    try:
        data = os.pread(fd, size, offset)
        while len(data) < size:
            more = os.pread(fd, size - len(data), offset + len(data))
            if not more:
                raise StorageError("a temporary file ends earlier than it did before")
            data += more
        return data
    except OSError as error:
        raise refused(error) from error


def _error(failure: wire.Failure) -> StorageError | Locked:
    kind = _ERRORS.get(failure.kind, StorageError)
    hint = wire.printable(failure.hint) if failure.hint else None
    error = kind(wire.printable(failure.message), hint=hint)
    assert isinstance(error, StorageError | Locked)
    return error


def _unasked(answer: wire.Answer) -> StorageError:
    """What to make of an answer that nobody waits for: a complaint about the connection itself, perhaps."""
    said = _error(answer.error) if answer.error is not None else None
    if isinstance(said, StorageError):
        return said
    return wire.ProtocolError("an answer to a question that nobody asked")
