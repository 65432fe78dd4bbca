"""Linters and type checkers are ordinary tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

cargo = pytest.mark.skipif(shutil.which("cargo") is None, reason="there is no cargo")


def passes(*argv: str, where: Path = ROOT) -> None:
    done = subprocess.run(argv, cwd=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}\n{done.stdout}{done.stderr}"


def test_ruff_check() -> None:
    passes(sys.executable, "-m", "ruff", "check", "--no-cache", ".")


def test_ruff_format() -> None:
    passes(sys.executable, "-m", "ruff", "format", "--no-cache", "--check", ".")


def test_mypy_strict() -> None:
    passes(sys.executable, "-m", "mypy")


@cargo
def test_cargo_fmt() -> None:
    passes("cargo", "fmt", "--check", where=ROOT / "native")


@cargo
@pytest.mark.slow
def test_clippy() -> None:
    passes("cargo", "clippy", "--offline", "--all-targets", "--", "-D", "warnings", where=ROOT / "native")


def test_shell_scripts() -> None:
    for script in ("dev", ".ci/run"):
        passes("bash", "-n", str(ROOT / script))
