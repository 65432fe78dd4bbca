"""The native core: what Python calls. One Rust file under native/src/py/ for each group.

Every function that works on data releases the GIL and uses `threads` worker
threads. Numbers of blocks and offsets are absolute within the image.
"""

from collections.abc import Sequence
from typing import Protocol

__version__: str
DEBUG_BUILD: bool

# Types of a slot of the block map (docs/design/repository-format.md, section 6).
ZERO: int
UNUSED: int
UNREADABLE: int
DATA: int
UNKNOWN: int
"only in memory: compares unequal to everything"

class ReadError(OSError):
    """A source or a pack could not be read. errno (0: it ended early), strerror; filename: byte offset."""

class WriteError(OSError):
    """A pack or a target could not be written. errno, strerror; filename is the byte offset."""

class DamagedError(ValueError):
    """Repository bytes are not what was stored. args: (message,)."""

# --- digests -----------------------------------------------------------------

def blake3(data: bytes, key: bytes | None = None) -> bytes: ...
def blake3_derive(context: str, data: bytes) -> bytes: ...
def xxh3(data: bytes) -> int: ...

# --- seals ---------------------------------------------------------------------

def wrap(key: bytes, nonce: bytes, plain: bytes, data: bytes) -> bytes:
    """AES-256-GCM: ciphertext and tag; `data` is authenticated along with it."""

def unwrap(key: bytes, nonce: bytes, sealed: bytes, data: bytes) -> bytes | None:
    """What `wrap` sealed; None where it does not open."""

def x25519_public(private: bytes) -> bytes: ...
def x25519(private: bytes, public: bytes) -> bytes:
    """The shared secret (RFC 7748). Raises DamagedError for an all-zero one or no public key."""

def ed25519_public(seed: bytes) -> bytes: ...
def ed25519_sign(seed: bytes, message: bytes) -> bytes: ...
def ed25519_verify(public: bytes, signature: bytes, message: bytes) -> bool: ...

# --- names and keys ------------------------------------------------------------

class Names:
    """Pack names as small numbers, for one process. Thread-safe."""

    def intern(self, name: bytes) -> int: ...
    def reserve(self) -> int:
        """A number for a pack that is being written; `resolve` gives its name."""
    def resolve(self, number: int, name: bytes) -> None: ...
    def name(self, number: int) -> bytes | None: ...
    def set_present(self, names: Sequence[bytes]) -> None:
        """What the storage's listing shows; packs outside it count as absent from now on."""
    def absent(self) -> list[bytes]:
        """Names of the packs that the listing lacks, sorted; none where there was no listing."""
    def is_present(self, number: int) -> bool: ...

class Vault:
    """What is needed to make and open records of one repository."""

    def __init__(self, repository: bytes, id_key: bytes) -> None: ...
    def add_key(self, cipher: int, key: bytes) -> int:
        """Add a session key; returns its handle. cipher: 1 AES-256-GCM, 2 ChaCha20-Poly1305."""
    def block_id(self, content: bytes) -> bytes: ...
    def page_id(self, level: int, first: int, slots: Slots, names: Names, holder: int | None = None) -> bytes:
        """The id that a map page of these slots has in pack `holder` (None: in one that no slot refers to).

        Raises ValueError where a pack has no name yet."""
    def open_page(
        self, record: bytes, keys: Sequence[int | None], names: Names, holder: int
    ) -> tuple[bytes, int, int, Slots]:
        """Decode a map page record that lies in pack `holder`: (id, level, first block, slots).

        `keys`: handles by envelope number, None for a key that is not held. Raises DamagedError."""

def aes_is_fast() -> bool: ...

# --- slots: pieces of a block map ---------------------------------------------

class Slots:
    """Slots of consecutive blocks (level 0) or pages: type and, for data, id and place."""

    def __init__(self, count: int = 0, kind: int = 0) -> None: ...
    def __len__(self) -> int: ...
    def __eq__(self, other: object) -> bool:
        """Same types and ids; places may differ."""
    def uniform(self) -> int | None:
        """The type, if all slots have the same one and it is not DATA."""
    def slice(self, start: int, end: int) -> Slots: ...
    def copy(self) -> Slots: ...
    def put(self, at: int, other: Slots) -> None:
        """Overwrite from `at` on."""
    def fill(self, start: int, end: int, kind: int) -> None: ...
    def extend(self, other: Slots) -> None: ...
    def resize(self, count: int, kind: int) -> None: ...
    def set_data(self, at: int, id: bytes, pack: int, offset: int, length: int) -> None: ...
    def get(self, at: int) -> tuple[int, bytes, int, int, int]:
        """(type, id, pack number, offset, length)."""
    def runs(self) -> list[tuple[int, int, int]]:
        """(type, start, end) of each maximal run of one type."""
    def counts(self) -> tuple[int, int, int, int]:
        """How many slots are zero, unused, unreadable, data."""
    def same_places(self, other: Slots) -> bool:
        """Equal, and all records lie in the same places."""
    def drop_absent(self, names: Names) -> int:
        """Turn data slots whose pack the storage lacks into UNKNOWN, so that they compare as changed."""
    def relocate(self, names: Names, known: Known) -> int:
        """Where the storage lacks a data slot's pack, take the place that `known` has; how many it has."""
    def packs(self) -> list[int]:
        """Numbers of the packs referred to, each once."""

def diff_slots(a: Slots, b: Slots) -> list[tuple[int, int]]:
    """Ranges [start, end) of slots whose content differs; lengths must be equal."""

# --- packs ----------------------------------------------------------------------

def pack_envelopes(header: bytes, repository: bytes) -> list[bytes]:
    """Parse a pack's first bytes (72 + 104 n, at most 72 + 104*1024): its envelopes. Raises DamagedError."""

class PackWriter:
    """A pack being written to a file descriptor that is its own, from offset 0."""

    def __init__(
        self,
        vault: Vault,
        fd: int,
        *,
        kind: int,
        session: bytes,
        sequence: int,
        envelope: bytes | None,
        key: int | None,
        number: int,
    ) -> None: ...
    number: int
    size: int
    records: int
    def add_page(self, level: int, first: int, slots: Slots, names: Names) -> Slots:
        """Append a map page; returns its slot (one, DATA). Raises ValueError where a pack has no name yet."""
    def finish(self) -> tuple[bytes, int]:
        """Write trailer and footer: (name, size). The caller makes the file durable."""

class PackReport:
    ok: bool
    problem: str | None
    records: int
    damaged: list[tuple[bytes, int, int]]
    """(id, offset, length) of each damaged record, where trailer and name are whole."""

def check_pack(fd: int, name: bytes, repository: bytes, threads: int = 0) -> PackReport:
    """Check a whole pack without any key: name, header, trailer, every payload's digest."""

def pack_records(fd: int, name: bytes | None, repository: bytes) -> list[tuple[int, bytes, int, int]]:
    """(kind, id, offset, length) of each record, from the trailer. Raises DamagedError."""

# --- upkeep, without any key -----------------------------------------------------------

class Marks:
    """Which records live, by pack number. 8 bytes of memory for each. Thread-safe."""

    def __init__(self) -> None: ...
    def packs(self) -> list[int]:
        """Packs that hold live records."""
    def extent(self, pack: int) -> tuple[int, int, int]:
        """(live records, their bytes, bytes of those that a newest set needs)."""
    def offsets(self, pack: int, newest: bool) -> list[int]:
        """Where the live records begin, in order: those that a newest set needs, or the others."""
    def add(self, pack: int, offset: int, length: int, newest: bool) -> None:
        """A record lives."""
    def take_doubtful(self) -> list[tuple[bytes, list[tuple[int, int, int]], bool]]:
        """Blocks that are not where a map says and have several places, each once: (id, places, newest).

        None of the places (pack, offset, length) is marked yet."""
    lost: int
    """References to blocks that were found nowhere."""
    read: int
    """Bytes of the pages that were read."""
    pages: int
    """How many pages those are."""

class MapPack:
    """A map pack whose frame was read and checked, to take pages from."""

    def __init__(self, fd: int, name: bytes, repository: bytes) -> None:
        """Raises DamagedError, OSError."""
    def digest(self, offset: int) -> bytes | None:
        """Digest of the payload of the record that begins there."""
    def mark(
        self,
        fd: int,
        id: bytes,
        pack: int,
        offset: int,
        level: int,
        *,
        names: Names,
        known: Known,
        stranded: Known,
        marks: Marks,
        newest: bool,
    ) -> list[tuple[bytes, int, int, int]] | None:
        """Read the page `id` in this pack (number `pack`); mark it and, on level 0, its blocks.

        A block counts where the page says, if that pack is present in `names`; else where
        `known` has it (in several places: see `take_doubtful`), else where `stranded` has it. Returns
        (id, pack, offset, length) of the pages below, None where this record was read before. Raises
        DamagedError where another record lies there, or a damaged one; OSError."""

class Merged:
    """A pack put together out of others."""

    name: bytes | None
    "None: not one record could be copied, and nothing was written"
    size: int
    records: list[tuple[int, bytes, int, int]]
    "(kind, id, offset, length) of each record"
    damaged: list[tuple[int, int]]
    "(number within the sources, offset) of records that are damaged; they were left out"
    read: int
    "bytes read"

def merge_packs(
    fd: int,
    sources: Sequence[tuple[int, bytes, Sequence[int]]],
    *,
    kind: int,
    repository: bytes,
    session: bytes,
    sequence: int,
) -> Merged:
    """Write a pack of records as they are in other packs: (fd, name, offsets of the records, ascending).

    Raises DamagedError for a pack whose frame is damaged, WriteError, OSError."""

# --- what is stored already --------------------------------------------------------

class Known:
    """Where blocks are: this session's own, and index segments. Thread-safe."""

    def __init__(self, names: Names) -> None: ...
    def load(self, fd: int, repository: bytes, name: bytes = ...) -> int:
        """Search a segment too; its number of entries. Raises DamagedError. The fd may be closed after."""
    def unload(self, names: Sequence[bytes]) -> None:
        """Search these segments no longer."""
    loaded: list[tuple[bytes, int, int]]
    """(name, entries, bytes) of each segment, the largest first."""
    def naming(self, packs: Sequence[bytes]) -> list[bytes]:
        """The segments that name one of these packs."""
    def merge(self, names: Sequence[bytes], out: int, repository: bytes, forget: Sequence[bytes]) -> Merge:
        """Begin to merge loaded segments into an empty file that can be read too; it stays open until all
        is done. Packs of `forget` are neither named in it, nor their entries kept."""
    def add_pack(self, number: int, records: Sequence[tuple[int, bytes, int, int]]) -> None: ...
    def count(self, ids: bytes) -> int:
        """How many of many ids, one after the other, are known."""
    def find(self, id: bytes) -> tuple[int, int, int] | None:
        """(pack number, offset, length)."""
    def places(self, id: bytes) -> list[tuple[int, int, int]]:
        """Every place that is known, as `find` gives one: it may be stored more than once."""
    pending: int
    """Entries that no segment holds yet."""
    damaged_pages: int
    def segment(self, repository: bytes) -> bytes | None:
        """The pending entries whose packs have names, as an index segment's bytes.

        The caller stores it under B3("imager index v1" + bytes); then they are pending no more.
        They are found until `forget`, which comes once the segment is loaded."""
    def forget(self) -> None:
        """Free the memory of what segments were made of."""

class Merge:
    """A merge of index segments under way."""

    def step(self) -> int:
        """Go on for a while: the bytes handled, 0 once all is done. Raises ReadError, WriteError."""
    def outcome(self) -> tuple[bytes, int, int, int, int, int]:
        """(name, entries, packs, bytes, entries whose pack was gone, damaged pages). Raises ValueError
        before the end."""

# --- work ------------------------------------------------------------------------------

class Scan:
    """What `scan` found."""

    slots: Slots
    read: int
    "bytes read"
    zero: int
    "blocks found to be zero"
    changed: int
    "blocks that differ from base (all, where there is no base)"
    new: int
    "blocks stored"
    shared: int
    "changed blocks whose content the repository had"
    stored: int
    "bytes appended to the pack"
    unreadable: list[tuple[int, int]]
    "(start, length) in bytes"
    differing: list[tuple[int, int]]
    "ranges [start, end) of absolute block numbers that differ from base"

def scan(
    vault: Vault,
    source: int | bytes,
    ranges: Sequence[tuple[int, int]],
    *,
    image_size: int,
    block_size: int,
    base: Slots | None,
    pack: PackWriter | None = None,
    known: Known | None = None,
    codec: int = 1,
    level: int = 1,
    threads: int = 0,
    direct: bool = False,
    source_offset: int = 0,
    skip_errors: bool = False,
    sector: int = 512,
) -> Scan:
    """Read the blocks of `ranges` ([start, end) block numbers), compare, and store what is new.

    `base` has the slots of exactly these blocks, in order. With `pack` None nothing
    is stored: a comparison with `base`. A buffer as source starts at byte `source_offset` of the image.
    Raises ReadError (source), WriteError (pack)."""

class Gather:
    """Records to fetch, and the blocks that each of them fills."""

    def __init__(self) -> None: ...
    def add(self, first: int, slots: Slots) -> None: ...
    def add_ranges(self, first: int, slots: Slots, ranges: Sequence[tuple[int, int]]) -> None:
        """Only the slots whose block numbers lie in `ranges`."""
    def sort(self) -> None:
        """Into pack order; records wanted several times become one. Call once, after the last add."""
    def __len__(self) -> int:
        """Number of records (after sort)."""
    blocks: int
    stored: int
    "bytes of all records"
    def slice_end(self, start: int, max_blocks: int) -> int:
        """End of a slice of records from `start`: `max_blocks` blocks at most, one record at least."""
    def packs(self, start: int, end: int) -> list[int]: ...
    def spans(self, start: int, end: int, gap: int) -> list[tuple[int, int, int]]:
        """Where the records lie: (pack, start, end), joined over gaps of up to `gap` bytes.

        All between a pack's first and last of them where more than a quarter of that is wanted.
        """

class Failure:
    pack: int
    offset: int
    id: bytes
    blocks: list[int]
    reason: str

def fetch(
    vault: Vault,
    packs: dict[int, tuple[int, Sequence[int | None]]],
    gather: Gather,
    start: int,
    end: int,
    *,
    image_size: int,
    block_size: int,
    target: int | None = None,
    threads: int = 0,
) -> tuple[int, list[Failure]]:
    """Read, decrypt, decode and check records [start, end); write them to `target` where given.

    `packs`: number -> (fd, key handles by envelope number). Returns (bytes of image done,
    failures). A block that fails its check is never written. Raises WriteError (target)."""

def read_blocks(
    vault: Vault,
    packs: dict[int, tuple[int, Sequence[int | None]]],
    gather: Gather,
    *,
    image_size: int,
    block_size: int,
) -> list[tuple[int, bytes]]:
    """The contents of a few records: (block number, bytes). Raises DamagedError."""

def compare_files(
    a: int, b: int, start: int, end: int, *, grain: int = 4096, threads: int = 0, direct: bool = False
) -> list[tuple[int, int]]:
    """Extents [start, end) in bytes, in units of `grain`, where two files or devices differ."""

def non_zero(
    fd: int, start: int, end: int, *, direct: bool = False, threads: int = 0
) -> list[tuple[int, int]]:
    """Extents [start, end) of 4 KiB pages within the range that are not all zero."""

# --- images at random access ----------------------------------------------------------

class Supply(Protocol):
    """What a served image asks for. Called from several threads; what it raises becomes an I/O error."""

    def leaf(self, index: int) -> Slots:
        """The slots of the blocks from `256 * index` on."""
    def pack(self, number: int) -> tuple[int, Sequence[int | None]]:
        """(descriptor, key handles by envelope number) of a pack; the descriptor is the caller's to close."""
    def elsewhere(self, block: int, identity: bytes, place: tuple[int, int], reason: str) -> bytes:
        """The content of a block whose record is not whole at `place` (pack, offset)."""
    def changed(self) -> Sequence[tuple[int, int]]:
        """Byte ranges [start, end) that differ from the base set, sorted and apart."""

class ServedImage:
    """One image, read at any place.

    `room`: bytes of contents that are kept; `packs`: how many are open at a time;
    `based`: `changed` may be asked."""

    def __init__(
        self,
        vault: Vault,
        supply: Supply,
        *,
        image_size: int,
        block_size: int,
        room: int,
        packs: int,
        based: bool,
    ) -> None: ...

def serve_images(exports: Sequence[tuple[str, str, ServedImage, int, int]], listener: int, stop: int) -> None:
    """Serve NBD clients of a listening socket until `stop` can be read from.

    `exports`: (name, description, image, first byte, length). Raises ReadError where the socket fails."""

# --- filesystems --------------------------------------------------------------------

def fs_probe(kind: str, fd: int, start: int, size: int) -> str | None:
    """The common name of the filesystem in `[start, start + size)` by its magic; `kind`: ext, xfs, btrfs."""

def fs_used(kind: str, fd: int, start: int, size: int) -> tuple[list[tuple[int, int]] | None, str]:
    """Bytes in use, counted from `start`: (sorted, merged ranges, note), or (None, why there is no map).

    Reads whole 4 KiB pages into aligned memory, so `fd` may be open for direct I/O. At most 2^19
    ranges: beyond, those with the smallest gaps are joined."""
