"""A writer's session: packs that become durable in the background, and the commit.

Invariant: objects are published in the order in which they were handed in
(the session's announcement first, then packs, map packs, index segments), each
durable before the next; the manifest comes after all of them. To a far storage
neighbours of one kind go at once, but none before all of another kind that were
handed in earlier are durable. A set exists by its manifest alone, so a session
that ends early leaves nothing that counts.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

from imager import _native
from imager.errors import ImagerError, IntegrityError, Locked
from imager.repository import sessions
from imager.repository.format import (
    CIPHER_AES,
    CIPHER_CHACHA,
    KIND_DATA,
    KIND_MAP,
    SETS,
    pack_object,
)
from imager.repository.keys import seal_session_key
from imager.repository.manifest import is_abort_mark, parse_abort_mark
from imager.repository.repository import Repository
from imager.storage.base import Staged
from imager.storage.errors import AlreadyExists, StorageError, refusal
from imager.storage.location import local_path

_IN_FLIGHT = 2
"Jobs that wait or run at once where the storage is local; one of them runs."
_FAR_IN_FLIGHT = 4
"The same for a far storage, where all of them may run."


class _Publisher:
    """Carries out jobs in the background; few wait or run at once, so staged data stays bounded.

    A job begins when all earlier ones of other kinds are done; of one kind `lanes` run at once.
    """

    def __init__(self, lanes: int, in_flight: int) -> None:
        self._in_flight = in_flight
        self._jobs: deque[tuple[str, Callable[[], None]]] = deque()
        self._running: list[str] = []
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"publish-{lane}", daemon=True) for lane in range(lanes)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._may_begin() and not (self._closed and not self._jobs):
                    self._changed.wait()
                if not self._jobs:
                    return
                kind, job = self._jobs.popleft()
                self._running.append(kind)
                failed = self._error is not None
            try:
                if not failed:
                    job()
            except BaseException as error:
                with self._changed:
                    self._error = self._error or error
            del job  # What it holds is done with: another pack may take its memory.
            with self._changed:
                self._running.remove(kind)
                self._changed.notify_all()

    def _may_begin(self) -> bool:
        return bool(self._jobs) and all(kind == self._jobs[0][0] for kind in self._running)

    def _pending(self) -> int:
        return len(self._jobs) + len(self._running)

    def add(self, kind: str, job: Callable[[], None]) -> None:
        """Queue a job; waits while too many are pending. Raises what an earlier job raised."""
        with self._changed:
            while self._pending() >= self._in_flight and self._error is None:
                self._changed.wait()
            self.check()
            self._jobs.append((kind, job))
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait for all jobs. Raises what the first failing one raised; none began after it."""
        with self._changed:
            while self._pending():
                self._changed.wait()
        self.check()

    def check(self) -> None:
        """Raise what a job raised."""
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Forget the jobs that have not begun."""
        with self._changed:
            self._jobs.clear()
            self._changed.notify_all()

    def close(self) -> None:
        """Let the threads end after the jobs that are queued, and wait for them."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()


class Session:
    """One writer's work, from its announcement to its commit. Use it as a context manager.

    What is there already is looked at after `begin`, by `index.look_around`.

    Packs are numbered in the order of `new_pack`. `new_pack`, `seal` and
    `create` may be called from several threads.
    """

    def __init__(self, repository: Repository, *, host: str) -> None:
        self.repository = repository
        identity = os.urandom(16)
        self.id = identity.hex()
        self.key: bytes | None = None
        self.envelope: bytes | None = None
        self.stored = 0
        "Bytes of the packs and other objects handed in so far."
        self.known: _native.Known | None = None
        "Where blocks are; None before `index.look_around`."
        self.condemned: frozenset[bytes] = frozenset()
        "Packs that were condemned when it looked around: it refers to none of them."
        self._handle: int | None = None
        self._lock = threading.Lock()
        self._sequence = 0
        self._objects = 0
        self._staged: dict[int, tuple[Staged, int]] = {}
        "Packs by number: not handed in yet, or not durable yet."
        self._ended = False
        self._committing = False
        epoch = 0
        if repository.sealed:
            cipher = CIPHER_AES if _native.aes_is_fast() else CIPHER_CHACHA
            epoch, public = repository.newest_epoch()
            self.key = os.urandom(32)
            self.envelope = seal_session_key(
                self.key,
                cipher=cipher,
                epoch=epoch,
                public=public,
                session=identity,
                repository=repository.id,
            )
            self._handle = repository.adopt_key(self.envelope, cipher, self.key)
        # Durable before anything is looked at that this writer is going to count on.
        sessions.announce(repository.storage, repository.config.repository, self.id, host=host, epoch=epoch)
        local = repository.storage.local
        self._publisher = _Publisher(1, _IN_FLIGHT) if local else _Publisher(_FAR_IN_FLIGHT, _FAR_IN_FLIGHT)

        def tidy() -> None:
            try:
                repository.storage.sweep()  # or writers that are killed again and again would fill the disk
            except StorageError:
                pass  # Tidying up is no condition of a backup; what really is wrong, the next call tells.

        self._publisher.add("tidying", tidy)

    @classmethod
    def begin(cls, repository: Repository, *, host: str | None = None) -> Session:
        """Announce a writer. Raises `IntegrityError` (no trustworthy key epoch), `StorageError`."""
        return cls(repository, host=host or os.uname().nodename)

    def new_pack(self, kind: int) -> _native.PackWriter:
        """An empty pack; kind 1 data, 2 map. Hand it back with `seal`. Raises `StorageError`."""
        staged = self.repository.storage.stage()
        try:
            with self._lock:
                writer = _native.PackWriter(
                    self.repository.vault,
                    staged.fd,
                    kind=kind,
                    session=bytes.fromhex(self.id),
                    sequence=self._sequence,
                    envelope=self.envelope,
                    key=self._handle,
                    number=self.repository.names.reserve(),
                )
                self._sequence += 1
                self._staged[writer.number] = (staged, kind)
        except BaseException:
            staged.discard()
            raise
        return writer

    def new_data_pack(self) -> _native.PackWriter:
        """An empty pack for blocks. Raises `StorageError`."""
        return self.new_pack(KIND_DATA)

    def new_map_pack(self) -> _native.PackWriter:
        """An empty pack for map pages. Raises `StorageError`."""
        return self.new_pack(KIND_MAP)

    def seal(self, pack: _native.PackWriter) -> bytes | None:
        """Finish a pack: its name, which map pages may refer to from now on; None for an empty pack.

        The pack is made durable in the background; waits while some others are
        under way. Raises what an earlier one ended with.
        """
        with self._lock:
            staged, kind = self._staged[pack.number]
        if not pack.records:
            with self._lock:
                del self._staged[pack.number]
            staged.discard()
            return None
        try:
            name, size = pack.finish()
        except _native.WriteError as error:
            raise writing_failed(self.repository, error) from error
        self.repository.names.resolve(pack.number, name)
        number = pack.number

        def job() -> None:
            staged.publish(pack_object(kind, name))
            with self._lock:
                del self._staged[number]

        self._publisher.add("maps" if kind == KIND_MAP else "packs", job)
        with self._lock:
            self._objects += 1
            self.stored += size
        return name

    def create(self, name: str, data: bytes) -> None:
        """Create an object after all that was handed in before; one that is there already is fine.

        In the background; raises what an earlier job ended with.
        """

        def job() -> None:
            try:
                self.repository.storage.create(name, data)
            except AlreadyExists:
                pass  # Names are digests of the content (index segments): it is the same.

        self._publisher.add("index", job)
        with self._lock:
            self.stored += len(data)

    def drain(self) -> None:
        """Wait until all that was handed in is durable. Raises the first error."""
        self._publisher.drain()

    def commit(self, manifest: bytes) -> None:
        """Make the set exist. Raises `Locked` where the session was declared dead, or the first error."""
        self.drain()
        if self._staged:
            raise ValueError("commit with packs that were not sealed")
        storage = self.repository.storage
        self._committing = True
        try:
            storage.create(SETS + self.id, manifest)
        except AlreadyExists as error:
            raw = storage.read(SETS + self.id)
            if not is_abort_mark(raw):
                raise IntegrityError(
                    f"the place of image set {self.id} is taken by something else",
                    hint="run imager check; then back up again",
                ) from error
            reason = parse_abort_mark(raw).reason
            raise Locked(
                f"this backup was declared dead while it ran: {reason}",
                hint="nothing of it counts; back up again",
            ) from error
        with self._lock:
            self.stored += len(manifest)
        self._end()

    def abandon(self) -> None:
        """End without a set: forget what is staged. Does nothing after `commit` or a second time."""
        if self._ended:
            return
        if not self.repository.storage.local:
            self._publisher.cancel()  # Nobody waits for uploads that nobody wants.
        self._end()
        with self._lock:
            staged, self._staged = list(self._staged.values()), {}
        for item, _ in staged:
            item.discard()
        if self._committing:
            return  # The storage failed midway: whether there is a set, whoever looks will see.
        try:
            # Nothing more comes of this session, so no prune needs to wait for it.
            sessions.end(self.repository.storage, self.id)
        except StorageError:
            pass  # The announcement harms nobody, and the error that led here is the one to tell.

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            self._publisher.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon()


def writing_failed(repository: Repository, error: _native.WriteError) -> ImagerError:
    """What to raise where the native core could not write a pack."""
    cause = OSError(error.errno, error.strerror)
    if local_path(repository.storage) is None:
        from imager.storage import spool

        return spool.refused(cause)
    return refusal(cause, "writing a pack", repository.storage.url)
