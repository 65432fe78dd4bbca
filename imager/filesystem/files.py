"""Single small files of a filesystem: what of them is read, and how much.

Invariant: nothing here is larger than it says, whatever the filesystem says.
"""

from __future__ import annotations

from typing import Protocol

LONGEST = 64 << 10
"""A file that is longer is not read. In bytes."""
LONGEST_FOLDER = 1 << 20
"""So much of a folder is read, in bytes."""
MOST_NAMES = 4096


class Files(Protocol):
    """Files by their paths below a filesystem's root, without a leading slash."""

    def read(self, path: str) -> bytes | None:
        """The content of a plain file of at most `LONGEST` bytes; None where there is none."""

    def names(self, path: str) -> tuple[str, ...]:
        """Names in a folder, sorted, `MOST_NAMES` at most; none where there is no such folder."""
