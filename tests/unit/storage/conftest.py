"""A new place in each storage."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.objectstores import careless_s3, locking_door, locking_s3, moto_door, other_s3, s3, s3s_door  # noqa: F401
from tests.sshd import owner, sshd  # noqa: F401
from tests.unit.storage.backends import BACKENDS, Place


@pytest.fixture(params=list(BACKENDS))
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    """Each storage in turn."""
    with BACKENDS[request.param](request) as made:
        yield made
