"""A recorded /sys, rebuilt as files and links."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

RECORDED = Path(__file__).parents[3] / "fixtures" / "tool-output"


def rebuild(recording: Path, root: Path) -> None:
    for line in recording.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if " -> " in line:
            name, _, target = line.partition(" -> ")
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(target)
        elif line.endswith("/"):
            (root / line).mkdir(parents=True, exist_ok=True)
        else:
            name, _, value = line.partition(" = ")
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = bytes.fromhex(value[4:]) if value.startswith("hex:") else os.fsencode(value) + b"\n"
            path.write_bytes(raw)


@pytest.fixture
def laptop(tmp_path: Path) -> str:
    root = tmp_path / "sys"
    rebuild(RECORDED / "sysfs-laptop.txt", root)
    return str(root)


@pytest.fixture
def recorded() -> Callable[[str], str]:
    return lambda name: (RECORDED / name).read_text()
