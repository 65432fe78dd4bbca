"""Any sequence of images comes back exactly: every set of it, not only the last.

Two readers prove it, the engine and the reference reader, after whatever was
grown, shrunk, overwritten, zeroed, punched or moved between the backups, with
whatever block size, codec, encryption and source of changes.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from imager.events import Silent
from tests.workbench import MEMORY, Workbench, json_map, state_in

KIB = 1024
PAGE = 4096

EXAMPLES = int(os.environ.get("IMAGER_TEST_EXAMPLES", "25"))
"More by this variable; each example is a repository with several sets."
MANY = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)


@contextmanager
def bench(**options: object) -> Iterator[Workbench]:
    folder = Path(tempfile.mkdtemp(dir=MEMORY, prefix="imager-round-trip-"))
    try:
        with state_in(folder / "state"):
            yield Workbench(folder, **options)  # type: ignore[arg-type]
    finally:
        shutil.rmtree(folder)


# --- sequences of images --------------------------------------------------------------------

SIZES = st.one_of(
    st.sampled_from([0, 1, 511, 512, 513, 4095, 4096, 4097, 65535, 65536, 65537, 256 * PAGE, 257 * PAGE]),
    st.integers(0, 3 << 20),
)


@dataclass(frozen=True)
class Edit:
    """One change of an image. `at` and `length` are shares of its size, in 1/1000; `seed` makes content."""

    kind: str
    at: int
    length: int
    seed: int
    size: int


EDITS = st.builds(
    Edit,
    kind=st.sampled_from(
        ["overwrite", "scatter", "zero", "punch", "swap", "repeat", "grow", "resize", "same"]
    ),
    at=st.integers(0, 1000),
    length=st.integers(0, 1000),
    seed=st.integers(0, 1 << 16),
    size=SIZES,
)


def apply(path: Path, edit: Edit) -> list[tuple[int, int]]:
    """Change the file; (start, length) of all that may have changed, in bytes."""
    size = path.stat().st_size
    chance = random.Random(edit.seed)
    start = size * edit.at // 1000
    length = min(size - start, size * edit.length // 1000 // 4 + 1) if size else 0
    fd = os.open(path, os.O_RDWR)
    try:
        match edit.kind:
            case "overwrite":
                os.pwrite(fd, chance.randbytes(length), start)
                return [(start, length)]
            case "scatter":
                pages = [chance.randrange(-(-size // PAGE)) * PAGE for _ in range(5)] if size else []
                for at in pages:
                    os.pwrite(fd, chance.randbytes(min(PAGE, size - at)), at)
                return [(at, min(PAGE, size - at)) for at in pages]
            case "zero":
                os.pwrite(fd, bytes(length), start)
                return [(start, length)]
            case "punch":
                data = os.pread(fd, size, 0)
                os.ftruncate(fd, 0)
                os.ftruncate(fd, size)
                os.pwrite(fd, data[:start], 0)
                os.pwrite(fd, data[start + length :], start + length)
                return [(start, length)]
            case "swap":
                a, b = os.pread(fd, PAGE, 0), os.pread(fd, PAGE, start)
                if len(a) == len(b) == PAGE and start >= PAGE:
                    os.pwrite(fd, b, 0)
                    os.pwrite(fd, a, start)
                    return [(0, PAGE), (start, PAGE)]
                return []
            case "repeat":
                # Content that is there already, at other places.
                data = os.pread(fd, min(length, 64 * KIB), 0)
                os.pwrite(fd, data, start)
                end = min(size, start + len(data))
                os.ftruncate(fd, size)
                return [(start, end - start)]
            case "grow":
                more = os.pwrite(fd, chance.randbytes(min(edit.size, 256 * KIB)), size)
                return [(size, more)]
            case "resize":
                os.ftruncate(fd, edit.size)
                return [(min(size, edit.size), abs(size - edit.size))]
    finally:
        os.close(fd)
    return []


def first_image(path: Path, size: int, seed: int) -> None:
    """Random, repeated and zero stretches, and holes."""
    chance = random.Random(seed)
    with path.open("wb") as file:
        at = 0
        while at < size:
            run = min(size - at, chance.choice((512, PAGE, 3 * PAGE, 64 * KIB, 300 * KIB)))
            kind = chance.random()
            if kind < 0.4:
                file.seek(at)
                file.write(chance.randbytes(run))
            elif kind < 0.6:
                file.seek(at)
                file.write((b"the same again  " * (run // 16 + 1))[:run])
            elif kind < 0.7:
                file.seek(at)
                file.write(bytes(run))
            at += run
        file.truncate(size)


# --- the property -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One backup: after which edits, and how."""

    edits: list[Edit]
    changed: str
    strategy: str
    compression: str


STEPS = st.builds(
    Step,
    edits=st.lists(EDITS, max_size=3),
    changed=st.sampled_from(["none", "map", "map", "wide"]),
    strategy=st.sampled_from(["auto", "auto", "full", "incremental", "differential"]),
    compression=st.sampled_from(["none", "lz4", "zstd", "zstd:3"]),
)


Ranges = list[tuple[int, int]]


def back_up(place: Workbench, image: Path, step: Step, edited: Ranges, since_full: Ranges) -> str:
    """Back up; the map names what was edited since the base, or more than that."""
    extents = since_full if step.strategy == "differential" else edited
    changed = None
    if step.changed != "none":
        if step.changed == "wide" and image.stat().st_size:
            extents = [*extents, (0, 1), (image.stat().st_size // 2, 1)]
        size = image.stat().st_size
        extents = [(start, min(length, size - start)) for start, length in extents if start < size]
        changed = str(json_map(place.folder / "map", extents, size=size))
    return place.backup(
        image, name="d", strategy=step.strategy, compression=step.compression, changed=changed
    ).set


@MANY
@given(
    size=SIZES,
    seed=st.integers(0, 1 << 16),
    block_size=st.sampled_from([4 * KIB, 8 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB]),
    encryption=st.sampled_from(["none", "keyfile"]),
    steps=st.lists(STEPS, min_size=1, max_size=4),
)
def test_any_sequence_of_images_comes_back(
    size: int, seed: int, block_size: int, encryption: str, steps: list[Step]
) -> None:
    with bench(encryption=encryption, block_size=block_size) as place:
        image = place.folder / "image"
        first_image(image, size, seed)
        kept = {place.backup(image, name="d").set: image.read_bytes()}
        edited: list[tuple[int, int]] = []
        since_full: list[tuple[int, int]] = []
        for step in steps:
            edited = [extent for edit in step.edits for extent in apply(image, edit)]
            since_full += edited
            one = back_up(place, image, step, edited, since_full)
            if place.manifest(one).body.strategy == "full":  # type: ignore[union-attr]
                since_full = []
            kept[one] = image.read_bytes()
            place.is_whole([one])
        old = random.Random(seed).randbytes(len(image.read_bytes()) + 5000)
        for one, content in kept.items():
            place.gives(one, {"image": content}, old=old[: len(content) + seed % 5000])
        place.is_whole(kept)


# --- streams ---------------------------------------------------------------------------------------


@contextmanager
def piped(folder: Path, data: bytes) -> Iterator[Path]:
    """A named pipe that a thread writes `data` to."""
    path = folder / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb") as pipe:
            pipe.write(data)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        yield path
    finally:
        writer.join()
        path.unlink()


@settings(MANY, max_examples=max(8, EXAMPLES // 3))
@given(
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    seed=st.integers(0, 1 << 16),
    block_size=st.sampled_from([4 * KIB, 64 * KIB, 1024 * KIB]),
    codec=st.sampled_from(["none", "lz4", "zstd"]),
)
def test_streams_come_back(sizes: list[int], seed: int, block_size: int, codec: str) -> None:
    with bench(block_size=block_size) as place:
        kept: dict[str, bytes] = {}
        whole = random.Random(seed).randbytes(max(sizes) // 2) + bytes(max(sizes))
        for number, size in enumerate(sizes):
            changed = bytearray(whole[:size])
            changed[size // 3 : size // 3 + number] = b"x" * len(changed[size // 3 : size // 3 + number])
            content = bytes(changed)
            with piped(place.folder, content) as pipe:
                kept[place.backup(pipe, name="d", compression=codec).set] = content
        for one, content in kept.items():
            place.gives(one, {"d": content})
        place.is_whole(kept)


@pytest.mark.slow
def test_a_stream_that_passes_the_size_of_its_base() -> None:
    """The base ends where one read of the stream ends: what comes after must not be taken for its end."""
    step = 32 << 20
    with bench(block_size=64 * KIB) as place:
        old = random.Random(1).randbytes(1 << 20) * 64
        for content in (old, old + old[:step] + b"tail", old[:step], old[: step + 1], old):
            with piped(place.folder, content) as pipe:
                one = place.backup(pipe, name="d").set
            place.gives(one, {"d": content}, reference=False)
            place.is_whole([one], read_data=None)


# --- several sources -----------------------------------------------------------------------------


@settings(MANY, max_examples=max(8, EXAMPLES // 3))
@given(
    sizes=st.lists(SIZES, min_size=2, max_size=3),
    seed=st.integers(0, 1 << 16),
    block_size=st.sampled_from([4 * KIB, 64 * KIB]),
    edits=st.lists(EDITS, max_size=3),
    encryption=st.sampled_from(["none", "keyfile"]),
)
def test_several_sources_in_one_set(
    sizes: list[int], seed: int, block_size: int, edits: list[Edit], encryption: str
) -> None:
    with bench(encryption=encryption, block_size=block_size) as place:
        images = [place.folder / f"image-{number}" for number in range(len(sizes))]
        for image, size in zip(images, sizes, strict=True):
            first_image(image, size, seed)  # The same seed: they share content.
        kept = {}
        for _ in range(2):
            one = place.backup(*images, name="d").set
            kept[one] = {image.name: image.read_bytes() for image in images}
            for edit, image in zip(edits, images, strict=False):
                apply(image, edit)
        # A disk less, in another order.
        one = place.backup(*images[:0:-1], name="d").set
        kept[one] = {image.name: image.read_bytes() for image in images[1:]}
        for one, wanted in kept.items():
            place.gives(one, wanted, old=b"other" * 1000)
        place.is_whole(kept)


# --- maps that are wrong -------------------------------------------------------------------------


@settings(MANY, max_examples=max(8, EXAMPLES // 3))
@given(
    blocks=st.integers(20, 600),
    share=st.integers(1, 100),
    named=st.integers(0, 10),
    seed=st.integers(0, 1 << 16),
)
def test_a_map_that_leaves_changes_out(blocks: int, share: int, named: int, seed: int) -> None:
    """It is found out, and then all is read; or else what was stored is at least sound."""
    chance = random.Random(seed)
    with bench(block_size=PAGE) as place:
        image = place.folder / "image"
        image.write_bytes(chance.randbytes(blocks * PAGE))
        first, old = place.backup(image, name="d").set, image.read_bytes()
        changed = sorted(chance.sample(range(blocks), -(-blocks * share // 100)))
        with image.open("r+b") as file:
            for block in changed:
                file.seek(block * PAGE)
                file.write(chance.randbytes(PAGE))
        told, silent = changed[:named], changed[named:]
        reporter = Silent()
        path = json_map(place.folder / "map", [(block * PAGE, PAGE) for block in told])
        summary = place.backup(image, name="d", changed=str(path), reporter=reporter)
        if summary.images[0].change_source == "holes":
            assert "is wrong and is not used" in reporter.warnings[0]
            expected = image.read_bytes()
        else:
            # Sixteen blocks are looked at: half of the silent changes would never pass, a few may.
            assert len(silent) < (blocks - len(told)) // 2 or not silent
            patched = bytearray(old)
            for block in told:
                patched[block * PAGE : (block + 1) * PAGE] = image.read_bytes()[block * PAGE :][:PAGE]
            expected = bytes(patched)
        place.gives(summary.set, {"image": expected})
        place.is_whole([first, summary.set])


# --- sizes and levels ----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4095, 4096, 4097, 8191, 65535, 65537, 256 * PAGE + 1])
def test_every_size_and_its_neighbours(size: int) -> None:
    """From a size to a byte more, to a byte less, with and without bytes in the tail."""
    with bench(block_size=PAGE) as place:
        image = place.folder / "image"
        data = random.Random(size).randbytes(size + 2)
        kept = {}
        for content in (data[:size], data[: size + 1], data[: max(0, size - 1)], bytes(size), data[:size]):
            image.write_bytes(content)
            for _ in range(2):
                one = place.backup(image, name="d").set
                kept[one] = content
        for one, content in kept.items():
            place.gives(one, {"image": content}, old=b"x" * (size + 7))
        place.is_whole(kept)


def test_the_tail_block_alone_changes() -> None:
    with bench(block_size=64 * KIB) as place:
        image = place.folder / "image"
        data = random.Random(3).randbytes(300_001)
        image.write_bytes(data)
        place.backup(image, name="d")
        image.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        path = json_map(place.folder / "map", [(300_000, 1)], size=300_001)
        found = place.backup(image, name="d", changed=str(path)).images[0]
        assert (found.blocks_changed, found.blocks_new) == (1, 1)
        place.gives("d", {"image": image.read_bytes()})


@pytest.mark.parametrize("encryption", ["none", "keyfile"])
def test_across_the_borders_of_levels(encryption: str) -> None:
    """256 to 257 blocks, 65536 to 65537 and back: one, two and three levels over the same content."""
    with bench(encryption=encryption, block_size=PAGE) as place:
        image = place.folder / "image"
        kept: list[tuple[str, Path]] = []
        chance = random.Random(5)
        image.touch()
        steps = (255, 256, 257, 256, 1, 65535, 65536, 65537, 65536, 131073, 65537, 257)
        for number, blocks in enumerate(steps):
            os.truncate(image, blocks * PAGE)
            with image.open("r+b") as file:
                for at in (0, blocks // 2, blocks - 1):
                    file.seek(at * PAGE)
                    file.write(chance.randbytes(PAGE))
            one = place.backup(image, name="d").set
            copy = place.folder / f"copy-{number}"
            subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
            kept.append((one, copy))
            again = place.backup(image, name="d").set
            assert place.manifest(again).images[0].root == place.manifest(one).images[0].root
        for one, copy in kept:
            place.gives(one, {"image": copy})
        place.is_whole([one for one, _ in kept])
