"""Random damage to random objects: every command ends as documented, and gives out nothing wrong.

IMAGER_FUZZ=N multiplies the number of examples.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.damage.workshop import (
    MIB,
    Place,
    World,
    patched,
    read_back,
    restored,
    right_or_zero,
    with_footer_sum,
    with_header_sum,
    write,
)

TIMES = int(os.environ.get("IMAGER_FUZZ", "1"))
DOCUMENTED = {0, 1, 2, 3, 10, 11, 12, 30}
MEMORY = 1 << 30
"Address space that a command may take on top of what this process has."
SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Blow:
    """One change to one file, both chosen by numbers in [0, 1)."""

    what: str
    which: float
    at: float
    more: bytes
    other: float


BLOWS = st.builds(
    Blow,
    st.sampled_from(["flip", "cut", "extend", "swap", "overwrite", "empty", "delete", "number", "resum"]),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=40),
    st.floats(0, 1, exclude_max=True),
)


def strike(root: Path, blow: Blow) -> None:
    """Do what a blow says; one that does not fit its file does nothing."""
    # By kind first: or nearly all of them would hit packs.
    kinds = sorted(path for path in root.iterdir() if path.is_file() or any(path.rglob("*")))
    kind = kinds[int(blow.which * len(kinds))]
    files = sorted(path for path in kind.rglob("*") if path.is_file()) if kind.is_dir() else [kind]
    if not files:
        return
    path = files[int(blow.other * len(files))]
    data = path.read_bytes()
    at = int(blow.at * len(data))
    if blow.what == "delete":
        path.unlink()
    elif blow.what == "swap":
        other = files[int(blow.at * len(files))]
        write(path, other.read_bytes())
        write(other, data)
    elif blow.what == "cut":
        write(path, data[:at])
    elif blow.what == "empty":
        write(path, b"")
    elif blow.what == "extend":
        write(path, data + blow.more)
    elif data and blow.what == "flip":
        write(path, patched(data, at, bytes([data[at] ^ (1 << blow.more[0] % 8)])))
    elif data and blow.what == "overwrite":
        write(path, patched(data, at, blow.more[: len(data) - at]))
    elif len(data) > 200 and blow.what == "number":
        # A field of the first or last bytes becomes very large, or zero.
        at = at % 64 if blow.more[0] & 1 else len(data) - 1 - at % 64
        data = patched(data, at, (b"\xff\xff\xff\x7f" if blow.more[0] & 2 else bytes(4))[: len(data) - at])
        write(path, with_footer_sum(with_header_sum(data)) if kind.name in ("packs", "maps") else data)
    elif len(data) > 200 and blow.what == "resum" and kind.name in ("packs", "maps"):
        data = patched(data, at, blow.more[: len(data) - at])
        write(path, with_footer_sum(with_header_sum(data)))


@pytest.fixture
def bounded() -> Iterator[None]:
    """What needs much more memory than a small repository takes fails here."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def settled(examples: int) -> settings:
    return settings(
        max_examples=examples * TIMES,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        print_blob=True,
    )


@settled(40)
@given(blows=st.lists(BLOWS, min_size=1, max_size=3))
def test_any_damage(
    world: World, quick: Path, bounded: None, monkeypatch: pytest.MonkeyPatch, blows: list[Blow]
) -> None:
    folder = Path(tempfile.mkdtemp(dir=quick))
    try:
        place = world.place.copy(folder / "copy")
        for key, value in place.environment().items():
            monkeypatch.setenv(key, value)
        for blow in blows:
            strike(place.root, blow)
        everything(place, world)
    finally:
        shutil.rmtree(folder)


def everything(place: Place, world: World) -> None:
    begun = time.monotonic()
    for verb in (["list"], ["show", "machine"], ["check"], ["diff", *list(world.sets.values())[:2]]):
        assert place.imager(*verb).code in DOCUMENTED, verb
    check = place.imager("check", "--read-data")
    assert check.code in DOCUMENTED
    for disk, data in world.contents.items():
        verify = place.imager("verify", disk[0])
        assert verify.code in (0, 1, 10, 12, 30)
        ended, out = restored(place, disk, place.folder / "out")
        if ended.code == 0:
            assert out == data
            assert verify.code == 0 or verify.summary["damage"]  # another disk of the set
        else:
            assert ended.code in (1, 10, 12, 30), ended
            assert out is None or (right_or_zero(out, data) and not any(out[:MIB]))
            assert check.code != 0, f"check finds nothing, and yet: {ended.err}"
        reference = read_back(place, disk, place.folder / "reference")
        assert reference in (None, data)
        if ended.code == 0:
            assert reference == data
    repaired = place.imager("check", "--read-data", "--repair")
    assert repaired.code in DOCUMENTED
    source = place.folder / "alpha.img"
    source.write_bytes(world.contents[world.sets["third"], "alpha.img"])
    ended = place.imager("backup", source, "--name", "machine")
    if ended.code == 0:
        new = ended.summary["set"]
        assert place.imager("verify", new).code == 0
        assert restored(place, (new, "alpha.img"), place.folder / "out")[1] == source.read_bytes()
        assert read_back(place, (new, "alpha.img"), place.folder / "reference") == source.read_bytes()
    else:
        # Only where the repository does not open, or has no key epoch to write with.
        assert ended.code in (10, 12, 30) and check.code != 0, ended
    assert time.monotonic() - begun < SECONDS
