"""Each way in which a machine cannot be reached is told in its own words, at once, with a hint."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from imager.errors import StorageError, UsageError
from imager.storage import wire
from imager.storage.errors import Unavailable
from imager.storage.retry import Retrying
from imager.storage.ssh import Address, SshStorage
from tests.cli.conftest import Imager
from tests.sshd import Client, Sshd, free_port, script


def refused(imager: Imager, url: str, *, code: int = 1, **env: str) -> tuple[str, str]:
    """(message, hint) of a verb that cannot reach its repository."""
    ended = imager("-r", url, "list", "--json", env=env)
    assert ended.code == code and ended.out == "", ended
    error = ended.error
    assert error["hint"] and not error["message"].endswith(".")
    return error["message"], error["hint"]


def test_no_ssh_program(imager: Imager, sshd: Sshd) -> None:
    message, hint = refused(imager, sshd.url("/srv/r"), IMAGER_SSH="/nonexistent/ssh")
    assert "/nonexistent/ssh is not installed" in message and "openssh-client" in hint


def test_unknown_host(imager: Imager) -> None:
    message, hint = refused(imager, "ssh://no-such-host.invalid/srv/r")
    assert "the host no-such-host.invalid is not known" in message and "ssh/config" in hint
    assert "Could not resolve hostname" in message, "ssh's own words"


def test_refused(imager: Imager) -> None:
    message, _ = refused(imager, f"ssh://127.0.0.1:{free_port()}/srv/r")
    assert "refuses the connection" in message and "Connection refused" in message


def test_nobody_lets_us_in(imager: Imager, sshd: Sshd, tmp_path: Path) -> None:
    stranger = sshd.client("stranger")
    lines = sshd.authorized.read_text().splitlines(keepends=True)
    sshd.authorized.write_text("".join(lines[:-1]))
    message, hint = refused(imager, sshd.url("/srv/r"), **stranger.environment)
    assert "did not let us in" in message and "Permission denied" in message
    assert "agent" in hint


def test_unknown_host_key(imager: Imager, sshd: Sshd, tmp_path: Path) -> None:
    """Nobody is asked where nobody is: the key must be known."""
    config = tmp_path / "config"
    config.write_text(
        "UserKnownHostsFile /dev/null\nGlobalKnownHostsFile /dev/null\nStrictHostKeyChecking yes\n"
    )
    ssh = script(tmp_path / "ssh", f'exec ssh -F "{config}" "$@"')
    message, hint = refused(imager, sshd.url("/srv/r"), IMAGER_SSH=str(ssh))
    assert "the host key of 127.0.0.1 is not known" in message and "fingerprint" in hint


def test_changed_host_key(imager: Imager, sshd: Sshd, owner: Client, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    known = tmp_path / "known"
    known.write_text(f"[127.0.0.1]:{sshd.port} {other.with_suffix('.pub').read_text()}")
    ssh = script(tmp_path / "ssh", f'exec ssh -F "{owner.config}" -oUserKnownHostsFile="{known}" "$@"')
    message, hint = refused(imager, sshd.url("/srv/r"), IMAGER_SSH=str(ssh))
    assert "is not the one that is known" in message and "ssh-keygen -R" in hint


def test_no_imager_there(imager: Imager, sshd: Sshd) -> None:
    message, hint = refused(imager, sshd.url("/srv/r"), IMAGER_REMOTE="/opt/imager/bin/imager")
    assert "imager cannot be run on 127.0.0.1" in message and "IMAGER_REMOTE" in hint
    assert "/opt/imager/bin/imager" in message


@pytest.mark.parametrize(
    ("forced", "words"),
    [
        ("echo Welcome to this machine", ["Welcome to this ma"]),
        ("echo Hi; sleep 9", ["'Hi'"]),
        ("cat", ["no answer"]),
        ("true", ["ended with code 0"]),
        ("echo no >&2; exit 3", ["ended with code 3 (no)"]),
        ("cat {folder}/newer; cat", ["speaks versions 3 to 7"]),
        ("kill -9 $$", ["broke"]),
    ],
    ids=["banner", "greeting", "echo", "nothing", "failure", "version", "killed"],
)
def test_something_else_answers(imager: Imager, sshd: Sshd, forced: str, words: list[str]) -> None:
    (sshd.folder / "newer").write_bytes(wire.preamble((3, 7)))
    client = sshd.client("odd", command=forced.format(folder=sshd.folder))
    message, _ = refused(imager, sshd.url("/srv/r"), **client.environment)
    for word in words:
        assert word in message


def test_no_repository_there(imager: Imager, sshd: Sshd) -> None:
    url = sshd.url(sshd.served / "none")
    message, hint = refused(imager, url, code=10)
    assert url in message and f"imager init {url}" in hint


@pytest.mark.parametrize(
    "url",
    [
        "ssh://",
        "ssh:///srv/r",
        "ssh://host",
        "ssh://host/",
        "ssh://host/~/",
        "ssh://host:0/r",
        "ssh://host:99999/r",
        "ssh://host:22x/r",
        "ssh://-oProxyCommand=touch%20x/r",
        "ssh://-oProxyCommand=x@host/r",
        "ssh://user:word@host/r",
        "ssh://a b@host/r",
        "ssh://ho;st/r",
        "ssh://ho$(x)st/r",
        "ssh://host%0a/r",
        "ssh://host/a%0ab",
        "ssh://host/a%00b",
        "ssh://[::1/r",
        "ssh://[-oProxyCommand]/r",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        SshStorage.connect(url)
    assert caught.value.hint and "word" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "words", "path"),
    [
        ("ssh://host/srv/r", ["--", "host"], "/srv/r"),
        ("ssh://me@host:22/srv/a%20b?#", ["-p", "22", "-l", "me", "--", "host"], "/srv/a b?#"),
        ("ssh://host/~/r", ["--", "host"], "~/r"),
        ("ssh://[2001:db8::1]:2222/r", ["-p", "2222", "--", "2001:db8::1"], "/r"),
        ("ssh://[fe80::1%25eth0]/r", ["--", "fe80::1%eth0"], "/r"),
        ("ssh://host/-oProxyCommand=x", ["--", "host"], "/-oProxyCommand=x"),
    ],
)
def test_the_argument_vector(url: str, words: list[str], path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("IMAGER_SSH", "IMAGER_REMOTE"):
        monkeypatch.delenv(name, raising=False)
    address = Address.parse(url)
    argv = address.argv(unattended=False)
    assert argv[0] == "ssh" and argv[-1 - len(words) : -1] == words
    assert argv[-1] == "imager serve --stdio"
    assert address.path == path and not any(path in word for word in argv)
    assert "-oBatchMode=yes" not in argv
    assert "-oBatchMode=yes" in address.argv(unattended=True)


@pytest.mark.parametrize("remote", ["-x", "a b", "x;y", "$(x)", "imager --restrict"])
def test_the_far_program_is_a_path(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGER_REMOTE", remote)
    with pytest.raises(UsageError, match="IMAGER_REMOTE"):
        Address.parse("ssh://host/r").argv(unattended=False)


def test_a_home_folder(sshd: Sshd, owner: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    owner.use(monkeypatch)
    storage = SshStorage.connect(sshd.url("/~/no-such-folder-of-imager"))
    assert not storage.exists("config") and storage.strangers() == []
    storage.close()


def test_a_far_end_that_talks_nonsense_later(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server that greets well and then sends what it should not: an error each time, and no hanging."""
    program = tmp_path / "liar.py"
    program.write_text(
        "import os, sys\n"
        "from imager.storage import wire\n"
        "reader, writer = wire.FrameReader(0), wire.FrameWriter(1)\n"
        "writer.raw(wire.preamble()); reader.preamble()\n"
        "first = reader.frame()\n"
        "writer.frame(first.number, wire.Answer(), wire.encode(wire.Served('0', 'full')))\n"
        "asked = reader.frame()\n"
        "what = sys.argv[1]\n"
        "if what == 'noise': writer.raw(b'\\xff' * 5000)\n"
        "if what == 'nobody': writer.frame(4711, wire.Answer())\n"
        "if what == 'long':\n"
        "    for _ in range(50): writer.frame(asked.number, wire.Answer(more=True), bytes(1 << 20))\n"
        "if what == 'names': writer.frame(asked.number, wire.Answer(), b'../../etc/passwd\\n')\n"
        "if what == 'bytes': writer.frame(asked.number, wire.Answer(), b'unasked')\n"
        "said = wire.Failure('x', 'a\\x1b[2Jb')\n"
        "if what == 'steering': writer.frame(asked.number, wire.Answer(error=said))\n"
        "sys.stdin.buffer.read()\n"
    )
    for what in ("noise", "nobody", "long", "names", "bytes", "steering"):
        sshd.client("liar", command=f"{sys.executable} {program} {what}").use(monkeypatch)
        storage = SshStorage.connect(sshd.url("/srv/r"))
        with pytest.raises(StorageError) as caught:
            if what == "names":
                storage.list_names("sets/")
            elif what == "bytes":
                storage.exists("config")
            else:
                storage.read("config", 0, 100)
        if what == "steering":
            assert caught.value.message == "a [2Jb"
        else:
            assert isinstance(caught.value, wire.ProtocolError), what
        storage.close()


def test_what_waiting_may_mend(sshd: Sshd, owner: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt fails at once; a connection that was there and cannot be made again may come back."""
    owner.use(monkeypatch)
    url = sshd.url(sshd.served / "waiting")
    pauses: list[float] = []
    sshd.stop()
    try:
        with pytest.raises(StorageError, match="refuses") as caught:
            Retrying(SshStorage.connect(url), sleep=pauses.append).exists("config")
        assert not isinstance(caught.value, Unavailable) and not pauses
        sshd.start()
        storage = SshStorage.connect(url)
        assert not storage.exists("config")
        sshd.hang_up()
        sshd.stop()

        def wait(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 3:
                sshd.start()

        assert not Retrying(storage, sleep=wait).exists("config")
        assert len(pauses) >= 3 and storage.connections == 2
        storage.close()
    finally:
        if not sshd.running:
            sshd.start()
