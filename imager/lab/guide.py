"""README.txt of a lab that was kept: what is what, and what to try.

Invariant: every command in it works as it stands, from within the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_FILES = """\
This folder was left by `imager lab --keep`. It holds a disk, its backups, and
what was restored from them. Remove the folder when you are done with it.

  disk.img            the disk that was backed up, after its last change
  restored.img        the last set, restored onto random bytes, which stand where nothing is in use
  earlier.img         the second set, restored over the first (--delta)
  repository/         the repository: three sets of the lineage `lab`
  passphrase.txt      opens the repository
  state/              what imager remembers of it between runs
  damaged/repository/ a copy in which one byte of one pack was changed
  damaged/state/      what imager remembers of the copy
  damaged/refused.img what the refused restore of damaged data left: incomplete
{more}
On the disk: {names}.

To try, from within this folder:

  export IMAGER_PASSPHRASE_FILE=$PWD/passphrase.txt IMAGER_STATE_DIR=$PWD/state
  export IMAGER_REPO=$PWD/repository

  imager list
  imager show lab
  imager restore lab again.img && imager verify lab --against again.img
  imager verify lab
  imager diff lab ./restored.img && echo equal
  imager backup disk.img --name again

  export IMAGER_REPO=$PWD/damaged/repository IMAGER_STATE_DIR=$PWD/damaged/state
  imager verify lab
  imager check --read-data
"""
_STAGED = """\
  partitions/         each filesystem as a file of its own
  tree-*/             the files that they were made from
"""


def write(work: Path, names: Sequence[str], *, devices: bool) -> None:
    """Write README.txt into the folder."""
    more = "" if devices else _STAGED
    (work / "README.txt").write_text(_FILES.format(more=more, names=", ".join(names)))
