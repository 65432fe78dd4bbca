"""Secrets come from where the person said, and nowhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from imager.errors import CommandError, UsageError, WrongKey
from imager.repository.credentials import Credentials

QUIET = Credentials(interactive=False)


def test_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "pass"
    file.write_text("from file\n")
    monkeypatch.setenv("IMAGER_PASSPHRASE_COMMAND", "printf '%s\\n' 'from  command'")
    assert QUIET.obtain({"passphrase"}).value == b"from  command"
    monkeypatch.setenv("IMAGER_PASSPHRASE_FILE", str(file))
    assert QUIET.obtain({"passphrase"}).value == b"from file"
    monkeypatch.setenv("IMAGER_PASSPHRASE", "from environment")
    assert QUIET.obtain({"passphrase"}).value == b"from environment"
    option = Credentials(passphrase_file=str(file), interactive=False)
    assert option.obtain({"passphrase", "keyfile"}).value == b"from file"


def test_a_keyfile_goes_first_where_there_is_a_slot_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"k" * 40)
    monkeypatch.setenv("IMAGER_KEYFILE", str(file))
    monkeypatch.setenv("IMAGER_PASSPHRASE", "words")
    assert QUIET.obtain({"passphrase", "keyfile"}).kind == "keyfile"
    assert QUIET.obtain({"passphrase"}).kind == "passphrase"
    monkeypatch.delenv("IMAGER_KEYFILE")
    with pytest.raises(WrongKey):
        QUIET.obtain({"keyfile"})


def test_a_keyfile_is_made_at_init_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    credentials = Credentials(keyfile=str(path), interactive=False)
    secret = credentials.choose("keyfile")
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(secret.value) == 64 and secret.value == path.read_bytes()
    assert credentials.choose("keyfile") == secret == credentials.obtain({"keyfile"})
    with pytest.raises(UsageError):
        QUIET.choose("keyfile")
    with pytest.raises(UsageError):
        Credentials(keyfile=str(tmp_path / "no" / "such" / "folder")).choose("keyfile")


def test_nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WrongKey) as caught:
        QUIET.obtain({"passphrase"})
    assert "IMAGER_PASSPHRASE_FILE" in (caught.value.hint or "")
    with pytest.raises(UsageError):
        QUIET.choose("passphrase")
    monkeypatch.setenv("IMAGER_PASSPHRASE", "")
    with pytest.raises(UsageError, match="empty"):
        QUIET.obtain({"passphrase"})


def test_what_cannot_be_read(tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.write_text("one\ntwo\n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\n")
    for path in (str(two), str(binary), str(tmp_path / "missing"), str(tmp_path)):
        with pytest.raises(UsageError):
            Credentials(passphrase_file=path, interactive=False).obtain({"passphrase"})
    with pytest.raises(UsageError):
        Credentials(passphrase_command="'unbalanced", interactive=False).obtain({"passphrase"})
    with pytest.raises(CommandError):
        Credentials(passphrase_command="false", interactive=False).obtain({"passphrase"})


_ASK = """
import sys
from imager.errors import ImagerError
from imager.repository.credentials import Credentials
try:
    one = Credentials()
    secret = one.choose("passphrase") if sys.argv[1] == "choose" else one.obtain({"passphrase"})
    open(sys.argv[2], "wb").write(secret.value)
except ImagerError as error:
    open(sys.argv[2], "w").write(error.message)
"""


@pytest.mark.parametrize(
    ("what", "typed", "result"),
    [
        ("obtain", ["geheim"], b"geheim"),
        ("choose", ["geheim", "geheim"], b"geheim"),
        ("choose", ["geheim", "gehiem"], b"the two passphrases differ"),
    ],
)
def test_a_person_at_a_terminal_is_asked(tmp_path: Path, what: str, typed: list[str], result: bytes) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", _ASK, what, str(tmp_path / "out")])
    shown = b""
    for text in typed:
        while not shown.endswith(b": "):
            shown += os.read(terminal, 1000)
        os.write(terminal, text.encode() + b"\n")
        shown += b"\n"
    while True:
        try:
            more = os.read(terminal, 1000)
        except OSError:
            break
        if not more:
            break
        shown += more
    os.waitpid(pid, 0)
    os.close(terminal)
    assert (tmp_path / "out").read_bytes() == result
    assert b"geheim" not in shown


def test_without_a_terminal_nobody_is_asked(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    argv = [sys.executable, "-c", _ASK, "obtain", out]
    subprocess.run(argv, stdin=subprocess.DEVNULL, check=True, timeout=60)
    assert "no passphrase was given" in Path(out).read_text()
