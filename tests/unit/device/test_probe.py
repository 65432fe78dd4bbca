from __future__ import annotations

from collections.abc import Callable

from imager.device.probe import Content, _decode, parse_export, probe

Recorded = Callable[[str], str]


def test_a_filesystem(recorded: Recorded) -> None:
    found = parse_export(recorded("blkid-export-vfat.txt"))
    assert found == Content("vfat", "my disk$", "1234-ABCD", None)


def test_a_partitioned_disk(recorded: Recorded) -> None:
    assert parse_export(recorded("blkid-export-gpt.txt")) == Content(table="gpt")


def test_nothing_there() -> None:
    assert probe("/nonexistent") == Content()


def test_udev_encoding() -> None:
    assert _decode("my\\x20disk\\xc3\\xa4\\xzz") == "my diskä\\xzz"
