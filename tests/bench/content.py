"""Bytes to fill files with: compressible ones and incompressible ones, the same on every run.

Invariant: what is made depends on the seed alone, and no stretch of it repeats: a tool that
deduplicates finds nothing here that a real file would not give it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

CHUNK = 1 << 20


def noise(seed: int, size: int) -> Iterator[bytes]:
    """Incompressible bytes, like those of media files and archives."""
    source = random.Random(seed)
    for start in range(0, size, CHUNK):
        yield source.randbytes(min(CHUNK, size - start))


def prose(seed: int, size: int) -> Iterator[bytes]:
    """Bytes that compress about as logs, mail and tables do (lz4 to roughly a half)."""
    source = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    weights = [12, 9, 8, 8, 7, 7, 6, 6, 6, 4, 4, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    words = ["".join(source.choices(letters, weights, k=source.randint(2, 11))) + " " for _ in range(6000)]
    frequencies = [1 / (rank + 3) for rank in range(len(words))]
    pool = "".join(source.choices(words, frequencies, k=400_000)).encode()
    made = 0
    while made < size:
        pieces: list[bytes] = []
        length = 0
        while length < CHUNK:
            at = source.randrange(len(pool) - 400)
            piece = b"%012x %s\n" % (source.getrandbits(48), pool[at : at + source.randint(30, 400)])
            pieces.append(piece)
            length += len(piece)
        chunk = b"".join(pieces)[: min(CHUNK, size - made)]
        made += len(chunk)
        yield chunk


def noisy_prose(seed: int, size: int) -> Iterator[bytes]:
    """Half noise, half repeated letters, page by page: compresses like `prose`, and is made much faster."""
    source = random.Random(seed)
    for start in range(0, size, CHUNK):
        noise_half = source.randbytes(CHUNK // 2)
        pages = (
            noise_half[at : at + 2048] + noise_half[at : at + 64] * 32 for at in range(0, CHUNK // 2, 2048)
        )
        yield b"".join(pages)[: min(CHUNK, size - start)]


def write(path: Path, chunks: Iterator[bytes]) -> None:
    """Fill a new file with chunks, one after the other."""
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
