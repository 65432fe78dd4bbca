"""Options: `--minutes M` (how long), `--thrash-seed N` (one round again, as it failed)."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=None, help="How long to thrash.")
    parser.addoption("--thrash-seed", type=int, default=None, help="Run the round of this seed, once.")
