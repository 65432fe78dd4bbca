"""Options: how long, and one round again, as it failed."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, default=None, help="How long to thrash.")
    parser.addoption("--thrash-operations", type=int, default=None, help="Commands of one round.")
    parser.addoption("--thrash-seed", type=int, default=None, help="Run the round of this seed, once.")
