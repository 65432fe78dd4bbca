"""Secrets come from where the person said, and nowhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from imager.errors import CommandError, UsageError, WrongKey
from imager.repository import recovery_key
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


TYPED = recovery_key.encode(bytes(range(20)))
_ASK = """
import sys
from imager.errors import ImagerError
from imager.repository import recovery_key
from imager.repository.credentials import Credentials
try:
    one = Credentials()
    if sys.argv[1] == "recovery":
        secret = Credentials(recovery_key_file="-").obtain({"recovery", "passphrase"})
    elif sys.argv[1] == "only recovery":
        secret = one.obtain({"recovery"})
    else:
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
        ("recovery", [TYPED], bytes(range(20))),
        ("only recovery", [TYPED.lower()], bytes(range(20))),
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
    assert all(text.encode() not in shown for text in typed)


def test_without_a_terminal_nobody_is_asked(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    argv = [sys.executable, "-c", _ASK, "obtain", out]
    subprocess.run(argv, stdin=subprocess.DEVNULL, check=True, timeout=60)
    assert "no passphrase was given" in Path(out).read_text()


# --- the order, and the newer ways -------------------------------------------------------------------


KEY = TYPED


def test_the_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options, then the environment, then systemd; within each recovery key, keyfile, passphrase."""
    every = {"passphrase", "keyfile", "recovery"}
    (tmp_path / "imager.passphrase").write_text("by systemd\n")
    (tmp_path / "imager.keyfile").write_bytes(b"s" * 32)
    (tmp_path / "key").write_bytes(b"k" * 32)
    (tmp_path / "recovery").write_text(KEY)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert QUIET.obtain(every).value == b"s" * 32
    assert QUIET.obtain({"passphrase"}).value == b"by systemd"
    monkeypatch.setenv("IMAGER_PASSPHRASE", "by environment")
    assert QUIET.obtain(every).value == b"by environment"
    monkeypatch.setenv("IMAGER_KEYFILE", str(tmp_path / "key"))
    assert QUIET.obtain(every).value == b"k" * 32
    monkeypatch.setenv("IMAGER_RECOVERY_KEY", KEY)
    assert QUIET.obtain(every).value == bytes(range(20))
    (tmp_path / "words").write_text("by option\n")
    option = Credentials(passphrase_file=str(tmp_path / "words"), interactive=False)
    assert option.obtain(every).value == b"by option"
    assert option.obtain({"keyfile"}).value == b"k" * 32, "what has no slot is passed over"
    option = Credentials(
        passphrase_file=str(tmp_path / "words"),
        recovery_key_file=str(tmp_path / "recovery"),
        interactive=False,
    )
    assert option.obtain(every).kind == "recovery"


def test_a_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content, expected in ((b"words\n", b"words"), (b"words", b"words"), (b"words\r\n\n", b"words")):
        read, write = os.pipe()
        os.write(write, content)
        os.close(write)
        assert Credentials(passphrase_fd=read, interactive=False).obtain({"passphrase"}).value == expected
        os.close(read)
    for content in (b"two\nlines", b"\xff\xfe", b""):
        read, write = os.pipe()
        os.write(write, content)
        os.close(write)
        with pytest.raises(UsageError):
            Credentials(passphrase_fd=read, interactive=False).obtain({"passphrase"})
        os.close(read)
    with pytest.raises(UsageError, match="descriptor"):
        Credentials(passphrase_fd=read, interactive=False).obtain({"passphrase"})
    endless = os.open("/dev/zero", os.O_RDONLY)
    with pytest.raises(UsageError, match="more than"):
        Credentials(passphrase_fd=endless, interactive=False).obtain({"passphrase"})
    os.close(endless)
    monkeypatch.setenv("IMAGER_PASSPHRASE_FD", "three")
    with pytest.raises(UsageError, match="number"):
        QUIET.obtain({"passphrase"})


def test_a_new_secret_has_variables_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the passphrase that opens would silently become the new one."""
    monkeypatch.setenv("IMAGER_PASSPHRASE", "old")
    new = Credentials(prefix="IMAGER_NEW_", interactive=False)
    with pytest.raises(UsageError, match="no passphrase was given"):
        new.choose("passphrase")
    monkeypatch.setenv("IMAGER_NEW_PASSPHRASE", "new")
    assert new.choose("passphrase").value == b"new"
    monkeypatch.setenv("IMAGER_KEYFILE", str(tmp_path / "old"))
    with pytest.raises(UsageError, match="no keyfile named"):
        new.choose("keyfile", option="--new-keyfile")
    monkeypatch.setenv("IMAGER_NEW_KEYFILE", str(tmp_path / "new"))
    assert new.choose("keyfile").value == (tmp_path / "new").read_bytes()


def test_a_recovery_key_that_is_wrong_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IMAGER_RECOVERY_KEY", KEY[:-1] + ("0" if KEY[-1] != "0" else "1"))
    with pytest.raises(UsageError, match="group 8 of 8"):
        QUIET.obtain({"recovery", "passphrase"})
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    with pytest.raises(UsageError):
        Credentials(recovery_key_file=str(tmp_path / "binary"), interactive=False).obtain({"recovery"})
    with pytest.raises(WrongKey, match="no slot for a recovery key"):
        Credentials(recovery_key_file=str(tmp_path / "binary"), interactive=False).obtain({"keyfile"})
