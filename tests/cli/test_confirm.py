"""The question before a device is overwritten: asked on a terminal, and nowhere else."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager import errors
from tests.cli.terminal import on_a_terminal

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="a loop device needs root"),
]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[str]:
    """A loop device over 16 MiB of content that must not be lost."""
    backing = tmp_path / "target"
    backing.write_bytes(os.urandom(1 << 20) * 16)
    argv = ["losetup", "--find", "--show", str(backing)]
    name = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", name], check=True)


def content(device: str) -> str:
    with open(device, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_the_right_name(imager, repository: Path, image: Path, target: str) -> None:
    typed = Path(target).name.encode()
    code, shown = on_a_terminal(imager, "-r", repository, "restore", "disk", target, typed=typed)
    assert code == 0, shown
    assert target in shown and "will be overwritten" in shown
    original = image.read_bytes()
    with open(target, "rb") as file:
        assert file.read(len(original)) == original


@pytest.mark.parametrize("typed", [b"y", b"yes", b"sda", b"\x04"])
def test_a_wrong_answer(imager, repository: Path, target: str, typed: bytes) -> None:
    before = content(target)
    code, shown = on_a_terminal(imager, "-r", repository, "restore", "disk", target, typed=typed)
    assert code == errors.EXIT_NOT_CONFIRMED, shown
    assert content(target) == before


def test_nobody_to_ask(imager, repository: Path, target: str) -> None:
    before = content(target)
    ended = imager("-r", repository, "restore", "disk", target, stdin=Path(target).name.encode() + b"\n")
    assert ended.code == errors.EXIT_NOT_CONFIRMED
    assert "--confirm-device" in ended.err
    assert content(target) == before


def test_named_by_option(imager, repository: Path, target: str) -> None:
    before = content(target)
    wrong = imager("-r", repository, "restore", "disk", target, "--confirm-device", "WD-1234")
    assert wrong.code == errors.EXIT_NOT_CONFIRMED
    assert content(target) == before
    imager.ok("-r", repository, "restore", "disk", target, "--confirm-device", target)
    assert content(target) != before


def test_a_dry_run_asks_nothing(imager, repository: Path, target: str) -> None:
    before = content(target)
    code, shown = on_a_terminal(imager, "-r", repository, "restore", "disk", target, "--dry-run")
    assert code == 0
    assert target in shown and "will be overwritten" not in shown
    assert content(target) == before


def test_a_first_backup_of_a_device_warns_of_nothing(imager, repository: Path, target: str) -> None:
    ended = imager.ok("-r", repository, "backup", target, "--name", "new")
    assert "warning" not in ended.err
