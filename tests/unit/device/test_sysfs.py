from __future__ import annotations

import os

import pytest

from imager.device import sysfs


def test_nvme_takes_serial_and_model_from_its_controller(laptop: str) -> None:
    node = sysfs.read_node("nvme0n1", laptop)
    assert node is not None
    assert node.serial == "S4EVNF0M123456"
    assert node.model == "Samsung SSD 970 EVO Plus 512GB"
    assert (node.wwn, node.transport, node.kind) == ("eui.0025388b01234567", "nvme", "disk")
    assert node.size == 1000215216 * 512
    assert (node.logical_sector, node.physical_sector, node.rotational) == (512, 4096, False)
    assert node.partitions == ("nvme0n1p1", "nvme0n1p2")


def test_a_partition_knows_its_disk(laptop: str) -> None:
    node = sysfs.read_node("nvme0n1p2", laptop)
    assert node is not None
    assert (node.kind, node.parent, node.disk, node.number) == ("partition", "nvme0n1", "nvme0n1", 2)
    assert node.start == 1050624 * 512
    assert node.holders == ("dm-0",)
    assert node.serial == "S4EVNF0M123456"
    assert node.diskseq == 1


def test_sata_serial_comes_from_page_80(laptop: str) -> None:
    node = sysfs.read_node("sda", laptop)
    assert node is not None
    assert (node.serial, node.model, node.transport) == ("WFN0Z9DN", "ST4000DM004-2CV1", "sata")


def test_usb_serial_comes_from_the_bridge(laptop: str) -> None:
    node = sysfs.read_node("sdb", laptop)
    assert node is not None
    assert (node.serial, node.transport) == ("4C530001230101112233", "usb")
    assert (node.model, node.lun) == ("SanDisk Ultra", 1)
    assert node.read_only and node.removable


def test_stacks_have_names_and_uuids(laptop: str) -> None:
    mapped, array = sysfs.read_node("dm-0", laptop), sysfs.read_node("md0", laptop)
    assert mapped is not None and array is not None
    assert (mapped.kind, mapped.stack_name, mapped.slaves) == ("dm", "cryptroot", ("nvme0n1p2",))
    assert (array.kind, array.stack_uuid) == ("md", "11112222-3333-4444-5555-666677778888")


def test_names_by_number(laptop: str) -> None:
    assert sysfs.name_of(os.makedev(259, 2), laptop) == "nvme0n1p2"
    assert sysfs.name_of(os.makedev(1, 1), laptop) is None
    assert sysfs.read_node("sdz", laptop) is None


def test_an_unattached_loop_is_a_loop(laptop: str) -> None:
    node = sysfs.read_node("loop7", laptop)
    assert node is not None and (node.kind, node.size, node.backing) == ("loop", 0, None)


def test_natural_order() -> None:
    assert sorted(["sda10", "sda2", "sda", "sdb"], key=sysfs.natural) == ["sda", "sda2", "sda10", "sdb"]


@pytest.mark.parametrize(
    ("value", "dev"), [("8:16", os.makedev(8, 16)), ("8", None), ("", None), (None, None)]
)
def test_device_number(value: str | None, dev: int | None) -> None:
    assert sysfs.device_number(value) == dev
