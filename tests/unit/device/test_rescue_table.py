from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from imager.device import rescue_table
from imager.device.identity import identify
from imager.errors import TargetError

MIB = 1 << 20


@pytest.mark.parametrize("size", [5 * MIB + 512, 2 * MIB, MIB, MIB + 512, 4096])
def test_both_ends_come_back(tmp_path: Path, size: int) -> None:
    device = tmp_path / "device"
    before = os.urandom(size)
    device.write_bytes(before)
    with device.open("rb") as file:
        folder = rescue_table.save(file.fileno(), identify(device), tmp_path / "state")
    with device.open("r+b") as file:
        file.write(bytes(size))
    for line in rescue_table.undo(folder):
        if line.startswith("dd "):
            subprocess.run(line.split(), check=True, capture_output=True)
    after = device.read_bytes()
    middle = bytes(max(0, size - 2 * MIB))
    assert after == before[:MIB] + middle + before[len(before[:MIB]) + len(middle) :]


def test_two_in_one_second(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.write_bytes(bytes(4096))
    with device.open("rb") as file:
        folders = {rescue_table.save(file.fileno(), identify(device), tmp_path / "s") for _ in range(3)}
    assert len(folders) == 3


def test_no_place_to_keep_it_is_an_error(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.write_bytes(bytes(4096))
    with device.open("rb") as file, pytest.raises(TargetError, match="cannot keep"):
        rescue_table.save(file.fileno(), identify(device), device / "state")


def test_unreadable_sectors_are_zeroes_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rescue_table._try

    def broken(fd: int, start: int, length: int) -> bytes | None:
        return None if start <= 8192 < start + length else whole(fd, start, length)

    monkeypatch.setattr(rescue_table, "_try", broken)
    device = tmp_path / "device"
    device.write_bytes(b"\xff" * 16384)
    with device.open("rb") as file:
        read, lost = rescue_table._read(file.fileno(), 0, 16384)
    assert lost == [(8192, 4096)]
    assert read == b"\xff" * 8192 + bytes(4096) + b"\xff" * 4096


def test_the_default_place_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/home/x/state")
    assert rescue_table.default_folder() == Path("/home/x/state/imager/tables")
