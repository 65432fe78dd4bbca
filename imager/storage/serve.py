"""Serves a repository's folder to one client, over a pair of descriptors.

Invariant: the client is not trusted. What it sends is checked by
`imager.storage.wire`, what it may do by `imager.storage.rights`; it can take no
more memory than `MAX_IN_FLIGHT` requests with a body each and `MAX_UPLOADS`
open files; and when it goes away, at any moment, nothing is left of what it had
not finished.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from msgspec import Struct

from imager import __version__
from imager.errors import ImagerError, StorageError
from imager.storage import wire
from imager.storage.base import Staged
from imager.storage.errors import Gone, NotFound, refusal
from imager.storage.folder import FolderStorage
from imager.storage.rights import TRIED, Confines, Rights

_Result: TypeAlias = int | bytes | None

_WORKERS = 8
_MAX_STRANGERS = 100
_LINES = 1024
"Names in one frame of a list: fewer than fit even where each is as long as it may be."


class _Upload(Struct):
    """Bytes that arrive piece by piece. `error`: why they cannot be had; what follows is then dropped."""

    staged: Staged | None
    size: int = 0
    error: StorageError | None = None

    def discard(self) -> None:
        if self.staged is not None:
            self.staged.discard()


class Server:
    """One client's connection, from its first byte to its last."""

    def __init__(self, source: int, sink: int, *, mode: str, restrict: Sequence[str] = ()) -> None:
        """Read from the descriptor `source`, answer to `sink`; both stay the caller's.

        mode: one of `imager.storage.rights`. restrict: the folders that may be reached; none: all.
        """
        self._reader = wire.FrameReader(source)
        self._writer = wire.FrameWriter(sink)
        self._mode = mode
        self._rights = Rights(mode, "")
        self._confines = Confines(restrict)
        self._storage: FolderStorage | None = None
        self._tried = False
        self._uploads: dict[int, _Upload] = {}
        self._preparing: AbstractContextManager[None] | None = None
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(wire.MAX_IN_FLIGHT)
        self._workers = [
            threading.Thread(target=self._work, name=f"serve-{number}", daemon=True)
            for number in range(_WORKERS)
        ]

    def run(self) -> None:
        """Serve until the client ends its input. Raises `ProtocolError` where what comes is no request."""
        try:
            self._answer_raw(wire.preamble())
            raw = self._reader.preamble()
            if raw:
                wire.agree(raw)
                for worker in self._workers:
                    worker.start()
                while (frame := self._reader.frame()) is not None:
                    self._take(frame)
                self._finish()
        except ConnectionError:
            pass  # The client is gone; that is how most connections end.
        except wire.ProtocolError as error:
            self._answer(0, wire.Answer(error=_failure(error)))
            raise
        finally:
            self._drop()

    def _finish(self) -> None:
        """Let the workers do what has arrived whole."""
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()

    def _drop(self) -> None:
        """Forget what is not finished, and say nothing more."""
        self._writer.close(5)
        for upload in self._uploads.values():
            upload.discard()
        self._uploads.clear()
        if self._preparing is not None:
            self._end_making()
        if self._storage is not None and self._tried:
            try:
                os.rmdir(f"{self._storage.root}/{TRIED}")
            except OSError:
                pass  # Another one is at it; the last one takes it.

    # --- answers ----------------------------------------------------------------------

    def _answer_raw(self, data: bytes) -> None:
        try:
            self._writer.raw(data)
        except OSError:
            pass  # Who does not listen any more will soon end its input.

    def _answer(self, number: int, answer: wire.Answer, body: bytes = b"") -> None:
        try:
            self._writer.frame(number, answer, body)
        except OSError:
            pass

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job

    # --- requests -----------------------------------------------------------------------

    def _take(self, frame: wire.Frame) -> None:
        """One request: what depends on the order is done at once, the rest by the workers."""
        number = frame.number
        try:
            request = wire.parse_request(frame.head)
            if self._storage is None and not isinstance(request, wire.Open):
                raise wire.ProtocolError("the first request must be open")
        except wire.ProtocolError as error:
            self._answer(number, wire.Answer(error=_failure(error)))
            return
        storage = self._storage
        if storage is None or isinstance(request, wire.Open):
            assert isinstance(request, wire.Open)
            self._guarded(number, lambda: self._open(request))
        elif isinstance(request, wire.Write):
            self._write(storage, request, frame.body)
        elif isinstance(request, wire.Discard):
            if upload := self._uploads.pop(request.upload, None):
                upload.discard()
        elif isinstance(request, wire.Begin | wire.End):
            self._guarded(number, lambda: self._prepare(storage, request))
        elif isinstance(request, wire.Publish):
            upload = self._uploads.pop(request.upload, None)
            self._later(number, lambda: self._publish(storage, request, upload))
        elif isinstance(request, wire.Read | wire.List):
            self._later(number, lambda: self._stream(number, storage, request))
        else:
            self._later(number, lambda: self._serve(storage, request, frame.body))

    def _later(self, number: int, work: Callable[[], _Result]) -> None:
        self._jobs.put(lambda: self._guarded(number, work))

    def _guarded(self, number: int, work: Callable[[], _Result]) -> None:
        """Do `work` and answer with what it gives; where it fails, that is the answer."""
        body = b""
        try:
            result = work()
            answer = wire.Answer(value=result if isinstance(result, int) else None)
            if isinstance(result, bytes):
                body = result
        except ImagerError as error:
            answer = wire.Answer(error=_failure(error))
        except OSError as error:
            root = self._storage.root if self._storage else "the repository"
            answer = wire.Answer(error=_failure(refusal(error, "serving a request", root)))
        except Exception as error:
            failed = f"internal error: {type(error).__name__}: {error}"
            answer = wire.Answer(error=wire.Failure("internal", wire.printable(failed)))
        self._answer(number, answer, body)

    def _open(self, request: wire.Open) -> bytes:
        if self._storage is not None:
            raise wire.ProtocolError("open comes once")
        root = self._confines.root(request.path)
        rights = Rights(self._mode, root)
        rights.open()
        self._storage, self._rights = FolderStorage(root), rights
        return wire.encode(wire.Served(imager=__version__, mode=self._mode))

    def _prepare(self, storage: FolderStorage, request: wire.Begin | wire.End) -> None:
        if isinstance(request, wire.Begin):
            if self._preparing is not None:
                raise wire.ProtocolError("begin comes once")
            self._rights.begin(storage.strangers())
            preparing = storage.initializing()
            preparing.__enter__()
            self._preparing = preparing
            self._rights.making = not os.path.lexists(f"{storage.root}/config")
        elif self._preparing is not None:
            self._end_making()

    def _end_making(self) -> None:
        assert self._preparing is not None
        preparing, self._preparing = self._preparing, None
        self._rights.making = False
        preparing.__exit__(None, None, None)

    # --- uploads ---------------------------------------------------------------------------

    def _write(self, storage: FolderStorage, request: wire.Write, body: bytes) -> None:
        """Append to an upload. There is no answer: `publish` tells what went wrong."""
        upload = self._uploads.get(request.upload)
        if upload is None:
            if len(self._uploads) >= wire.MAX_UPLOADS:
                raise wire.ProtocolError(f"more than {wire.MAX_UPLOADS} uploads at once")
            upload = self._uploads[request.upload] = _Upload(None)
            try:
                self._rights.upload()
                upload.staged = storage.stage()
            except StorageError as error:
                upload.error = error
        fits = request.offset == upload.size and upload.size + len(body) <= wire.MAX_OBJECT
        if upload.error is None and not fits:
            upload.error = wire.ProtocolError(
                f"a piece for {request.offset}, but {upload.size} bytes are here"
            )
        upload.size += len(body)
        if upload.error is not None or upload.staged is None:
            upload.discard()
            return
        try:
            _write_all(upload.staged.fd, body)
        except OSError as error:
            upload.error = refusal(error, "writing an object", storage.root)
            upload.discard()

    def _publish(self, storage: FolderStorage, request: wire.Publish, upload: _Upload | None) -> None:
        if upload is None:
            raise wire.ProtocolError("there is no such upload")
        try:
            name = self._confines.name(storage.root, request.name)
            self._rights.create(name)
            if upload.error is not None or upload.staged is None:
                raise upload.error or wire.ProtocolError("there is no such upload")
            if upload.size != request.size:
                raise wire.ProtocolError(f"{upload.size} bytes of {request.size} are here")
            upload.staged.publish(name)
        finally:
            upload.discard()

    # --- everything else -----------------------------------------------------------------------

    def _serve(self, storage: FolderStorage, request: wire.Request, body: bytes) -> _Result:
        """Do a request, in a worker: the answer's value or body."""

        def named(name: str) -> str:
            return self._confines.name(storage.root, name)

        match request:
            case wire.Size():
                return storage.size(self._readable(storage, request.name))
            case wire.Exists():
                return int(storage.exists(self._readable(storage, request.name)))
            case wire.Create():
                self._rights.create(named(request.name))
                storage.create(request.name, body)
                self._rights.created(request.name)
                self._tried = self._tried or request.name.startswith(TRIED)
            case wire.Move():
                self._rights.move(named(request.name), named(request.target))
                storage.move(request.name, request.target)
            case wire.Delete():
                self._rights.delete(named(request.name))
                storage.delete(request.name)
            case wire.Space():
                return storage.free_space()
            case wire.Strangers():
                names = [name for name in storage.strangers() if f"{name}/" != TRIED][:_MAX_STRANGERS]
                return wire.lines([wire.printable(os.fsencode(n).decode(errors="replace")) for n in names])
            case wire.Sweep():
                self._rights.sweep()
                return wire.lines(storage.sweep()[:_LINES])
        return None

    def _readable(self, storage: FolderStorage, name: str) -> str:
        """`name`, if it may be looked at. "" is everything."""
        if name:
            self._confines.name(storage.root, name)
        self._rights.look(name)
        return name

    def _stream(self, number: int, storage: FolderStorage, request: wire.Read | wire.List) -> bytes:
        """Answer with many frames; this gives the body of the last one."""
        more = wire.Answer(more=True)
        if isinstance(request, wire.Read):
            pieces = self._read(storage, request)
        else:
            pieces = self._list(storage, request)
        last = b""
        for piece in pieces:
            if last:
                self._answer(number, more, last)
            last = piece
        return last

    def _read(self, storage: FolderStorage, request: wire.Read) -> Iterator[bytes]:
        name = self._readable(storage, request.name)
        try:
            fd = storage.open(name)
        except Gone as error:
            if name != "config":
                raise
            raise NotFound(
                f"there is no repository in {storage.root}"
            ) from error  # Not any more, or not yet.
        try:
            end = os.fstat(fd).st_size
            if request.length is not None:
                end = min(end, request.offset + request.length)
            offset = request.offset
            while offset < end and (data := os.pread(fd, min(wire.PIECE, end - offset), offset)):
                yield data
                offset += len(data)
        finally:
            os.close(fd)

    def _list(self, storage: FolderStorage, request: wire.List) -> Iterator[bytes]:
        prefix = request.prefix.rstrip("/")
        self._readable(storage, prefix)
        if request.sizes:
            entries = (entry for entry in storage.list(prefix) if wire.is_name(entry.name))
            found = [f"{entry.size} {entry.name}" for entry in entries]
        else:
            found = [name for name in storage.list_names(prefix) if wire.is_name(name)]
        for start in range(0, len(found), _LINES):
            yield wire.lines(found[start : start + _LINES])


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _failure(error: ImagerError) -> wire.Failure:
    hint = wire.printable(error.hint) if error.hint else None
    return wire.Failure(error.kind, wire.printable(error.message), hint)
