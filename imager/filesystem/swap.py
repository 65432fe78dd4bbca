"""Swap: of all its pages, only the first one is ever read again.

Invariant: a map comes only from swap space whose header is whole and in which
no hibernated system lies.

Structures: `union swap_header` of Linux, include/linux/swap.h; mm/swapfile.c (`read_swap_header`);
signatures of hibernation: kernel/power/swap.c (`S1SUSPEND`), util-linux libblkid/src/superblocks/swap.c.
"""

from __future__ import annotations

import struct

from msgspec import Struct

from imager.device.window import Readable, Window
from imager.extents import Extents
from imager.filesystem.used import Unknown, Used

_PAGES = (4096, 8192, 16384, 32768, 65536)
_SUSPENDED = (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001", b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c")


class Header(Struct, frozen=True):
    """The first page. `page`: bytes of one, `pages`: how many there are, `suspended`: a system lies in it."""

    page: int
    version: int
    pages: int
    uuid: bytes
    label: str
    bad_pages: int
    suspended: bool


def read_header(window: Readable) -> Header | None:
    """The header of swap space, of whatever page size; None where there is none. Raises `OSError`."""
    for page in _PAGES:
        raw = window.read(0, page)
        if len(raw) < page:
            return None
        magic = raw[-10:]
        suspended = magic.startswith(_SUSPENDED)
        if magic in (b"SWAPSPACE2", b"SWAP-SPACE") or suspended:
            version, last, bad = struct.unpack_from("<III", raw, 1024)
            if magic == b"SWAP-SPACE":
                return Header(page, 0, 0, bytes(16), "", 0, False)
            label = raw[1052:1068].split(b"\0")[0].decode(errors="replace")
            return Header(page, version, last + 1, raw[1036:1052], label, bad, suspended)
    return None


def probe(fd: int, size: int, *, start: int = 0, sector: int = 512) -> str | None:
    """`swap`, or None."""
    try:
        return "swap" if read_header(Window(fd, start, size)) else None
    except OSError:
        return None


def used_blocks(fd: int, size: int, *, start: int = 0, sector: int = 512) -> Used | Unknown:
    """Its map; see `used.Reader`."""
    try:
        header = read_header(Window(fd, start, size))
    except OSError as error:
        return Unknown(f"its header cannot be read: {error.strerror}")
    if header is None:
        return Unknown("it has no header of swap space")
    if header.suspended:
        return Unknown("a hibernated system lies in it")
    if header.version != 1:
        return Unknown("it is swap space of an old version, or of another byte order")
    if not 1 < header.pages <= size // header.page:
        return Unknown("its header names a size that is not its partition's")
    tail = max(header.pages * header.page, size - (1 << 20))
    # What stands behind it may be somebody else's, as the superblock of a RAID is.
    return Used(Extents.of([(0, header.page), (tail, size)]), "of swap space, only the header")
