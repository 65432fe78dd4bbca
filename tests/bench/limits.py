"""The machine's limits, measured in the same rounds as the tools: bare lz4 on all cores.

Invariant: the same bytes from the same storage as every tool gets, with nothing around them. Two
figures come out: the whole process, and inside it the part that works (for the restore limit the
blocks are compressed first, which only the second figure leaves out).
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import measure
import rounds


@dataclass
class Limits:
    """Seconds, a value a round."""

    backup: list[float] = field(default_factory=list)
    backup_whole: list[float] = field(default_factory=list)
    restore: list[float] = field(default_factory=list)
    bytes_in: int = 0
    bytes_out: int = 0


def compile_program(folder: Path) -> Path | None:
    """Build limit.c, or None where there is no compiler or no lz4 to build it with."""
    program = folder / "limit"
    source = Path(__file__).with_name("limit.c")
    command = ["gcc", "-O3", "-march=native", "-o", str(program), str(source), "-llz4", "-lpthread"]
    try:
        done = subprocess.run(command, check=False, capture_output=True)
    except OSError:
        return None
    return program if done.returncode == 0 else None


def play(program: Path, image: Path, limits: Limits, say: Callable[[str], None], keep: bool = True) -> None:
    """Both limits, once."""
    rounds.settle(image)
    backup = measure.run([str(program), "backup", str(image)])
    out = image.with_name("limit-out")
    rounds.settle(image)
    try:
        restore = measure.run([str(program), "restore", str(image), str(out)])
        if subprocess.run(["cmp", str(image), str(out)], check=False, capture_output=True).returncode != 0:
            raise measure.Failed("the limit program restored other bytes")
    finally:
        out.unlink(missing_ok=True)
    inner, found = json.loads(backup.output), json.loads(restore.output)
    if keep:
        limits.backup.append(inner["seconds"])
        limits.backup_whole.append(backup.seconds)
        limits.restore.append(found["seconds"])
        limits.bytes_in, limits.bytes_out = inner["bytes_in"], inner["bytes_out"]
        say(f"  {'limit':10} backup   {backup.seconds:7.2f} s")
        say(f"  {'limit':10} restore  {found['seconds']:7.2f} s (inside)")
