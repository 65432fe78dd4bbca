"""The arrows of docs/design/architecture.md hold, and every package has its place in them."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(
    path.stem
    for path in (ROOT / "imager").iterdir()
    if path.suffix == ".py" or (path / "__init__.py").exists()
)
HEAVY = {"rich", "cryptography", "pyudev", "psutil", "subprocess", "msgspec", "imager._native", "asyncio"}


def loaded_by(statement: str) -> set[str]:
    """Names of the modules that are loaded after `statement`."""
    program = f"{statement}\nimport sys; print(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return set(done.stdout.split())


def test_arrows() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", [p for p in PACKAGES if not p.startswith("_")])
def test_every_package_has_its_place(package: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = str([c.get("layers", []) + c.get("source_modules", []) for c in contracts])
    assert f"imager.{package}" in named, f"name imager.{package} in the contracts of pyproject.toml"


def test_the_command_starts_light() -> None:
    assert not loaded_by("import imager.cli.main") & HEAVY


@pytest.mark.parametrize(
    "verb", [p.stem for p in (ROOT / "imager/cli/verbs").glob("*.py") if p.stem != "__init__"]
)
def test_a_verb_loads_nothing_before_it_is_called(verb: str) -> None:
    assert not loaded_by(f"import imager.cli.verbs.{verb}") & HEAVY


def test_the_reference_reader_needs_no_native_code() -> None:
    mine = {name for name in loaded_by("import imager.reference") if name.startswith("imager")}
    assert mine == {"imager", "imager.reference"}


def test_no_module_is_too_long() -> None:
    # The reference reader is one file on purpose: whoever needs it may have nothing else left.
    modules = [p for p in (ROOT / "imager").rglob("*.py") if p.name != "reference.py"]
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in modules}
    assert not {name: n for name, n in lengths.items() if n > 500}


def test_every_module_says_what_it_keeps() -> None:
    silent = [
        str(p.relative_to(ROOT))
        for p in (ROOT / "imager").rglob("*.py")
        if not p.read_text().startswith('"""') and not (p.name == "__init__.py" and not p.read_text())
    ]
    assert not silent
