from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from imager.device import sysfs
from imager.device.identity import Identity, difference, identify, identify_node, normal_wwn, same_source
from imager.errors import SourceError, UsageError


def test_a_file_is_its_canonical_path(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    image = tmp_path / "d" / "disk.img"
    image.write_bytes(b"x" * 1000)
    link = tmp_path / "link"
    link.symlink_to(image)
    found = identify(link)
    assert (found.kind, found.path, found.size) == ("file", str(image), 1000)
    assert found.key == f"file:{image}"
    assert (found.dev, found.inode) == (image.stat().st_dev, image.stat().st_ino)
    assert not found.is_device and found.confirmation == "disk.img"


def test_what_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file"):
        identify(tmp_path / "nothing")
    with pytest.raises(UsageError, match="folder"):
        identify(tmp_path)
    with pytest.raises(UsageError, match="neither"):
        identify("/dev/null")


def test_streams(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert identify("-").kind == "stream"
    assert identify(tmp_path / "pipe").kind == "stream"
    assert difference(identify("-"), identify("-")) is not None


def test_a_file_costs_no_program_and_no_library(tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(b"")
    code = (
        "import sys; from imager.device.identity import identify; identify(sys.argv[1]);"
        "print(*(m for m in sys.modules if m.split('.')[0] in ('subprocess', 'pyudev', 'psutil', 'ctypes')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "i")], capture_output=True, check=True)
    assert done.stdout.strip() == b""


def node(laptop: str, name: str) -> Identity:
    found = sysfs.read_node(name, laptop)
    assert found is not None
    return identify_node(replace(found, path="/nonexistent"), sys=laptop)


def test_keys(laptop: str) -> None:
    assert node(laptop, "nvme0n1").key == "wwn:0025388b01234567"
    assert node(laptop, "nvme0n1p2").key == "wwn:0025388b01234567/part2"
    assert node(laptop, "sdb").key == "serial:4C530001230101112233#1"
    assert node(laptop, "md0").key == "md:11112222-3333-4444-5555-666677778888"
    assert node(laptop, "dm-0").key.startswith("dm:CRYPT-LUKS2-")
    assert same_source(node(laptop, "sdc"), node(laptop, "sdd")), "one disk over two paths"
    assert "wwn" in (difference(node(laptop, "sda"), node(laptop, "sdc")) or "")


def test_confirmation(laptop: str) -> None:
    assert node(laptop, "nvme0n1").confirmation == "3456"
    assert node(laptop, "dm-0").confirmation == "cryptroot"
    assert Identity("disk", "/dev/x", "x", "k", serial="7").confirmation == "7"


def test_wwn_forms() -> None:
    assert normal_wwn("0x5000C500A1") == normal_wwn("naa.5000c500a1")
    assert normal_wwn("t10.ATA     X  1") == "t10.ata x 1"
