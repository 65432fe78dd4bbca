"""A repository on another machine, reached with the system's ssh.

Invariant: what a person writes in an address never becomes an option of ssh or
a word of a shell: the argument vector is fixed, user, host and port have their
form checked and stand where only they can stand, and the path travels in the
protocol. A connection that is lost is made again, and what was under way is
repeated, so that a call either took effect once or failed.
"""

from __future__ import annotations

import os
import re
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote

from imager import command
from imager.errors import CommandError, StorageError, UsageError
from imager.storage import wire
from imager.storage.base import Entry, Staged
from imager.storage.connection import Connection, Lost
from imager.storage.errors import AlreadyExists, NotFound
from imager.storage.spool import Spool, temporary, write_at
from imager.storage.ssh_errors import Unreachable, explain

T = TypeVar("T")

# No `--` is needed for what these let through, and it is given all the same.
_URL = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63})@)?"
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}|\[[0-9A-Fa-f:.]{2,45}(?:%25[A-Za-z0-9_.-]{1,20})?\])"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<path>/.*)"
)
_REMOTE = re.compile(r"[A-Za-z0-9_./~-]{1,255}")
_OPTIONS = (
    # No terminal, no forwarding of anything; a network that is silently gone is noticed within a minute.
    *("-T", "-a", "-x", "-oClearAllForwardings=yes"),
    *("-oServerAliveInterval=15", "-oServerAliveCountMax=4"),
)
_BACKOFF = (0.2, 1, 2, 4, 8, 16, 30)
_TRIES = 4
"How many connections one call may use up before it fails."


@dataclass(frozen=True, slots=True)
class Address:
    """Where a repository is. `port` None: what ssh's configuration says."""

    host: str
    path: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read `ssh://[user@]host[:port]/path`; `/~/path` is below the home folder. Raises `UsageError`."""
        found = _URL.fullmatch(url)
        if found is None:
            shown = wire.printable(re.sub(r"(?<=//)([^/@:]*):[^/@]*@", r"\1:***@", url), 200)
            raise UsageError(
                f"not an ssh address: {shown}",
                hint="write ssh://[USER@]HOST[:PORT]/FOLDER; "
                "keys, jumps and other options belong into ~/.ssh/config",
            )
        port = int(found["port"]) if found["port"] else None
        if port is not None and not 0 < port < 65536:
            raise UsageError(f"there is no port {port}", hint="write a number from 1 to 65535")
        path = unquote(found["path"])
        path = path[1:] if path.startswith("/~/") else path
        try:
            wire.check_path(path)
        except wire.ProtocolError as error:
            raise UsageError(error.message, hint=error.hint) from error
        if not path.strip("/") or path == "~/":
            raise UsageError(f"no folder is named in {url}", hint="write ssh://HOST/FOLDER")
        return cls(unquote(found["host"].strip("[]")), path, found["user"], port)

    def argv(self, *, unattended: bool) -> list[str]:
        """The command that reaches `imager serve` there. `unattended`: ssh may ask for nothing."""
        remote = os.environ.get("IMAGER_REMOTE") or "imager"
        if not _REMOTE.fullmatch(remote) or remote.startswith("-"):
            raise UsageError(
                "IMAGER_REMOTE is not the path of a program", hint="write a plain path, no options"
            )
        argv = [os.environ.get("IMAGER_SSH") or "ssh", *_OPTIONS]
        argv += ["-oBatchMode=yes"] if unattended else []
        argv += ["-p", str(self.port)] if self.port is not None else []
        argv += ["-l", self.user] if self.user is not None else []
        return [*argv, "--", self.host, shlex.join([remote, "serve", "--stdio"])]


class _Link:
    """A running ssh with the connection through it."""

    def __init__(self, address: Address, *, unattended: bool) -> None:
        self.address = address
        self.ssh = command.Piped(
            address.argv(unattended=unattended), hint="install OpenSSH's client (package openssh-client)"
        )
        try:
            self.connection = Connection(self.ssh.stdout, self.ssh.stdin, address.path, ended=self._ended)
        except BaseException:
            self.ssh.end(0.5)
            raise

    def _ended(self) -> StorageError:
        code = self.ssh.wait(10)
        return explain(self.address.host, code, self.ssh.said())

    def close(self) -> None:
        self.ssh.end()


class SshStorage:
    """The objects of a folder on another machine. See `Storage`."""

    local = False

    def __init__(
        self,
        url: str,
        *,
        backoff: Sequence[float] = _BACKOFF,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Nothing is connected until the first call. `backoff`: seconds to wait before each new attempt
        to make a lost connection again. Raises `UsageError`."""
        self.url = url
        self.address = Address.parse(url)
        self._backoff = backoff
        self._sleep = sleep
        self._spool = Spool(self._upload, self.read)
        self._in_flight = threading.BoundedSemaphore(wire.MAX_IN_FLIGHT)
        self._lock = threading.Lock()
        self._link: _Link | None = None
        self._closed = False
        self._held = False
        self._given_up = 0
        self._reason: StorageError | None = None
        self._requests = 0
        self.connections = 0
        "How many connections were made so far."

    @classmethod
    def connect(cls, url: str) -> SshStorage:
        """The storage at `url`, connected. Raises `UsageError`, `StorageError`."""
        storage = cls(url)
        storage._connected(0)
        return storage

    @property
    def requests(self) -> int:
        """How many answers of the far end were waited for so far, those that begin a connection included."""
        link = self._link
        return self._requests + (link.connection.requests if link else 0)

    @property
    def pid(self) -> int | None:
        """The process of the ssh that runs now."""
        return self._link.ssh.pid if self._link else None

    # --- the connection ------------------------------------------------------------------

    def _connected(self, given_up: int) -> Connection:
        """A connection that is not known to be lost. `given_up`: the number when the call began."""
        link = self._link
        if link is not None and not link.connection.lost:
            return link.connection
        with self._lock:
            if self._closed:
                raise StorageError(f"the connection to {self.address.host} is closed")
            if self._given_up != given_up and self._reason is not None:
                raise self._reason  # Another thread has just tried for long.
            if self._link is not None and not self._link.connection.lost:
                return self._link.connection
            try:
                if self._link is None:
                    self._link = self._begin(unattended=False)
                else:
                    self._again()
            except CommandError as error:
                raise StorageError(error.message, hint=error.hint) from error
            except StorageError as error:
                self._given_up += 1
                self._reason = error
                raise
            return self._link.connection

    def _begin(self, *, unattended: bool) -> _Link:
        link = _Link(self.address, unattended=unattended)
        self.connections += 1
        return link

    def _again(self) -> None:
        """Make a lost connection again, with patience. Raises `StorageError`."""
        assert self._link is not None
        lost = self._link
        self._requests += lost.connection.requests
        lost.connection.requests = 0
        lost.close()
        for pause in self._backoff:
            self._sleep(pause)
            try:
                self._link = self._begin(unattended=True)
                return
            except Unreachable as error:
                reason: StorageError = error
        raise StorageError(
            f"the connection to {self.address.host} was lost and cannot be made again: {reason.message}",
            hint="run the same command again when the network is back; "
            "what is stored already is not sent twice",
        )

    def _do(self, work: Callable[[Connection, bool], T]) -> T:
        """Do `work` over a connection; over a new one where that is lost meanwhile.

        It is told whether it may have taken effect before.
        """
        given_up = self._given_up
        with self._in_flight:
            for attempt in range(_TRIES):
                connection = self._connected(given_up)
                try:
                    return work(connection, attempt > 0)
                except Lost as error:
                    if self._held:
                        raise StorageError(
                            f"the connection was lost while a repository was being made: {error.message}",
                            hint="run imager init again",
                        ) from error
                    last = error
        raise StorageError(
            f"the connection to {self.address.host} is lost again and again: {last.message}", hint=last.hint
        )

    def _call(self, request: wire.Request) -> int | None:
        return self._do(lambda connection, _: connection.call(request))

    def _gather(self, request: wire.Request, *, room: int = wire.MAX_OBJECT) -> bytes:
        """The bytes of an answer."""
        return self._do(lambda connection, _: _bytes(connection, request, room))

    # --- reading ------------------------------------------------------------------------

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of an object. See `Storage.read`."""
        room = wire.MAX_OBJECT if length is None else length
        return self._gather(wire.Read(_named(name), offset, length), room=room)

    def open(self, name: str) -> int:
        """A descriptor of a temporary copy. See `Storage.open`."""

        def work(connection: Connection, _: bool) -> int:
            fd = temporary()
            at = 0

            def keep(data: bytes) -> None:
                nonlocal at
                write_at(fd, data, at)
                at += len(data)

            try:
                connection.call(wire.Read(_named(name)), keep)
            except BaseException:
                os.close(fd)
                raise
            return fd

        return self._do(work)

    def size(self, name: str) -> int:
        """Length in bytes. See `Storage.size`."""
        return self._call(wire.Size(_named(name))) or 0

    def exists(self, name: str) -> bool:
        """Whether there is such an object. See `Storage.exists`."""
        return bool(self._call(wire.Exists(_named(name))))

    def list_names(self, prefix: str) -> list[str]:
        """Names below a folder. See `Storage.list_names`."""
        raw = self._gather(wire.List(_named(prefix.rstrip("/"))))
        return [wire.check_name(name) for name in wire.split_lines(raw)]

    def free_space(self) -> int | None:
        """Bytes that can still be stored there. See `Storage.free_space`."""
        return self._call(wire.Space())

    def strangers(self) -> list[str]:
        """What is there and no repository's. See `Storage.strangers`."""
        return wire.split_lines(self._gather(wire.Strangers(), room=wire.PIECE))

    # --- writing ------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> None:
        """Make an object. See `Storage.create`."""
        _named(name)
        if len(data) > wire.PIECE:
            staged = self.stage()
            try:
                write_at(staged.fd, data, 0)
                staged.publish(name)
            finally:
                staged.discard()
            return

        compare = wire.Read(name, 0, len(data) + 1)

        def work(connection: Connection, again: bool) -> None:
            try:
                connection.call(wire.Create(name), body=data)
            except AlreadyExists:
                if not again or _bytes(connection, compare, len(data) + 1) != data:
                    raise

        self._do(work)

    def stage(self) -> Staged:
        """Begin an object in a local file without a name. See `Storage.stage`."""
        return self._spool.stage()

    def _upload(self, name: str, fd: int, size: int) -> None:
        _named(name)

        def work(connection: Connection, again: bool) -> None:
            try:
                connection.upload(fd, size, name)
            except AlreadyExists:
                if not again or _bytes(connection, wire.Digest(name), 32) != _digest(fd, size):
                    raise

        self._do(work)

    def move(self, name: str, target: str) -> None:
        """Rename. See `Storage.move`."""
        request = wire.Move(_named(name), _named(target))

        def work(connection: Connection, again: bool) -> None:
            try:
                connection.call(request)
            except NotFound:
                if not again or not connection.call(wire.Exists(target)):
                    raise

        self._do(work)

    def delete(self, name: str) -> None:
        """Remove. See `Storage.delete`."""
        _named(name)

        def work(connection: Connection, again: bool) -> None:
            try:
                connection.call(wire.Delete(name))
            except NotFound:
                if not again:
                    raise

        self._do(work)

    @contextmanager
    def initializing(self) -> Iterator[None]:
        """Prepare a new repository there. See `Storage.initializing`."""
        self._call(wire.Begin())
        self._held = True  # The far end keeps others out as long as this very connection lives.
        try:
            yield
            self._call(wire.End())
        except BaseException:
            # Whatever is held there ends with the connection.
            self.close()
            raise
        finally:
            self._held = False

    def sweep(self) -> list[str]:
        """Have the far end remove what dead writers left there. See `Storage.sweep`."""
        return wire.split_lines(self._gather(wire.Sweep()))

    def close(self) -> None:
        """End the connection. See `Storage.close`."""
        with self._lock:
            self._closed = True
            link, self._link = self._link, None
        if link is not None:
            self._requests += link.connection.requests
            link.close()

    def list(self, prefix: str) -> Iterator[Entry]:
        """Names and sizes. See `Storage.list`."""
        raw = self._gather(wire.List(_named(prefix.rstrip("/")), sizes=True))
        for line in wire.split_lines(raw):
            size, _, name = line.partition(" ")
            if not size.isdecimal() or len(size) > 19:
                raise wire.ProtocolError("a listing without sizes")
            yield Entry(wire.check_name(name), int(size))

    def __del__(self) -> None:
        # Who drops a storage without closing it must not leave an ssh behind.
        if getattr(self, "_link", None) is not None:
            self.close()


def _named(name: str) -> str:
    if not wire.is_name(name):
        raise ValueError(f"not an object name: {name!r}")
    return name


def _bytes(connection: Connection, request: wire.Request, room: int) -> bytes:
    parts: list[bytes] = []
    connection.call(request, parts.append, room=room)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _digest(fd: int, size: int) -> bytes:
    import hashlib

    digest = hashlib.sha256()
    for offset in range(0, size, wire.PIECE):
        digest.update(os.pread(fd, min(wire.PIECE, size - offset), offset))
    return digest.digest()
