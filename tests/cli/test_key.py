"""`imager key`: from the command line, as people with each kind of key use it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from imager import errors
from tests.cli.test_contract import field_names


@pytest.fixture
def sealed(imager, image: Path, tmp_path: Path):
    """A repository that a passphrase opens, with one set: a way to run commands on it."""
    (tmp_path / "words").write_text("correct horse\n")
    place = tmp_path / "sealed"
    imager.ok("init", place, "--passphrase-file", tmp_path / "words")
    owner = ("-r", place, "--passphrase-file", tmp_path / "words")
    imager.ok(*owner, "backup", image, "--name", "disk")
    return owner


def slots(imager, owner) -> dict[str, dict]:
    return {slot["label"]: slot for slot in imager.ok(*owner, "key", "list", "--json").document["slots"]}


def test_a_host_that_can_only_back_up(imager, sealed, image: Path, tmp_path: Path) -> None:
    key, host = tmp_path / "host.key", os.uname().nodename
    added = imager.ok(*sealed, "key", "add", "--role", "write", "--host", host, "--new-keyfile", key)
    assert f"({host}): keyfile, role write" in added.out
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    writer = ("-r", sealed[1], "--keyfile", key)
    before = {path: path.stat().st_size for path in sealed[1].rglob("*") if path.is_file()}
    ended = imager.ok(*writer, "backup", image, "--name", "disk", "--json")
    summary = ended.messages[-1]
    assert summary["by_content"] and summary["images"][0]["blocks_new"] == 0
    new = {path.parent.name for path in sealed[1].rglob("*") if path.is_file() and path not in before}
    assert new == {"sets", "sessions"}, "nothing is stored twice, pages neither"
    assert "cannot read earlier sets" in imager.ok(*writer, "backup", image, "--name", "disk").out
    listed = imager.ok(*writer, "list", "disk")
    assert listed.out.count("disk (not readable with this key") == 3 and f"by {host}" in listed.out
    assert imager.ok(*writer, "list", "other").out.count("\n") <= 1
    for verb in (
        ["show", "disk"],
        ["verify", "disk"],
        ["restore", "disk", tmp_path / "out"],
        ["diff", "disk", image],
        ["show", "no-such-name"],
        ["key", "add", "--new-keyfile", tmp_path / "more"],
        ["key", "rotate"],
        ["key", "remove", "passphrase"],
        ["key", "export"],
    ):
        ended = imager(*writer, *verb)
        assert ended.code == errors.EXIT_WRONG_KEY and "hint:" in ended.err, verb
    assert not (tmp_path / "out").exists() and not (tmp_path / "more").exists()
    checked = imager.ok(*writer, "check", "--read-data")
    assert "3 of 3 image sets cannot be read" in checked.out and "whole" in checked.out
    # Its sets are as good as any.
    imager.ok(*sealed, "restore", "disk", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == image.read_bytes()
    assert imager.ok(*sealed, "list", "--json").document["sets"][-1]["writer"]["host"] == host


def test_a_key_of_another_machine(imager, sealed, image: Path, tmp_path: Path) -> None:
    key = tmp_path / "other.key"
    imager.ok(*sealed, "key", "add", "--role", "write", "--host", "db1", "--new-keyfile", key)
    ended = imager("-r", sealed[1], "--keyfile", key, "backup", image, "--name", "disk")
    assert ended.code == errors.EXIT_WRONG_KEY and "db1" in ended.err


def test_a_reader_cannot_back_up(imager, sealed, image: Path, tmp_path: Path) -> None:
    imager.ok(*sealed, "key", "add", "--role", "read", "--new-keyfile", tmp_path / "r", "--label", "auditor")
    reader = ("-r", sealed[1], "--keyfile", tmp_path / "r")
    imager.ok(*reader, "verify", "disk")
    imager.ok(*reader, "check", "--read-data")
    ended = imager(*reader, "backup", image, "--name", "disk")
    assert ended.code == errors.EXIT_WRONG_KEY and "role write" in ended.err
    assert slots(imager, reader)["auditor"]["opened"]


def test_losing_a_host(imager, sealed, image: Path, tmp_path: Path) -> None:
    key, host = tmp_path / "host.key", os.uname().nodename
    imager.ok(*sealed, "key", "add", "--role", "write", "--host", host, "--new-keyfile", key, "--label", "h")
    writer = ("-r", sealed[1], "--keyfile", key)
    imager.ok(*writer, "backup", image, "--name", "disk")
    gone = imager.ok(*sealed, "key", "remove", "h")
    assert "revoked writer" in gone.out and "1 image set of it still count" in gone.out
    assert imager(*writer, "list").code == errors.EXIT_WRONG_KEY
    assert imager.ok(*sealed, "check").code == 0
    assert "revoked: writer" in imager.ok(*sealed, "key", "list").out


def test_changing_a_passphrase(imager, sealed, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("another horse\n")
    environment = {"IMAGER_NEW_PASSPHRASE_FILE": str(tmp_path / "new")}
    imager.ok(*sealed, "key", "passwd", env=environment)
    ended = imager(*sealed, "list")
    assert ended.code == errors.EXIT_WRONG_KEY and "no key slot opens" in ended.err
    imager.ok("-r", sealed[1], "list", "--passphrase-file", tmp_path / "new")


@pytest.mark.parametrize("out", [False, True], ids=["printed", "in a file"])
def test_from_the_sheet_back_into_the_repository(imager, sealed, tmp_path: Path, out: bool) -> None:
    if out:
        imager.ok(*sealed, "key", "export", "--out", tmp_path / "sheet", "--label", "sheet")
        text = (tmp_path / "sheet").read_text()
        assert stat.S_IMODE((tmp_path / "sheet").stat().st_mode) == 0o600
    else:
        text = imager.ok(*sealed, "key", "export", "--label", "sheet").out
    typed = " ".join(re.findall(r"^ +((?:[0-9A-Z]{5}-){3}[0-9A-Z]{5})$", text, re.MULTILINE)).lower()
    assert len(typed) == 47
    (tmp_path / "typed").write_text(typed + "\n")
    for way, environment, stdin in (
        ((), {"IMAGER_RECOVERY_KEY": typed}, b""),
        ((), {"IMAGER_RECOVERY_KEY_FILE": str(tmp_path / "typed")}, b""),
        (("--recovery-key-file", tmp_path / "typed"), {}, b""),
        (("--recovery-key-file", "-"), {}, typed.encode()),
    ):
        ended = imager.ok("-r", sealed[1], *way, "key", "list", "--json", env=environment, stdin=stdin)
        assert [slot["label"] for slot in ended.document["slots"] if slot["opened"]] == ["sheet"]
    wrong = typed[:7] + ("x" if typed[7] != "x" else "y") + typed[8:]
    ended = imager("-r", sealed[1], "list", env={"IMAGER_RECOVERY_KEY": wrong})
    assert ended.code == errors.EXIT_USAGE and "group 2 of 8" in ended.err and wrong[:5] not in ended.err
    # The next passphrase is set with it alone.
    (tmp_path / "new").write_text("a new start\n")
    imager.ok(
        *("-r", sealed[1], "key", "add", "--label", "new", "--new-passphrase-file", tmp_path / "new"),
        env={"IMAGER_RECOVERY_KEY": typed},
    )
    imager.ok("-r", sealed[1], "--passphrase-file", tmp_path / "new", "key", "remove", "passphrase")
    assert imager(*sealed, "list").code == errors.EXIT_WRONG_KEY


def test_a_sheet_that_cannot_be_written_leaves_no_slot(imager, sealed, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    for place in (tmp_path / "taken", tmp_path / "no" / "folder"):
        assert imager(*sealed, "key", "export", "--out", place).code == errors.EXIT_USAGE
    assert len(slots(imager, sealed)) == 1


def test_the_code_of_a_png_opens(imager, sealed, tmp_path: Path) -> None:
    imager.ok(*sealed, "key", "export", "--format", "png", "--out", tmp_path / "code.png")
    scanned = subprocess.run(
        ["zbarimg", "-q", "--raw", "-Sdisable", "-Sqrcode.enable", str(tmp_path / "code.png")],
        capture_output=True,
        text=True,
        check=True,
    )
    imager.ok("-r", sealed[1], "list", env={"IMAGER_RECOVERY_KEY": scanned.stdout})


def test_rotating(imager, sealed, image: Path, tmp_path: Path) -> None:
    imager.ok(*sealed, "key", "add", "--label", "laptop", "--new-keyfile", tmp_path / "laptop")
    ended = imager.ok(*sealed, "key", "rotate")
    assert "epoch 2 began" in ended.out and "(laptop, keyfile, role full) does not" in ended.out
    imager.ok(*sealed, "backup", image, "--name", "disk")
    found = imager.ok(*sealed, "key", "list", "--json").document
    assert (found["epochs"], len(found["lacking"])) == ([1, 2], 1)
    old = ("-r", sealed[1], "--keyfile", tmp_path / "laptop")
    assert imager.ok(*old, "list").out.count("not readable with this key") == 1
    assert imager(*old, "verify", "disk").code == errors.EXIT_WRONG_KEY
    assert imager(*old, "key", "rotate").code == errors.EXIT_WRONG_KEY
    refused = imager(*sealed, "key", "remove", "passphrase")
    assert refused.code == errors.EXIT_USAGE and "last full" in refused.err
    imager.ok(*sealed, "verify", "disk")


@pytest.mark.parametrize(
    ("way", "environment"),
    [
        (("--passphrase-fd", "0"), {}),
        ((), {"IMAGER_PASSPHRASE_FD": "0"}),
        ((), {"CREDENTIALS_DIRECTORY": "FOLDER"}),
    ],
)
def test_a_passphrase_by_descriptor_and_from_systemd(
    imager, sealed, tmp_path: Path, way, environment
) -> None:
    (tmp_path / "imager.passphrase").write_text("correct horse\n")
    environment = {name: value.replace("FOLDER", str(tmp_path)) for name, value in environment.items()}
    imager.ok("-r", sealed[1], *way, "list", env=environment, stdin=b"correct horse\n")


def test_wrong_secrets_are_all_the_same(imager, sealed, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_bytes(b"w" * 64)
    (tmp_path / "none").write_text("wrong horse")
    imager.ok(*sealed, "key", "add", "--new-keyfile", tmp_path / "good", "--label", "k")
    said = set()
    for way in (("--passphrase-file", tmp_path / "none"), ("--keyfile", tmp_path / "wrong")):
        ended = imager("-r", sealed[1], *way, "list")
        assert ended.code == errors.EXIT_WRONG_KEY
        said.add(ended.err.replace("keyfile", "passphrase"))
    assert len(said) == 1


def test_every_field_of_the_keys_is_documented(imager, sealed, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/reference/json.md").read_text()
    key = tmp_path / "new"
    for words in (
        ["key", "list"],
        ["key", "add", "--role", "write", "--host", "h", "--label", "w", "--new-keyfile", key],
        ["key", "remove", "w"],
        ["key", "export"],
        ["key", "rotate"],
        ["key", "passwd", "--new-keyfile", tmp_path / "other"],
    ):
        document = imager.ok(*sealed, *words, "--json").document
        for name in field_names(document):
            assert f"`{name}`" in page, (words, name)
