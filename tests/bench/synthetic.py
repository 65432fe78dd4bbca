"""Fill a repository's index with entries of blocks that nobody stored, for the benchmark of large indexes.

Invariant: everything that looks a block up, lists, merges or checks the structure meets what it would
meet in a repository of that many blocks: real segments, made and merged by the project's own code, and
for each pack that they name an object with a whole header and footer and the size of a full pack. What
lies between is a hole. No image set refers to any of it.

    python tests/bench/synthetic.py REPO KEYFILE ENTRIES SAMPLE

Writes the ids of up to a million of the blocks to the file SAMPLE.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from pathlib import Path

from imager import _native
from imager.events import Silent
from imager.repository import index, merging
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.repository.segments import segment_name
from imager.storage.folder import FolderStorage

PER_PACK = 2048
"""Blocks of 64 KiB that compress to a half, in a pack of 64 MiB."""
RECORD = 32 << 10
FLUSH = 1 << 20
SAMPLE = 1_000_000


def pack_file(root: Path, repository: bytes, name: bytes, number: int, records: int) -> None:
    """A pack of which only the frame is there."""
    head = struct.pack("<8sHBBI16s16sQH6x", b"IMGRPACK", 1, 1, 0, 72, repository, bytes(16), number, 0)
    head += struct.pack("<Q", _native.xxh3(head))
    trailer = 72 + records * RECORD
    foot = struct.pack("<8sIIQ", b"IMGRTAIL", records, 96, trailer)
    foot += struct.pack("<Q", _native.xxh3(foot))
    text = name.hex()
    fd = os.open(root / "packs" / text[:2] / text, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    os.pwrite(fd, head, 0)
    os.pwrite(fd, foot, trailer + 96 * records)
    os.close(fd)


def fill(repository: Repository, root: Path, entries: int, sample: Path) -> merging.Merged:
    """All packs and segments; what merging the segments came to."""
    for shard in range(256):
        (root / "packs" / f"{shard:02x}").mkdir(exist_ok=True)
    known = index.load(repository)
    every = max(1, entries // SAMPLE)
    done = merging.Merged()

    def flush() -> merging.Merged:
        data = known.segment(repository.id)
        if data is None:
            return merging.Merged()
        name = segment_name(data)
        repository.storage.create(name, data)
        index.load_one(repository, known, name)
        known.forget()
        reporter = Silent()
        merged = merging.tend(repository, known, reporter, stored=1 << 60)
        assert not reporter.warnings, reporter.warnings
        return merged

    offsets = range(72, 72 + PER_PACK * RECORD, RECORD)
    with sample.open("wb") as out:
        for number, first in enumerate(range(0, entries, PER_PACK)):
            count = min(PER_PACK, entries - first)
            name, ids = os.urandom(32), os.urandom(32 * count)
            pack_file(root, repository.id, name, number, count)
            records = [(1, ids[at * 32 : at * 32 + 32], offsets[at], RECORD) for at in range(count)]
            known.add_pack(repository.names.intern(name), records)
            out.write(b"".join(ids[at * 32 : at * 32 + 32] for at in range(0, count, every)))
            if known.pending >= FLUSH:
                done += flush()
    return done + flush()


def main() -> None:
    """Fill, and say what it took."""
    root, keyfile, entries, sample = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
    begun = time.monotonic()
    credentials = Credentials(keyfile=keyfile, interactive=False)
    with Repository.open(FolderStorage(str(root)), credentials, writing=True) as repository:
        merged = fill(repository, root, entries, sample)
    print(f'{{"seconds": {time.monotonic() - begun:.1f}, "rewritten": {merged.bytes_written}}}')


if __name__ == "__main__":
    main()
