"""Damaged filesystems, as Python sees them: a map within the partition, or a reason; never an exception.

The core's own fuzzer (native/src/fs/samples.rs) goes deeper: it makes checksums true again.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imager.filesystem import maps
from imager.filesystem.used import Unknown, Used
from tests.samples import KINDS, PAGE, UNREPLAYED, Sample

EXAMPLES = 150 * int(os.environ.get("IMAGER_FUZZ", "1"))
NUMBERS = st.one_of(
    st.binary(min_size=1, max_size=8),
    st.sampled_from([0, 1, 2**31, 2**32 - 1]).map(lambda n: n.to_bytes(4, "big")),
    st.sampled_from([0, 1, 2**31, 2**32 - 1]).map(lambda n: n.to_bytes(4, "little")),
    st.sampled_from([2**62, 2**63, 2**64 - 1]).map(lambda n: n.to_bytes(8, "little")),
)
DAMAGE = st.tuples(
    st.one_of(st.integers(0, 20), st.integers(0, 300)),  # which page
    st.one_of(st.integers(0, 300), st.integers(1024, 1400), st.integers(0, PAGE - 8)),
    NUMBERS,
)


@pytest.fixture(scope="module")
def fd() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


@pytest.mark.parametrize("name", KINDS | UNREPLAYED)
def test_damage(name: str, fd: int) -> None:
    sample = Sample(name)
    os.ftruncate(fd, 0)
    sample.write(fd)
    numbers = list(sample.pages)

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(DAMAGE, min_size=1, max_size=4), st.sampled_from([0, 0, 0, 512, 65536]))
    def damaged(damages: list[tuple[int, int, bytes]], cut: int) -> None:
        for page, at, value in damages:
            os.pwrite(fd, value, numbers[page % len(numbers)] * PAGE + at)
        try:
            answer = maps.used_blocks(fd, 0, sample.size - cut)
        finally:
            for page, _, _ in damages:
                number = numbers[page % len(numbers)]
                os.pwrite(fd, sample.pages[number], number * PAGE)
        if isinstance(answer, Used):
            ranges = answer.extents.ranges
            assert all(0 <= start < end <= sample.size - cut for start, end in ranges)
            assert answer.extents == type(answer.extents).of(ranges)
        else:
            assert isinstance(answer, Unknown)
            assert 5 < len(answer.reason) < 200 and "\n" not in answer.reason

    damaged()
    assert isinstance(maps.used_blocks(fd, 0, sample.size), Used)


MEMORY = 64 << 20
"Bytes of address space that damage may take, beyond what the program has taken when it begins."
BOUNDED = """
import random, resource, sys, tempfile
from imager import _native
from imager.filesystem import maps
from imager.filesystem.used import Unknown, Used
from tests.damage.test_fuzz_filesystems import hostile
from tests.samples import Sample

file = tempfile.TemporaryFile()
for kind in maps.KINDS:
    maps.reader(kind)
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
try:
    bytearray(2 * int(sys.argv[1]))
except MemoryError:
    pass
else:
    sys.exit("there is no limit")
answers = {Used: 0, Unknown: 0}
for name in sys.argv[2:]:
    sample, chance = Sample(name), random.Random(name)
    for _ in range(120):
        hostile(file.fileno(), sample, chance)
        answers[type(maps.used_blocks(file.fileno(), 0, sample.size))] += 1
print(answers[Used], answers[Unknown])
"""


def hostile(fd: int, sample: Sample, chance: random.Random) -> None:
    """A sample whose numbers are made as large as they can be, one to eight of them, in its structures."""
    sample.write(fd)
    numbers = list(sample.pages)
    for _ in range(chance.randrange(1, 9)):
        page = chance.choice(numbers[: chance.choice((2, 20, len(numbers)))])
        at = chance.choice((0, 16, 64, 256, 1024, PAGE - 8)) + 4 * chance.randrange(200)
        value = chance.choice((b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\xff" * 3 + b"\x7f", b"\0\0\xff\xff"))
        os.pwrite(fd, value, page * PAGE + at % (PAGE - 4))


def test_damage_takes_little_memory_and_time() -> None:
    """In a process that may take no more: what asks for more dies there, and fails here."""
    argv = [sys.executable, "-c", BOUNDED, str(MEMORY), *KINDS, *UNREPLAYED]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    used, unknown = map(int, done.stdout.split())
    assert used > 50 and unknown > 50
