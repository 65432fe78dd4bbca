"""The native core: formatted, free of warnings, and its own tests pass.

These share the build of the release profile, so that the C parts are compiled once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "native"

pytestmark = pytest.mark.skipif(shutil.which("cargo") is None, reason="there is no cargo")


def passes(*argv: str) -> str:
    """Run cargo and return what it said; it must succeed."""
    environment = {**os.environ, "PYO3_PYTHON": sys.executable}
    done = subprocess.run(
        ["cargo", *argv], cwd=NATIVE, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"cargo {' '.join(argv)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.skipif(shutil.which("cargo-fmt") is None, reason="there is no rustfmt")
def test_format() -> None:
    passes("fmt", "--check")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cargo-clippy") is None, reason="there is no clippy")
def test_clippy() -> None:
    passes("clippy", "--locked", "--release", "--all-targets", "--", "-D", "warnings")


@pytest.mark.slow
def test_its_own_tests() -> None:
    assert "test result: ok." in passes("test", "--locked", "--release", "--lib")
