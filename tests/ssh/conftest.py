"""The command with an ssh that a server on loopback knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Imager
from tests.sshd import Client, owner, sshd  # noqa: F401


@pytest.fixture
def imager(tmp_path: Path, owner: Client) -> Imager:  # noqa: F811
    """The command, with the owner's ssh."""
    command = Imager(tmp_path)
    command.environment |= owner.environment
    return command
