"""Look many ids up in a repository's index, and say how many that were a second.

    python tests/bench/lookups.py REPO KEYFILE SAMPLE

One thread. SAMPLE holds ids that are known; as many random ones are not. Prints JSON: segments,
entries, bytes, hits and misses a second with the index in the page cache, and of the first
20,000 misses and hits after it was put out of it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from imager import _native
from imager.repository import index
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.storage.folder import FolderStorage

COLD = 20_000


def rate(known: _native.Known, ids: bytes, expected: int) -> float:
    """Look-ups a second; all or none must be known."""
    begun = time.perf_counter()
    found = known.count(ids)
    seconds = time.perf_counter() - begun
    assert found == expected, f"{found} of {len(ids) // 32} are known, not {expected}"
    return len(ids) / 32 / seconds


def main() -> None:
    """Measure and print."""
    root, keyfile, sample = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]).read_bytes()
    count = len(sample) // 32
    strangers = os.urandom(len(sample))
    credentials = Credentials(keyfile=keyfile, interactive=False)
    with Repository.open(FolderStorage(str(root)), credentials, writing=True) as repository:
        begun = time.perf_counter()
        known = index.load(repository)
        loading = time.perf_counter() - begun
        begun = time.perf_counter()
        packs = repository.packs_present()
        listing = time.perf_counter() - begun
        for path in (root / "index").iterdir():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        said = {
            "segments": len(known.loaded),
            "entries": sum(entries for _, entries, _ in known.loaded),
            "bytes": sum(size for _, _, size in known.loaded),
            "packs": packs,
            "loading": loading,
            "listing": listing,
            "cold_misses": rate(known, strangers[: COLD * 32], 0),
            "cold_hits": rate(known, sample[: COLD * 32], min(COLD, count)),
        }
        for path in (root / "index").iterdir():  # into the page cache
            with path.open("rb") as file:
                while file.read(1 << 20):
                    pass
        said["misses"] = rate(known, strangers, 0)
        said["hits"] = rate(known, sample, count)
        assert known.damaged_pages == 0
    print(json.dumps(said))


if __name__ == "__main__":
    main()
