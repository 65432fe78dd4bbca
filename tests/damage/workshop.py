"""A small repository whose every byte is known, to be damaged in copies.

What a damage costs is worked out here from the undamaged repository, read by
`imager.reference`: nothing of the code that is tested takes part.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from imager import reference
from imager.cli.main import run
from imager.repository.repository import place_of

BLOCK = 4096
MIB = 1 << 20
HEAD, ENTRY, FOOTER = 64, 96, 32
Disk = tuple[str, str]
"(set id, disk)"
Losses = dict[Disk, list[tuple[int, int]]]
"What is lost of which disk, as (start, length) in bytes, joined."


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def summary(self) -> dict[str, Any]:
        """The last line of `--json`."""
        document: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return document


@dataclass(frozen=True, slots=True)
class Place:
    """A folder with a repository `r`, what a machine remembers of it, and its keyfile.

    `url`: where the command finds that repository, if not in the folder itself.
    """

    folder: Path
    url: str = ""

    @property
    def root(self) -> Path:
        return self.folder / "r"

    def environment(self) -> dict[str, str]:
        return {
            "IMAGER_STATE_DIR": str(self.folder / "state"),
            "IMAGER_CACHE_DIR": str(self.folder / "cache"),
            "IMAGER_KEYFILE": str(self.folder / "key"),
        }

    def imager(self, *arguments: str | Path) -> Ended:
        """Run the command within this process, as `main` does; never a trace, never an unforeseen error."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(["--json", "-r", self.url or str(self.root), *map(str, arguments)])
        ended = Ended(code, out.getvalue(), err.getvalue())
        assert "Traceback" not in ended.err and "internal error" not in ended.err, ended.err
        return ended

    def reference(self) -> reference.Repository:
        """The same, opened by the reference reader."""
        return reference.Repository(str(self.root), keyfile=(self.folder / "key").read_bytes())

    def copy(self, folder: Path) -> Place:
        shutil.copytree(self.folder, folder, ignore=shutil.ignore_patterns("*.img"))
        other = Place(folder)
        for memory in (folder / "state" / "witness").glob("*.json"):
            # A machine remembers a repository by its place: this one has seen the copy where it is now.
            memory.rename(
                memory.with_name(f"{place_of(bytes.fromhex(memory.stem[:32]), str(other.root))}.json")
            )
        return other

    def files(self, kind: str) -> list[Path]:
        """The objects of a folder of the repository, sorted by name."""
        return sorted(path for path in (self.root / kind).rglob("*") if path.is_file())


@dataclass(frozen=True, slots=True)
class Page:
    """A map page: where its record lies, the blocks that it covers, and what is below."""

    pack: bytes
    offset: int
    first: int
    count: int
    children: tuple[Page, ...] = ()
    blocks: tuple[tuple[int, reference.Target], ...] = ()


@dataclass
class World:
    """An undamaged repository, what is in its sets, and where."""

    place: Place
    sealed: bool
    sets: dict[str, str] = field(default_factory=dict)
    "name in the tests -> set id"
    contents: dict[Disk, bytes] = field(default_factory=dict)
    packs: dict[str, list[bytes]] = field(default_factory=dict)
    "name in the tests -> data packs that this set added"
    maps: dict[str, list[bytes]] = field(default_factory=dict)
    index: dict[str, list[str]] = field(default_factory=dict)

    @cached_property
    def trees(self) -> dict[Disk, Page]:
        """The block map of every disk."""
        repository = self.place.reference()
        out = {}
        for set_id in self.sets.values():
            for image in repository.images(repository.resolve(set_id)):
                assert image.root is not None
                blocks = -(-image.size // image.block_size)
                out[set_id, image.disk] = _tree(
                    repository, image.root, reference.top_level(blocks), 0, blocks
                )
        return out

    def records(self, pack: bytes, kind: int = reference.BLOCK) -> list[reference.Target]:
        """The records of a pack, in their order."""
        return self.place.reference()._records(kind, pack)

    def losses(self, lost: set[tuple[bytes, int]]) -> Losses:
        """What of which disk is lost with these records, (pack, offset)."""
        out: Losses = {}
        for disk, tree in self.trees.items():
            blocks = sorted(_below(tree, lost))
            if blocks:
                out[disk] = joined(blocks, len(self.contents[disk]))
        return out


def _tree(
    repository: reference.Repository, target: reference.Target, level: int, first: int, blocks: int
) -> Page:
    span = 256**level
    public, sealed, pack = repository.read(reference.PAGE, target)
    slots = min(256, -(-(blocks - first) // span))
    children, data = [], []
    at = first
    for length, targets in reference.parse_page(public, sealed, level, first, slots, pack):
        for index, below in enumerate(targets):
            if level:
                children.append(_tree(repository, below, level - 1, at + index * span, blocks))
            else:
                data.append((at + index, below))
        at += length * span
    count = min(span * 256, blocks - first)
    return Page(pack, target.offset, first, count, tuple(children), tuple(data))


def _below(page: Page, lost: set[tuple[bytes, int]]) -> Iterator[int]:
    if (page.pack, page.offset) in lost:
        yield from range(page.first, page.first + page.count)
        return
    for child in page.children:
        yield from _below(child, lost)
    yield from (block for block, target in page.blocks if (target.pack, target.offset) in lost)


def joined(blocks: list[int], size: int) -> list[tuple[int, int]]:
    """Block numbers, ascending, as extents (start, length) in bytes of an image of `size`."""
    out: list[tuple[int, int]] = []
    for block in blocks:
        start, end = block * BLOCK, min((block + 1) * BLOCK, size)
        if out and sum(out[-1]) == start:
            out[-1] = (out[-1][0], end - out[-1][0])
        else:
            out.append((start, end - start))
    return out


def united(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extents (start, length), sorted, those that touch or overlap joined."""
    out: list[tuple[int, int]] = []
    for start, length in sorted(extents):
        if out and start <= sum(out[-1]):
            out[-1] = (out[-1][0], max(sum(out[-1]), start + length) - out[-1][0])
        else:
            out.append((start, length))
    return out


# --- building -----------------------------------------------------------------------------


def build(folder: Path, *, sealed: bool) -> World:
    """Sets `first`, `second`, `third` of a machine with the disks alpha and beta, and `other` with gamma.

    alpha has 400 blocks in two leaves, of which some hold random data, some repeat, most are zero;
    beta is smaller than a leaf and ends in the middle of a block; gamma shares blocks with alpha.
    """
    chance = random.Random(7)
    folder.mkdir()
    place = Place(folder)
    (folder / "key").write_bytes(chance.randbytes(64))
    world = World(place, sealed)
    encryption = "keyfile" if sealed else "none"
    assert place.imager("init", place.root, "--encryption", encryption, "--block-size", "4KiB").code == 0

    alpha = bytearray(400 * BLOCK)
    for block in (*range(3, 23), 40, 41, 100, 101, *range(250, 262), 300, 399):
        alpha[block * BLOCK : (block + 1) * BLOCK] = chance.randbytes(BLOCK)
    for block in (60, 61, 350):
        alpha[block * BLOCK : (block + 1) * BLOCK] = alpha[3 * BLOCK : 4 * BLOCK]
    beta = bytearray(chance.randbytes(9 * BLOCK + 700))
    _back_up(world, "first", alpha=alpha, beta=beta)
    for block in (5, 6, 258, 120):
        alpha[block * BLOCK : (block + 1) * BLOCK] = chance.randbytes(BLOCK)
    _back_up(world, "second", alpha=alpha, beta=beta)
    for block in (6, 10, 302):
        alpha[block * BLOCK : (block + 1) * BLOCK] = chance.randbytes(BLOCK)
    beta[2 * BLOCK : 3 * BLOCK] = chance.randbytes(BLOCK)
    _back_up(world, "third", alpha=alpha, beta=beta)
    gamma = chance.randbytes(6 * BLOCK) + alpha[3 * BLOCK : 6 * BLOCK] + bytes(20 * BLOCK)
    _back_up(world, "other", gamma=bytearray(gamma))
    return world


def _back_up(world: World, name: str, **disks: bytearray) -> None:
    place = world.place
    before = {kind: set(place.files(kind)) for kind in ("packs", "maps", "index")}
    sources = []
    for disk, data in disks.items():
        source = place.folder / f"{disk}.img"
        source.write_bytes(data)
        sources.append(source)
    lineage = "other" if name == "other" else "machine"
    ended = place.imager("backup", *sources, "--name", lineage)
    assert ended.code == 0, ended.err
    set_id = ended.summary["set"]
    world.sets[name] = set_id
    for disk, data in disks.items():
        world.contents[set_id, f"{disk}.img"] = bytes(data)
    new = {kind: sorted(set(place.files(kind)) - before[kind]) for kind in before}
    # The larger disk's pack first.
    world.packs[name] = [bytes.fromhex(p.name) for p in sorted(new["packs"], key=lambda p: -p.stat().st_size)]
    world.maps[name] = [bytes.fromhex(p.name) for p in sorted(new["maps"], key=lambda p: -p.stat().st_size)]
    world.index[name] = [p.name for p in new["index"]]


# --- the bytes of packs --------------------------------------------------------------------


def pack_path(root: Path, kind: str, name: bytes) -> Path:
    """`kind`: packs or maps."""
    return root / kind / name.hex()[:2] / name.hex()


def header_length(pack: bytes) -> int:
    return int.from_bytes(pack[12:16], "little")


def trailer_at(pack: bytes) -> int:
    return int.from_bytes(pack[-16:-8], "little")


def with_header_sum(pack: bytes) -> bytes:
    """The pack with a header whose checksum fits again."""
    length = 72 + 104 * int.from_bytes(pack[56:58], "little")
    return pack[: length - 8] + xxhash.xxh3_64_digest(pack[: length - 8])[::-1] + pack[length:]


def with_head_sum(pack: bytes, offset: int) -> bytes:
    """The pack with a record head at `offset` whose checksum fits again."""
    check = struct.pack("<I", xxhash.xxh3_64_intdigest(pack[offset : offset + 60]) & 0xFFFFFFFF)
    return pack[: offset + 60] + check + pack[offset + 64 :]


def with_footer_sum(pack: bytes) -> bytes:
    """The pack with a footer whose checksum fits again."""
    return pack[:-8] + xxhash.xxh3_64_digest(pack[-32:-8])[::-1]


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """`data` with `new` written over it at `at`."""
    assert 0 <= at and at + len(new) <= len(data)
    return data[:at] + new + data[at + len(new) :]


def flipped(data: bytes, at: int, bit: int = 0) -> bytes:
    """`data` with one bit turned."""
    return patched(data, at, bytes([data[at] ^ 1 << bit]))


def write(path: Path, data: bytes) -> None:
    """Replace an object, as no writer ever does."""
    path.chmod(0o600)
    path.write_bytes(data)


def right_or_zero(written: bytes, right: bytes) -> bool:
    """Whether every block is the right one, or empty: nothing wrong was given out as good."""
    if len(written) != len(right):
        return False
    return all(
        written[at : at + BLOCK] in (right[at : at + BLOCK], bytes(len(right[at : at + BLOCK])))
        for at in range(0, len(right), BLOCK)
    )


def restored(place: Place, disk: Disk, out: Path) -> tuple[Ended, bytes | None]:
    """Restore a disk into a new file: how it ended, and what the file has (None: there is none)."""
    out.unlink(missing_ok=True)
    ended = place.imager("restore", f"{disk[0]}:{disk[1]}", out)
    return ended, out.read_bytes() if out.exists() else None


def read_back(place: Place, disk: Disk, out: Path) -> bytes | None:
    """The disk by the reference reader; None where it says that something is damaged."""
    out.unlink(missing_ok=True)
    key = str(place.folder / "key")
    before = os.environ.get("IMAGER_KEYFILE")
    os.environ["IMAGER_KEYFILE"] = key
    try:
        reference.read_image(str(place.root), disk[0], str(out), disk[1])
    except reference.ReadError:
        assert not out.exists()
        return None
    finally:
        if before is None:
            del os.environ["IMAGER_KEYFILE"]
        else:
            os.environ["IMAGER_KEYFILE"] = before
    return out.read_bytes()
