"""A repository on another machine, reached with the system's ssh.

Invariant: what a person writes in an address never becomes an option of ssh or
a word of a shell: the argument vector is fixed, user, host and port have their
form checked and stand where only they can stand, and the path travels in the
protocol. All threads share one connection; a lost one is made again by the next call.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote

from msgspec import Struct

from imager import command
from imager.errors import CommandError, StorageError, UsageError
from imager.storage import wire
from imager.storage.base import Entry, Staged
from imager.storage.connection import Connection, Lost, Sink
from imager.storage.errors import Unavailable
from imager.storage.spool import Spool, temporary, write_at
from imager.storage.ssh_errors import explain

# No `--` is needed for what these let through, and it is given all the same.
_URL = re.compile(
    r"ssh://(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63})@)?"
    r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}|\[[0-9A-Fa-f:.]{2,45}(?:%25[A-Za-z0-9_.-]{1,20})?\])"
    r"(?::(?P<port>[0-9]{1,5}))?(?P<path>/.*)"
)
_MAX_LISTING = 512 << 20
"Bytes of a listing: five million objects."
_REMOTE = re.compile(r"[A-Za-z0-9_./~-]{1,255}")
_OPTIONS = (
    # No terminal, no forwarding of anything; a network that is silently gone is noticed within a minute.
    *("-T", "-a", "-x", "-oClearAllForwardings=yes"),
    *("-oServerAliveInterval=15", "-oServerAliveCountMax=4"),
)


class Address(Struct, frozen=True):
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
        # Of `remote` every character is safe for a shell, and a tilde is for it to read.
        return [*argv, "--", self.host, f"{remote} serve --stdio"]


class _Link:
    """A running ssh with the connection through it."""

    def __init__(self, address: Address, *, unattended: bool) -> None:
        """Connect. Raises `Unavailable` where a later attempt may succeed, `StorageError`."""
        self.address = address
        try:
            self.ssh = command.Piped(
                address.argv(unattended=unattended), hint="install OpenSSH's client (package openssh-client)"
            )
        except CommandError as error:
            raise StorageError(error.message, hint=error.hint) from error
        self.connection = Connection(self.ssh.stdout, self.ssh.stdin, ended=self._ended)
        try:
            self.served = self.connection.open(address.path)
        except BaseException:
            self.ssh.kill()
            self.close()
            raise

    def _ended(self) -> StorageError:
        code = self.ssh.wait(10)
        return explain(self.address.host, code, self.ssh.said())

    def close(self) -> None:
        """End it; calls that are under way get `Lost`."""
        if self.connection.lost:
            self.ssh.kill()  # Or somebody could be writing to it for ever.
        # Descriptors are closed when no thread uses them any more: their numbers may soon be those of files.
        self.connection.close()
        self.ssh.hang_up()
        if not self.connection.join(5):
            self.ssh.kill()
            self.connection.join(60)
        self.ssh.end()


class SshStorage:
    """The objects of a folder on another machine. See `Storage`.

    A call whose connection is lost raises `Unavailable`; the next call makes a new
    connection. `imager.storage.retry` knows what is safe to repeat, and how often.
    """

    local = False

    def __init__(self, url: str) -> None:
        """Nothing is connected until the first call. Raises `UsageError`."""
        self.url = url
        self.address = Address.parse(url)
        self._spool = Spool(self._upload, self.read)
        self._in_flight = threading.BoundedSemaphore(wire.MAX_IN_FLIGHT)
        self._lock = threading.Lock()
        self._link: _Link | None = None
        self._closed = False
        self._making = False
        self._attempts = 0
        self._failure: StorageError | None = None
        self._requests = 0
        self._mode: str | None = None
        self.connections = 0
        "How many connections were made so far."

    @classmethod
    def connect(cls, url: str) -> SshStorage:
        """The storage at an `ssh://` URL, connected with its first call. Raises `UsageError`."""
        return cls(url)

    @property
    def requests(self) -> int:
        """How many answers of the far end were waited for so far, those that begin a connection included."""
        link = self._link
        return self._requests + (link.connection.requests if link else 0)

    @property
    def append_only(self) -> bool:
        """Whether the far end refuses to remove anything. Raises `StorageError` where it cannot be asked."""
        if self._mode is None:
            self._connected()
        return self._mode != "full"

    @property
    def pid(self) -> int | None:
        """The process of the ssh that runs now."""
        return self._link.ssh.pid if self._link else None

    # --- the connection ------------------------------------------------------------------

    def _connected(self) -> Connection:
        """A connection that is not known to be lost. Raises `Unavailable`, `StorageError`."""
        link = self._link
        if link is not None and not link.connection.lost:
            return link.connection
        attempts = self._attempts
        with self._lock:
            if self._closed:
                raise StorageError(f"the connection to {self.address.host} is closed")
            if self._link is not None and not self._link.connection.lost:
                return self._link.connection
            if attempts != self._attempts and self._failure is not None:
                raise self._failure  # Another thread has tried while this one waited: that will do.
            self._drop()
            self._attempts += 1
            try:
                # Only the first time may ssh ask for something: nobody may be there any more later on.
                self._link = _Link(self.address, unattended=self.connections > 0)
            except StorageError as error:
                self._failure = error
                if not self.connections and isinstance(error, Unavailable):
                    # Nothing has been lost yet, and the address may be wrong: to wait would not help.
                    raise StorageError(error.message, hint=error.hint) from error
                raise
            self._failure = None
            self._mode = self._link.served.mode
            self.connections += 1
            return self._link.connection

    def _drop(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            self._requests += link.connection.requests
            link.close()

    def _call(
        self,
        request: wire.Request,
        sink: Sink | None = None,
        *,
        room: int = wire.MAX_OBJECT,
        body: bytes = b"",
    ) -> int | None:
        with self._in_flight:
            try:
                return self._connected().call(request, sink, room=room, body=body)
            except Lost as error:
                raise self._lost(error) from error

    def _lost(self, error: Lost) -> StorageError:
        if not self._making:
            return error
        return StorageError(
            f"the connection was lost while a repository was being made: {error.message}",
            hint="run imager init again",
        )

    def _gather(self, request: wire.Request, *, room: int = wire.MAX_OBJECT) -> bytes:
        """The bytes of an answer."""
        parts: list[bytes] = []
        self._call(request, parts.append, room=room)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # --- reading ------------------------------------------------------------------------

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of an object. See `Storage.read`."""
        room = wire.MAX_OBJECT if length is None else length
        return self._gather(wire.Read(_named(name), offset, length), room=room)

    def open(self, name: str) -> int:
        """A descriptor of a temporary copy. See `Storage.open`."""
        fd = temporary()
        at = 0

        def keep(data: bytes) -> None:
            nonlocal at
            write_at(fd, data, at)
            at += len(data)

        try:
            self._call(wire.Read(_named(name)), keep)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def size(self, name: str) -> int:
        """Length in bytes. See `Storage.size`."""
        return self._call(wire.Size(_named(name))) or 0

    def exists(self, name: str) -> bool:
        """Whether there is such an object. See `Storage.exists`."""
        return bool(self._call(wire.Exists(_named(name))))

    def list_names(self, prefix: str) -> list[str]:
        """Names below a folder. See `Storage.list_names`."""
        raw = self._gather(wire.List(_folder(prefix)), room=_MAX_LISTING)
        return [_within(prefix, name) for name in wire.split_lines(raw)]

    def free_space(self) -> int | None:
        """Bytes that can still be stored there. See `Storage.free_space`."""
        return self._call(wire.Space())

    def strangers(self) -> list[str]:
        """What is there and no repository's. See `Storage.strangers`."""
        return wire.split_lines(self._gather(wire.Strangers(), room=wire.PIECE))

    # --- writing ------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> None:
        """Make an object. See `Storage.create`."""
        if len(data) <= wire.PIECE:
            self._call(wire.Create(_named(name)), body=data)
            return
        staged = self.stage()
        try:
            write_at(staged.fd, data, 0)
            staged.publish(name)
        finally:
            staged.discard()

    def stage(self) -> Staged:
        """Begin an object in a local file without a name. See `Storage.stage`."""
        return self._spool.stage()

    def _upload(self, name: str, fd: int, size: int) -> None:
        _named(name)
        with self._in_flight:
            try:
                self._connected().upload(fd, size, name)
            except Lost as error:
                raise self._lost(error) from error

    def move(self, name: str, target: str) -> None:
        """Rename. See `Storage.move`."""
        self._call(wire.Move(_named(name), _named(target)))

    def delete(self, name: str) -> None:
        """Remove. See `Storage.delete`."""
        self._call(wire.Delete(_named(name)))

    @contextmanager
    def initializing(self) -> Iterator[None]:
        """Prepare a new repository there. See `Storage.initializing`."""
        self._call(wire.Begin())
        self._making = True  # The far end keeps others out as long as this very connection lives.
        try:
            yield
        finally:
            self._making = False
            try:
                self._call(wire.End())
            except StorageError:
                pass  # Then the connection is lost, and with it ended what it held.

    def sweep(self) -> list[str]:
        """Have the far end remove what dead writers left there. See `Storage.sweep`."""
        return wire.split_lines(self._gather(wire.Sweep()))

    def close(self) -> None:
        """End the connection. See `Storage.close`."""
        with self._lock:
            self._closed = True
            self._drop()

    def __del__(self) -> None:
        # Who drops a storage without closing it must not leave an ssh behind.
        if getattr(self, "_link", None) is not None:
            self.close()

    def list(self, prefix: str) -> Iterator[Entry]:
        """Names and sizes. See `Storage.list`."""
        raw = self._gather(wire.List(_folder(prefix), sizes=True), room=_MAX_LISTING)
        for line in wire.split_lines(raw):
            size, _, name = line.partition(" ")
            if not size.isdecimal() or len(size) > 19:
                raise wire.ProtocolError("a listing without sizes")
            yield Entry(_within(prefix, name), int(size))


def _within(prefix: str, name: str) -> str:
    """A name of the far end's listing of `prefix`. Raises `ProtocolError`."""
    folder = prefix.rstrip("/")
    if folder and not name.startswith(folder + "/"):
        raise wire.ProtocolError(f"a listing of {folder} that names {wire.printable(name, 100)}")
    return wire.check_name(name)


def _named(name: str) -> str:
    if not wire.is_name(name):
        raise ValueError(f"not an object name: {name!r}")
    return name


def _folder(prefix: str) -> str:
    return _named(prefix.rstrip("/")) if prefix else ""
