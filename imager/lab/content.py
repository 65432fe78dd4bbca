"""Bytes to fill files with: text that compresses and noise that does not.

Invariant: what is made depends on the random source alone, and no long
stretch of it repeats, so that deduplication finds nothing that a real file
would not give it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

CHUNK = 1 << 20
_LINE = 120
_WORDS = 4000


def noise(source: random.Random, size: int) -> Iterator[bytes]:
    """Incompressible bytes, like those of media files and archives."""
    for start in range(0, size, CHUNK):
        yield source.randbytes(min(CHUNK, size - start))


class Prose:
    """Text that compresses about as logs and mail do (lz4: roughly to a half)."""

    def __init__(self, source: random.Random) -> None:
        letters = "etaoinshrdlucmfwypvbgk"
        words = ["".join(source.choices(letters, k=source.randint(2, 11))) for _ in range(_WORDS)]
        weights = [1 / (rank + 3) for rank in range(_WORDS)]
        self._source = source
        self._pool = " ".join(source.choices(words, weights, k=150_000)).encode()

    def write(self, size: int) -> Iterator[bytes]:
        """`size` bytes of numbered lines."""
        source, pool = self._source, self._pool
        last = len(pool) - _LINE
        made = 0
        while made < size:
            wanted = min(CHUNK, size - made)
            count = wanted // _LINE + 1
            stamps = source.randbytes(8 * count).hex()
            starts = source.choices(range(last), k=count)
            lines = [
                b"%s %s\n" % (stamps[16 * i : 16 * i + 16].encode(), pool[at : at + _LINE])
                for i, at in enumerate(starts)
            ]
            yield b"".join(lines)[:wanted]
            made += wanted
