"""A short run of `tests/bench/crash_consistency.py`: used blocks of a disk that was pulled out lose nothing.

The kernel decides when it writes, so no two runs are alike; the seeds say what is done, and the proof holds
at every moment.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager import command
from imager.lab import rig
from tests import filesystems as fs
from tests.crash import trial as trials
from tests.crash.workload import Ledger
from tests.workbench import MEMORY

MISSING = [argv[0] for argv in fs.MAKE.values() if command.find(argv[0]) is None]
WITHOUT = rig.without_devices()

pytestmark = [
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT)),
]


@pytest.fixture(scope="module")
def stand() -> Iterator[trials.Stand]:
    with (
        tempfile.TemporaryDirectory(prefix="imager-crash-", dir=MEMORY) as name,
        trials.Stand(Path(name)).up() as stand,
    ):
        yield stand


@pytest.mark.parametrize(("kind", "seed"), [("ext", 1001), ("ext", 1004), ("xfs", 1001), ("btrfs", 1003)])
def test_what_was_fsynced_is_there(kind: str, seed: int, stand: trials.Stand) -> None:
    done = trials.run(stand, kind, seed, partclone=False)
    assert done.reference and done.promised > 0
    assert not done.kernel_lost
    assert done.imager.good, done
    # A copy of a mounted XFS has a log that only the kernel can replay.
    assert bool(done.imager.note) == (kind == "xfs")
    assert done.imager.fraction == 1 if kind == "xfs" else done.imager.fraction < 0.5


def test_a_copy_without_an_instant(stand: trials.Stand) -> None:
    """As dd makes it of a disk in use: whatever it is worth, imaging takes nothing away from it."""
    done = trials.run(stand, "ext", 2001, smeared=True, partclone=False)
    assert done.imager.good, done


def test_the_ledger_keeps_what_stood_all_the_time() -> None:
    ledger = Ledger()
    for name in ("stays", "changes", "goes"):
        ledger.promise(name, name.encode())
    before = ledger.seen()
    ledger.withdraw("changes", "goes")
    ledger.promise("changes", b"changes")
    ledger.promise("comes", b"comes")
    assert set(Ledger.throughout(before, ledger.seen())) == {"stays"}
