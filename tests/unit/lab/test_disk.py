from __future__ import annotations

import os
from pathlib import Path

import pytest

from imager import command
from imager.device import partition_table
from imager.errors import CommandError, UsageError
from imager.lab import changes, disk, tree
from imager.lab.filesystems import Filesystem
from imager.lab.rig import FileSource, FileTarget
from imager.units import GIB, MIB

ALL = {tool for kind in disk.KINDS for tool in (*kind.tools, *kind.offline_tools)}


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    find = command.find
    monkeypatch.setattr(command, "find", lambda tool: None if tool in missing else find(tool))


def needs(*tools: str) -> pytest.MarkDecorator:
    missing = [tool for tool in tools if command.find(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@needs(*ALL)
@pytest.mark.parametrize("size", [192 * MIB, 250 * MIB, 700 * MIB, 1536 * MIB, 10 * GIB + 513])
def test_partitions_lie_side_by_side_within_the_disk(size: int) -> None:
    parts, left_out = disk.choose(size, devices=False)
    assert {p.name for p in parts} | {one.name for one in left_out} == {"fat", "ext4", "xfs", "btrfs"}
    at = MIB
    for number, part in enumerate(parts, 1):
        assert part.number == number and part.start == at and part.size % MIB == 0
        assert part.size >= part.kind.smallest
        at += part.size
    assert at <= size - MIB
    if size > GIB:
        assert not left_out


def test_a_tiny_disk_is_refused() -> None:
    with pytest.raises(UsageError, match="too small"):
        disk.choose(100 * MIB, devices=False)


@needs(*ALL)
def test_a_filesystem_without_its_tools_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "mkfs.xfs", "mcopy")
    parts, left_out = disk.choose(2 * GIB, devices=False)
    assert [p.name for p in parts] == ["ext4", "btrfs"]
    assert [(one.name, one.why) for one in left_out] == [
        ("fat", "mcopy is not installed"),
        ("xfs", "mkfs.xfs is not installed"),
    ]


@pytest.mark.parametrize("tool", ["sfdisk", "mkfs.ext4", "debugfs"])
def test_without_a_table_or_ext4_there_is_no_lab(monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    without(monkeypatch, tool)
    with pytest.raises(CommandError, match=f"{tool} is not installed") as caught:
        disk.choose(2 * GIB, devices=False)
    assert caught.value.hint and "install" in caught.value.hint


@needs(*ALL, "sfdisk")
@pytest.mark.slow
def test_every_filesystem_is_built_changed_and_read_back_on_files_alone(tmp_path: Path) -> None:
    size = 900 * MIB
    parts, _ = disk.choose(size, devices=False)
    assert len(parts) == 4
    source = FileSource(tmp_path, size, parts)
    filesystems = [Filesystem(part, tmp_path, part.number) for part in parts]
    for one in filesystems:
        one.build(source.parts()[one.part.number], lambda written: None)
    source.settle()
    remarks = {}
    for one in filesystems:
        done = one.change(source.parts()[one.part.number], 1, source.renew)
        remarks[one.part.name] = done.remark
        assert done.counts[changes.OVERWRITE]
    source.settle()
    assert "in place" in remarks["ext4"] and "in place" in remarks["fat"]
    assert "made anew" in remarks["xfs"] and "made anew" in remarks["btrfs"]

    with source.image.open("rb") as file:
        table = partition_table.read_table(lambda at, n: os.pread(file.fileno(), n, at), size, 512)
    assert table is not None and table.scheme == "gpt"
    assert [(e.start, e.size, e.uuid) for e in table.entries] == [(p.start, p.size, p.uuid) for p in parts]

    with FileTarget(source.image, parts).parts() as paths:
        for one in filesystems:
            path = paths[one.part.number]
            assert disk.check_filesystem(one.part, path) is None
            found = one.found(path)
            if one.part.name == "xfs":
                assert found is None
                continue
            assert found is not None
            assert tree.compare(one.expected(path), found) == []

        ext4 = next(one.part for one in filesystems if one.part.name == "ext4")
        with open(paths[ext4.number], "r+b") as file:
            file.seek(4096)  # the group descriptors
            file.write(bytes(4096))
        assert "e2fsck ended with code" in (disk.check_filesystem(ext4, paths[ext4.number]) or "")
