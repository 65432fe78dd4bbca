"""The stack of the recorded laptop, without touching a device."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from imager.device import guard_checks, machine, mounts, sysfs
from imager.device.guard_checks import aliases, in_use, is_source, lives_on
from imager.device.identity import Identity, identify_node
from imager.device.machine import Loop, Machine
from imager.device.sysfs import Node


@pytest.fixture
def here(laptop: str, recorded: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = [sysfs.read_node(name, laptop) for name in sysfs.all_names(laptop)]
    nodes = {n.dev: n for n in found if n}
    numbers = {n.path: n.dev for n in nodes.values()} | {"/dev/nvme0n1p3": nodes[os.makedev(259, 1)].dev}
    monkeypatch.setattr(machine, "_rdev", numbers.get)
    pools = machine._btrfs(nodes, laptop)
    return Machine(
        nodes,
        mounts.parse_mountinfo(recorded("mountinfo-laptop.txt")),
        mounts.parse_swaps(recorded("swaps-laptop.txt")),
        {},
        pools,
    )


def get(here: Machine, name: str) -> Node:
    node = here.node(name)
    assert node is not None
    return node


def names(here: Machine, devs: set[int]) -> set[str]:
    return {here.nodes[dev].name for dev in devs}


def test_above(here: Machine) -> None:
    assert [n.name for n in here.above(get(here, "nvme0n1"))] == ["nvme0n1p1", "nvme0n1p2", "dm-0", "dm-1"]


def test_below(here: Machine) -> None:
    root = get(here, "dm-1").dev
    assert names(here, here.below([root])) == {"dm-1", "dm-0", "nvme0n1p2", "nvme0n1"}


def test_mounts_by_number_by_source_and_by_pool(here: Machine) -> None:
    assert [m.target for m in here.mounted(get(here, "dm-1"))] == ["/"]
    assert [m.target for m in here.mounted(get(here, "sdc"))] == ["/srv/data disk", "/mnt/bound"]
    assert [m.target for m in here.mounted(get(here, "sdb"))] == ["/srv/data disk", "/mnt/bound"], (
        "same btrfs"
    )
    assert [m.target for m in here.mounted(get(here, "md0"))] == ["/fuse"]


def reasons(here: Machine, name: str) -> dict[str, str]:
    return {r.text: r.code for r in in_use(here, get(here, name))}


def test_in_use_looks_all_the_way_up(here: Machine) -> None:
    found = reasons(here, "nvme0n1")
    assert found["/dev/dm-1 is mounted on /"] == "mounted"
    assert found["/dev/nvme0n1p1 is mounted on /boot/efi"] == "mounted"
    assert found["/dev/nvme0n1p1 is in use as swap"] == "swap"
    assert found["/dev/nvme0n1p2 is held by /dev/dm-0 (dm cryptroot)"] == "held"
    assert reasons(here, "sda")["/dev/md0 is mounted on /fuse"] == "mounted"


def test_a_second_path_to_a_used_disk_is_used(here: Machine) -> None:
    assert [n.name for n in aliases(here, get(here, "sdd"))] == ["sdd", "sdc"]
    assert "mounted" in reasons(here, "sdd").values()


def test_lives_on_covers_all_of_the_disk(here: Machine) -> None:
    system = dict.fromkeys(here.below([get(here, "dm-1").dev]), "/")
    for name in ("nvme0n1", "nvme0n1p1", "nvme0n1p2", "dm-0", "dm-1"):
        found = list(lives_on(here, get(here, name), system, "system", "the running system lives on"))
        assert [r.code for r in found] == ["system"], name
    assert not list(lives_on(here, get(here, "sda"), system, "system", ""))


def identity(here: Machine, name: str, laptop: str) -> Identity:
    return identify_node(get(here, name), sys=laptop)


@pytest.mark.parametrize(
    ("target", "source", "refused"),
    [
        ("nvme0n1", "nvme0n1", True),
        ("nvme0n1", "nvme0n1p1", True),
        ("nvme0n1p1", "nvme0n1", True),
        ("nvme0n1p1", "nvme0n1p2", False),
        ("nvme0n1", "dm-1", True),
        ("dm-1", "nvme0n1", True),
        ("sdc", "sdd", True),
        ("sda", "nvme0n1", False),
        ("md0", "sda", True),
        ("sda", "md0", True),
    ],
)
def test_source(here: Machine, laptop: str, target: str, source: str, refused: bool) -> None:
    me = identity(here, target, laptop)
    found = list(is_source(here, get(here, target), me, [identity(here, source, laptop)]))
    assert bool(found) is refused, found


def test_two_loops_over_the_same_bytes(here: Machine) -> None:
    a, b, c = (get(here, n) for n in ("loop7", "sda", "md0"))
    here.loops[a.dev] = Loop(a.dev, "loop7", "/f", (1, 2), None, 0, 100)
    here.loops[b.dev] = Loop(b.dev, "loop8", "/f", (1, 2), None, 99, 100)
    here.loops[c.dev] = Loop(c.dev, "loop9", "/f", (1, 2), None, 100, 100)
    assert here.shared_file(a) == [b]
    assert {n.name for n in here.shared_file(c)} == {"sda"}


def test_overlay_layers(here: Machine) -> None:
    overlay = next(m for m in here.mounts if m.fstype == "overlay")
    assert machine._layers(overlay) == ["/low:er", "/boot/efi", "/srv/up", "/srv/work"]


def test_shape() -> None:
    disk = Identity("disk", "/dev/x", "x", "k", ptuuid="u", size=1)
    part = Identity("partition", "/dev/x1", "x1", "k", ptuuid="u", number=1, size=1)
    assert [r.code for r in guard_checks.right_shape(part, True)] == ["shape"]
    assert [r.code for r in guard_checks.right_shape(disk, False)] == ["shape"]
    assert not [*guard_checks.right_shape(disk, True), *guard_checks.right_shape(part, False)]
    assert not [*guard_checks.right_shape(disk, None), *guard_checks.right_shape(part, None)]
