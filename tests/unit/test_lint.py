"""Linters and type checkers are ordinary tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def passes(*argv: str, where: Path = ROOT) -> None:
    done = subprocess.run(argv, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}{done.stderr}"


def test_ruff_check() -> None:
    passes(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_ruff_format() -> None:
    passes(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".")


def test_mypy_strict() -> None:
    passes(sys.executable, "-m", "mypy")


def test_shell_scripts() -> None:
    for script in ("dev", ".ci/run"):
        passes("bash", "-n", str(ROOT / script))
