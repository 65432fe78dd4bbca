from __future__ import annotations

import os
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from imager.device import mounts

Recorded = Callable[[str], str]


def test_mountinfo(recorded: Recorded) -> None:
    found = mounts.parse_mountinfo(recorded("mountinfo-laptop.txt"))
    assert [m.target for m in found] == [
        "/", "/boot/efi", "/srv/data disk", "/mnt/bound", "/merged", "/fuse", "/proc",
    ]  # fmt: skip
    assert found[0].dev == os.makedev(253, 1)
    assert (found[2].fstype, found[2].source, found[2].root) == ("btrfs", "/dev/sdc", "/@data")
    assert found[4].option("lowerdir", "upperdir") == ["/low\\:er:/boot/efi", "/srv/up"]


def test_swaps(recorded: Recorded) -> None:
    found = mounts.parse_swaps(recorded("swaps-laptop.txt"))
    assert [(s.path, s.kind) for s in found] == [
        ("/dev/nvme0n1p3", "partition"), ("/srv/swap file", "file"), ("/swap", "file"),
    ]  # fmt: skip
    assert found[0].size == 8388604 * 1024


@given(st.text())
def test_no_text_makes_the_parsers_fail(content: str) -> None:
    mounts.parse_mountinfo(content)
    mounts.parse_swaps(content)


def test_is_within() -> None:
    assert mounts.is_within("/a/b", "/a")
    assert mounts.is_within("/a", "/a")
    assert mounts.is_within("/a", "/")
    assert not mounts.is_within("/ab", "/a")


def test_this_machine_has_a_root() -> None:
    assert "/" in {m.target for m in mounts.mounts()}
