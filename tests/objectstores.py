"""Object stores for the tests: real S3 servers on loopback, and a door in front of them that makes trouble.

`s3s-fs` keeps objects on disk and knows conditional writes, but decides them in two steps: of
two writers that race for a name both can win. The `Door` lets one writer of a name in at a
time, which makes the promise whole; without it, the server shows what `imager doctor` is
for. `moto` is a second server, by other people. `./dev` installs both.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import re
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

KEY, SECRET = "imagertests", "imager-tests-secret"
BUCKET = "imager-tests"
NO_SERVER = "s3s-fs is not installed (./dev test builds it where the Rust compiler is new enough)"

Action = tuple[str, int | float]
"""What the door does to a request: ("status", 503), ("locked", 403) as for an object that is locked,
("drop", 0) before it reaches the server, ("lose", 0) after it did, ("truncate", n) the answer after n
bytes, ("delay", seconds)."""


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def _process(argv: list[str], port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server process that ends with us, once it takes connections."""
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=out, preexec_fn=_die_with_parent)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def s3s_program() -> str | None:
    return shutil.which("s3s-fs", path=f"{os.environ['PATH']}:{Path.home()}/.cargo/bin")


@contextmanager
def s3s(folder: Path) -> Iterator[str]:
    """An s3s-fs server over `folder`: its endpoint. The bucket is there."""
    program = s3s_program()
    assert program is not None, NO_SERVER
    (folder / "objects" / BUCKET).mkdir(parents=True)
    port = free_port()
    argv = [program, "--host", "127.0.0.1", "--port", str(port), "--access-key", KEY, "--secret-key", SECRET]
    with _process([*argv, str(folder / "objects")], port, folder / "s3s.log"):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def moto(folder: Path, *, locking: bool = False) -> Iterator[str]:
    """A moto server: its endpoint. The bucket is there; `locking`: it keeps versions, and can lock them."""
    port = free_port()
    program = "from moto.server import main; main()"
    argv = [sys.executable, "-c", program, "-H", "127.0.0.1", "-p", str(port)]
    with _process(argv, port, folder / "moto.log"):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        # It asks for no signature, only for the form of one.
        form = f"AWS4-HMAC-SHA256 Credential={KEY}/20260101/us-east-1/s3/aws4_request, Signature=0"
        headers = {"Authorization": form}
        if locking:
            headers["x-amz-bucket-object-lock-enabled"] = "true"
        connection.request("PUT", f"/{BUCKET}", headers=headers)
        assert connection.getresponse().status == 200
        connection.close()
        yield f"http://127.0.0.1:{port}"


@dataclass
class Door:
    """A proxy before an S3 server. `rule(number, method, key)` says what to do to a request, None: nothing.

    `counts` by method and `requests` (method, key) tell what came. `exclusive`: one writer of a
    name at a time.
    """

    server: str
    exclusive: bool = True
    rule: Callable[[int, str, str], Action | None] | None = None
    counts: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, str]] = field(default_factory=list)
    endpoint: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    names: dict[str, threading.Lock] = field(default_factory=lambda: defaultdict(threading.Lock))

    def forget(self) -> None:
        """Begin anew: no rule, no counts."""
        self.rule = None
        self.counts.clear()
        self.requests.clear()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    door: Door

    def log_message(self, *_: object) -> None:
        pass

    def _any(self) -> None:
        door = self.door
        length = int(self.headers.get("content-length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            self._cut()  # The client died in the middle: the server never hears of it.
            return
        key = self.path.partition("?")[0].removeprefix(f"/{BUCKET}").lstrip("/")
        with door.lock:
            number = sum(door.counts.values())
            door.counts[self.command] += 1
            door.requests.append((self.command, key))
            writing = door.names[key]
        what, value = (door.rule(number, self.command, key) if door.rule else None) or ("", 0)
        if what == "delay":
            time.sleep(value)
        if what == "drop":
            self._cut()
            return
        if what in ("status", "locked"):
            codes = {
                503: "SlowDown",
                500: "InternalError",
                409: "ConditionalRequestConflict",
                403: "AccessDenied",
            }
            code = codes.get(int(value), "Strange")
            said = (
                "as the test wishes"
                if what == "status"
                else "Access Denied because object protected by object lock."
            )
            text = f"<Error><Code>{code}</Code><Message>{said}</Message></Error>".encode()
            self._answer(int(value), [("content-type", "application/xml")], text, len(text))
            return
        if self.command == "PUT" and door.exclusive:
            with writing:
                status, headers, answer = self._forward(body)
        else:
            status, headers, answer = self._forward(body)
        if what == "lose":
            self._cut()
            return
        sent = len(answer) if what != "truncate" else min(int(value), len(answer))
        self._answer(status, headers, answer, sent)
        if sent < len(answer):
            self._cut()

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _any

    def _cut(self) -> None:
        """Break the connection, as a cable would."""
        self.close_connection = True
        linger = (1).to_bytes(4, "little") + bytes(4)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        host = self.door.server.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=120)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            if self.headers.get("x-amz-checksum-sha256"):
                # S3 is content with the checksum; moto wants to be told of it in advance.
                connection.putheader("x-amz-sdk-checksum-algorithm", "SHA256")
            try:
                connection.endheaders(body)
            except (BrokenPipeError, ConnectionResetError):
                pass  # It has answered before it had all of the body.
            answer = connection.getresponse()
            headers = [
                (n, v) for n, v in answer.getheaders() if n.lower() not in ("connection", "transfer-encoding")
            ]
            return answer.status, headers, answer.read()
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, sent: int) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # The client went away: that is what some tests are about.


@contextmanager
def open_door(server: str, *, exclusive: bool = True) -> Iterator[Door]:
    door = Door(server, exclusive)
    handler = type("Handler", (_Handler,), {"door": door})
    with _Server(("127.0.0.1", 0), handler) as proxy:
        door.endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield door
        finally:
            proxy.shutdown()


def environment(endpoint: str) -> dict[str, str]:
    """What an S3 client of this machine is told."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }


@dataclass
class Store:
    """A place of its own in an object store, reached through a door."""

    url: str
    door: Door
    objects: Path | None
    "Where the server keeps the objects of this place; None for one that keeps them in memory."


def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)


@contextmanager
def place(door: Door, folder: Path | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A new prefix, and the environment that leads to it."""
    _clean(monkeypatch)
    for name, value in environment(door.endpoint).items():
        monkeypatch.setenv(name, value)
    door.forget()
    prefix = re.sub(r"\W", "", os.urandom(6).hex())
    yield Store(
        f"s3://{BUCKET}/{prefix}/r", door, folder / "objects" / BUCKET / prefix / "r" if folder else None
    )
    door.forget()


@pytest.fixture(scope="session")
def s3s_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Door, Path]]:
    """The S3 server of the tests, for all of them."""
    if s3s_program() is None:
        pytest.skip(NO_SERVER)
    folder = tmp_path_factory.mktemp("s3s")
    with s3s(folder) as server, open_door(server) as door:
        yield door, folder


@pytest.fixture(scope="session")
def moto_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """Another S3 server."""
    with moto(tmp_path_factory.mktemp("moto")) as server, open_door(server) as door:
        yield door


@pytest.fixture
def s3(s3s_door: tuple[Door, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A place in an object store that keeps its promises."""
    with place(*s3s_door, monkeypatch) as store:
        yield store


@pytest.fixture
def other_s3(moto_door: Door, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The same in the other server."""
    with place(moto_door, None, monkeypatch) as store:
        yield store


@pytest.fixture(scope="session")
def locking_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """A server whose bucket keeps versions, and locks each for three days from its upload on."""
    from imager.storage.object_versions import ObjectVersions

    with moto(tmp_path_factory.mktemp("locking"), locking=True) as server, open_door(server) as door:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment(door.endpoint).items():
                patch.setenv(name, value)
            # This server wants the bucket to be empty for that, as S3 does not.
            ObjectVersions.connect(f"s3://{BUCKET}").lock_at_upload("GOVERNANCE", 3)
        yield door


@pytest.fixture
def locking_s3(locking_door: Door, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A place in a bucket that keeps versions and locks them."""
    with place(locking_door, None, monkeypatch) as store:
        yield store


@pytest.fixture
def careless_s3(s3s_door: tuple[Door, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store where two writers that race for a name can both win."""
    door, folder = s3s_door
    door.exclusive = False
    try:
        with place(door, folder, monkeypatch) as store:
            yield store
    finally:
        door.exclusive = True


def main(folder: Path, bucket: str, locking: bool = False) -> None:
    """A server for a shell (`python -m tests.objectstores FOLDER BUCKET [locking]`), by FOLDER/env."""
    global BUCKET
    BUCKET = bucket
    folder.mkdir(parents=True, exist_ok=True)
    if locking:
        server = moto(folder, locking=True)
    else:
        server = s3s(folder) if s3s_program() else moto(folder)
    with server as endpoint, open_door(endpoint) as door:
        lines = [f"export {name}={value}" for name, value in environment(door.endpoint).items()]
        (folder / "env.new").write_text("\n".join(lines) + "\n")
        (folder / "env.new").rename(folder / "env")
        _die_with_parent()
        signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["locking"])
