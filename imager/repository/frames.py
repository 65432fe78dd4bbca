"""The ends of packs: header, trailer and footer, without the records between.

Invariant: of a far pack only its ends are fetched; what is read of them is bounded
before memory is taken for it, and what was not fetched is never looked at.
"""

from __future__ import annotations

import os

from imager.repository.format import FOOTER, MAX_RECORDS, TRAILER_ENTRY
from imager.repository.packs import header_length, read_header
from imager.storage import spool
from imager.storage.base import Storage
from imager.storage.errors import StorageError

_HEADER = 4096
_TAIL = 256 << 10
"The trailer of a pack of 64 MiB in blocks of 64 KiB has some 100 KiB."


def ends(storage: Storage, name: str, size: int) -> tuple[bytes, bytes]:
    """(header, footer) of a pack of `size` bytes, as much of each as there is.

    Raises `NotFound`, `StorageError`, and OSError where a local file cannot be read.
    """
    at = max(0, size - FOOTER)
    if storage.local:
        fd = storage.open(name)
        try:
            return read_header(fd), os.pread(fd, FOOTER, at)
        finally:
            os.close(fd)
    header = storage.read(name, 0, _HEADER)
    wanted = header_length(header)
    if wanted > len(header):
        header = storage.read(name, 0, wanted)
    return header[:wanted], storage.read(name, at, FOOTER)


def open_frame(storage: Storage, name: str) -> int:
    """A descriptor of a pack for `_native.pack_records`, the caller's to close.

    Of a far pack a file in memory of its length, in which only the ends are.
    Raises `NotFound`, `StorageError`.
    """
    if storage.local:
        return storage.open(name)
    size = storage.size(name)
    tail_at = max(0, size - _TAIL)
    tail = storage.read(name, tail_at, size - tail_at)
    # "IMGRTAIL", u32 records, u32 entry size, u64 trailer offset, u64 check: docs/design/repository-format.md
    footer = tail[-FOOTER:]
    trailer = int.from_bytes(footer[16:24], "little")
    records = int.from_bytes(footer[8:12], "little")
    if trailer < tail_at and records <= MAX_RECORDS and trailer + records * TRAILER_ENTRY + FOOTER == size:
        tail_at, tail = trailer, storage.read(name, trailer, size - trailer)
    header = b""
    if tail_at:
        header = storage.read(name, 0, min(_HEADER, tail_at))
        if (wanted := min(header_length(header), tail_at)) > len(header):
            header = storage.read(name, 0, wanted)
    if len(tail) != size - tail_at:
        raise StorageError(f"reading {name} failed: it ends earlier than the storage said")
    fd = os.memfd_create("imager-frame")
    try:
        spool.write_at(fd, header, 0)
        spool.write_at(fd, tail, tail_at)
    except BaseException:
        os.close(fd)
        raise
    return fd
