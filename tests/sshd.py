"""OpenSSH's own server on loopback, with keys of its own, as the user who runs the tests.

Nothing of the machine's ssh is touched: the server has its own configuration,
host key and authorized_keys, and the client is run with a configuration of its
own through `IMAGER_SSH`.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/sbin:/usr/bin")


def free_port() -> int:
    """A port of loopback that nobody listens to now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


class Sshd:
    """A running server. `client(...)` makes a client that it knows."""

    def __init__(self, folder: Path) -> None:
        assert SSHD, "openssh-server is missing: ./dev test installs it"
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        self.served = folder / "served"
        self.served.mkdir()
        self.authorized = folder / "authorized_keys"
        self.authorized.touch()
        self.known = folder / "known_hosts"
        self.imager = script(folder / "imager", f'exec "{sys.executable}" -m imager "$@"')
        self.new_key("host_key")
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.start()

    def new_key(self, name: str) -> Path:
        path = self.folder / name
        path.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
        return path

    def start(self) -> None:
        """Listen; at the same port as before where there was one."""
        if os.geteuid() == 0:
            os.makedirs(
                "/run/sshd", 0o755, exist_ok=True
            )  # sshd asks for it; the package's service makes it.
        for _ in range(5):
            self.port = self.port or free_port()
            config = self.folder / "sshd_config"
            config.write_text(
                f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder}/host_key\n"
                f"AuthorizedKeysFile {self.authorized}\nStrictModes no\nUsePAM no\nPidFile none\n"
                "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin yes\n"
                f"SetEnv PATH={self.folder}:/usr/bin:/bin\nMaxStartups 100\nLogLevel VERBOSE\n"
            )
            log = (self.folder / "sshd.log").open("ab")
            # With this process its server ends, however this process ends.
            argv = ["setpriv", "--pdeathsig", "TERM", "--", str(SSHD), "-D", "-e", "-f", str(config)]
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            log.close()
            if self._listens():
                break
            self.stop()
            self.port = 0
        else:
            pytest.fail((self.folder / "sshd.log").read_text())
        host_key = (self.folder / "host_key.pub").read_text()
        self.known.write_text(f"[127.0.0.1]:{self.port} {host_key}")

    def _listens(self) -> bool:
        assert self._process is not None
        for _ in range(200):
            if self._process.poll() is not None:
                return False
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return True
            except OSError:
                time.sleep(0.05)
        return False

    def stop(self) -> None:
        """Listen no more. Connections that are there go on."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None

    @property
    def running(self) -> bool:
        return self._process is not None

    def busy(self) -> bool:
        """Whether it serves somebody."""
        assert self._process is not None
        return bool(_children(self._process.pid))

    def hang_up(self) -> None:
        """Kill the processes that serve a connection."""
        assert self._process is not None
        for pid in _children(self._process.pid):
            for one in (*_children(pid), pid):
                if _name(one).startswith("sshd"):
                    os.kill(one, signal.SIGKILL)

    def url(self, path: Path | str) -> str:
        return f"ssh://{pwd.getpwuid(os.geteuid()).pw_name}@127.0.0.1:{self.port}{path}"

    def client(self, name: str, *, forced: str | None = None, command: str | None = None) -> Client:
        """A client with a key of its own.

        `forced`: options of `imager serve` that its key is bound to; or any other `command`.
        """
        key = self.new_key(name)
        public = key.with_suffix(".pub").read_text()
        command = f"{self.imager} serve {forced}" if forced is not None else command
        options = f'command="{command}",restrict ' if command else ""
        with self.authorized.open("a") as file:
            file.write(options + public)
        return Client(self, key)


class Client:
    """A key, and an ssh that uses it."""

    def __init__(self, server: Sshd, key: Path) -> None:
        self.server = server
        self.config = key.with_suffix(".config")
        self.config.write_text(
            f"Host *\n  IdentityFile {key}\n  IdentitiesOnly yes\n  IdentityAgent none\n"
            f"  UserKnownHostsFile {server.known}\n  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n"
        )
        self.ssh = script(key.with_suffix(".ssh"), f'exec ssh -F "{self.config}" "$@"')

    @property
    def environment(self) -> Mapping[str, str]:
        return {"IMAGER_SSH": str(self.ssh)}

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let storages of this process use it."""
        monkeypatch.setenv("IMAGER_SSH", str(self.ssh))


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    server = Sshd(tmp_path_factory.mktemp("sshd"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def owner(sshd: Sshd) -> Client:
    """A client with a shell: it may run what it likes, and runs `imager serve --stdio`."""
    return sshd.client("owner")
