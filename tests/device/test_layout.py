"""Layouts of whole disks: made by the usual tools, kept in a set, shown as text and as a picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager import command
from imager.capture import layout as layouts
from imager.capture.layout import Layout, Place, read_layout
from imager.capture.system import Crypt, Mount
from imager.device.loop import attach
from imager.extents import Extents
from imager.lab import rig
from tests import structures
from tests.workbench import MEMORY, Workbench

MIB = 1 << 20
SIZE = 600 * MIB
TOOLS = ["sfdisk", "mkfs.ext4", "debugfs", "mkfs.fat", "mmd", "mkfs.xfs", "mkswap", "cryptsetup", "mkntfs"]
MISSING = [tool for tool in TOOLS if command.find(tool) is None]
WITHOUT = rig.without_devices()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
devices = [pytest.mark.root, pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT))]

TABLE = (
    "label: gpt\nlabel-id: D9A1C6F8-1111-4222-8333-444455556666\n"
    'size=40M,type=U,name="EFI"\nsize=64M,type=L,name="root"\nsize=320M,type=L,name="data"\n'
    "size=16M,type=S\nsize=32M,type=L\nsize=24M,type=L,name=windows\nsize=16M,type=L\n"
)
PARTS = {1: 40, 2: 64, 3: 320, 4: 16, 5: 32, 6: 24, 7: 16}
FILES = {
    "etc/fstab": "# comment\nUUID=1-2 / ext4 defaults 0 1\n\nLABEL=x\\040y /data xfs nofail,ro\n",
    "etc/crypttab": "vault UUID=7 none luks,discard\n# no\n",
    "etc/hostname": "laptop\n",
    "usr/lib/os-release": 'NAME=Debian\nID=debian\nVERSION_ID="12"\nPRETTY_NAME=\'Debian "12"\'\nBAD LINE\n',
    "etc/initramfs-tools/initramfs.conf": "MODULES=most\n",
    "boot/vmlinuz-6.1.0-13-amd64": "x",
    "boot/vmlinuz-6.1.0-9-amd64": "x",
    "boot/grub/grub.cfg": "set x\n",
}


def _start(number: int) -> int:
    return (1 + sum(size for part, size in PARTS.items() if part < number)) * MIB


def _part(folder: Path, number: int) -> Path:
    path = folder / f"part{number}"
    with path.open("wb") as file:
        file.truncate(PARTS[number] * MIB)
    return path


def _files(image: Path) -> None:
    folders = sorted({str(parent) for name in FILES for parent in list(Path(name).parents)[:-1]})
    script = [f"mkdir {folder}" for folder in folders]
    for name, content in FILES.items():
        host = image.with_name("file")
        host.write_text(content)
        command.run(["debugfs", "-w", "-f", "/dev/stdin", str(image)], stdin="\n".join(script).encode())
        command.run(["debugfs", "-w", "-R", f"write {host} {name}", str(image)])
        script = []


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A GPT with an ESP, ext4 with a system, XFS, swap, LUKS, NTFS and an md member."""
    with tempfile.TemporaryDirectory(prefix="layout-", dir=MEMORY) as name:
        folder = Path(name)
        image = folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(SIZE)
        command.run(["sfdisk", "-q", str(image)], stdin=TABLE.encode())
        parts = {number: _part(folder, number) for number in PARTS}
        command.run(["mkfs.fat", "-F", "32", "-s", "1", "-n", "EFI", str(parts[1])])
        mtools = {"MTOOLS_SKIP_CHECK": "1"}
        command.run(["mmd", "-i", str(parts[1]), "::EFI", "::EFI/debian", "::EFI/BOOT"], env=mtools)
        command.run(["mkfs.ext4", "-q", "-F", "-L", "root", str(parts[2])])
        _files(parts[2])
        command.run(["mkfs.xfs", "-q", "-f", "-L", "data", str(parts[3])])
        command.run(["mkswap", "-L", "rest", str(parts[4])])
        secret = folder / "secret"
        secret.write_text("secret")
        fast = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
        command.run(["cryptsetup", "luksFormat", "-q", *fast, str(parts[5]), str(secret)])
        command.run(["mkntfs", "-QqF", "-L", "Windows", str(parts[6])])
        at, block = structures.md_1(PARTS[7] * MIB, "1.2")
        with parts[7].open("r+b") as file:
            file.seek(at)
            file.write(block)
        with image.open("r+b") as out:
            for number, part in parts.items():
                out.seek(_start(number))
                out.write(part.read_bytes())
                part.unlink()
            out.seek(100 * 512)
            out.write(b"boot loader's second stage")
        subprocess.run(["fallocate", "-d", str(image)], check=False)
        yield image


def captured(path: str, place: Place | None = None, *, maps: bool = False) -> Layout:
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.lseek(fd, 0, os.SEEK_END)
        return read_layout(fd, size, None if place is None else 512, place, maps=maps, look=True)
    finally:
        os.close(fd)


def test_a_disk(disk: Path) -> None:
    found = captured(str(disk), maps=True)
    assert found.table is not None and not found.table.problems and not found.problems
    assert [(v.name, v.kind) for v in found.volumes] == [
        ("1", "vfat"), ("2", "ext4"), ("3", "xfs"), ("4", "swap"), ("5", "crypto_LUKS"), ("6", "ntfs"),
        ("7", "linux_raid_member"),
    ]  # fmt: skip
    assert [v.start for v in found.volumes] == [_start(number) for number in PARTS]
    assert found.boot == ("uefi",) and found.firmware is None and not found.entries
    assert found.table.gaps[0].data == len("boot loader's second stage")
    used = {v.kind: v.used for v in found.volumes}
    assert used["crypto_LUKS"] is None and used["linux_raid_member"] is None
    assert used["swap"] == 4096
    for kind in ("vfat", "ext4", "xfs", "ntfs"):
        assert used[kind] is not None and 0 < used[kind] < 80 * MIB
    assert "encrypted" in found.volumes[4].why and "RAID" in found.volumes[6].why


def test_the_system_on_it(disk: Path) -> None:
    found = captured(str(disk))
    system = found.volumes[1].system
    assert system is not None
    assert (system.id, system.version, system.name, system.hostname) == (
        "debian", "12", 'Debian "12"', "laptop",
    )  # fmt: skip
    assert system.kernels == ("6.1.0-13-amd64", "6.1.0-9-amd64")
    assert system.fstab == (
        Mount("UUID=1-2", "/", "ext4", "defaults"), Mount("LABEL=x\\040y", "/data", "xfs", "nofail,ro"),
    )  # fmt: skip
    assert system.crypttab == (Crypt("vault", "UUID=7", "none", "luks,discard"),)
    assert (system.initramfs, system.loaders) == (("initramfs-tools",), ("grub",))
    esp = found.volumes[0].system
    assert esp is not None and esp.efi == ("BOOT", "debian")
    assert found.volumes[2].system is None, "an XFS in a file is not mounted"


@pytest.mark.parametrize("kind", [pytest.param("xfs", marks=devices), pytest.param("btrfs", marks=devices)])
def test_the_system_on_what_only_the_kernel_reads(tmp_path: Path, kind: str) -> None:
    """Looked into through a loop device that is read-only: not a byte of it changes."""
    size = (320 if kind == "xfs" else 128) * MIB
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        image = Path(name) / "image"
        with image.open("wb") as file:
            file.truncate(size)
        command.run([f"mkfs.{kind}", "-q", "-f", str(image)])
        with attach(image) as device:
            root = tmp_path / "mnt"
            root.mkdir()
            command.run(["mount", device.path, str(root)])
            try:
                for path, content in FILES.items():
                    (root / path).parent.mkdir(parents=True, exist_ok=True)
                    (root / path).write_text(content)
                seen = captured(device.path, Place(device.path, {0: str(root)}))
            finally:
                command.run(["umount", str(root)])
            before = image.read_bytes()
            found = captured(device.path, Place(device.path))
            os.sync()
            assert image.read_bytes() == before
        system = found.volumes[0].system
        assert system is not None and system.id == "debian" and len(system.fstab) == 2
        assert seen.volumes[0].system == system, "mounted, it is read where it is mounted"


@pytest.mark.root
@pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT))
def test_sectors_of_4096_bytes(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    with attach(image, sector_size=4096) as device:
        command.run(["sfdisk", "-q", device.path], stdin=b"label: gpt\nsize=4MiB,name=only\n")
    for sector in (None, 4096):
        fd = os.open(image, os.O_RDONLY)
        try:
            found = read_layout(fd, 16 * MIB, sector)
        finally:
            os.close(fd)
        assert found.table is not None and found.sector == found.table.sector == 4096
        assert (found.table.partitions[0].start, found.table.partitions[0].size) == (MIB, 4 * MIB)


def test_it_is_plain_data(disk: Path) -> None:
    found = captured(str(disk), maps=True)
    plain = layouts.to_plain(found)
    assert layouts.from_plain(json.loads(json.dumps(plain))) == found
    assert layouts.from_plain({**plain, "version": 2}) is None
    assert layouts.from_plain({**plain, "size": "large"}) is None
    assert layouts.from_plain(None) is None and layouts.from_plain({}) is None


# --- in a set ------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    monkeypatch.setenv("IMAGER_STATE_DIR", str(tmp_path / "state"))
    return Workbench(tmp_path)


def show(bench: Workbench, *arguments: str) -> str:
    argv = [sys.executable, "-m", "imager", "-r", str(bench.root), "show", "latest", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_set_keeps_it(bench: Workbench, disk: Path, tmp_path: Path) -> None:
    bench.backup(disk)
    [image] = json.loads(show(bench, "--json"))["images"]
    assert layouts.from_plain(image["layout"]) == captured(str(disk))
    told = show(bench, "--layout")
    for words in (
        "GPT d9a1c6f8-1111-4222-8333-444455556666, sectors of 512 bytes, protective MBR",
        "backup table: equal", "can be started by UEFI", "'EFI' type c12a7328", "vfat 'EFI'", "ext4 'root'",
        "xfs 'data'", "swap 'rest'", "LUKS2", "key slots 0 (pbkdf2)", "ntfs 'Windows'",
        "member 1 of raid5 'host:data'", "system: Debian \"12\", called laptop", "kernels: 6.1.0-13-amd64",
        "fstab: UUID=1-2 on / (ext4, defaults)", "crypttab: vault is UUID=7", "EFI: BOOT, debian",
    ):  # fmt: skip
        assert words in told, words


def test_its_picture(bench: Workbench, disk: Path, tmp_path: Path) -> None:
    copy = tmp_path / "disk.img"
    subprocess.run(["cp", "--sparse=always", str(disk), str(copy)], check=True)
    bench.backup(copy)
    with copy.open("r+b") as file:
        file.seek(_start(3) + 200 * MIB)
        file.write(b"x" * MIB)
    bench.backup(copy)
    out = tmp_path / "disk.svg"
    show(bench, "--svg", str(out))
    root = ElementTree.fromstring(out.read_text())
    name = "{http://www.w3.org/2000/svg}"
    texts = [element.text or "" for element in root.iter(f"{name}text")]
    assert root.tag == f"{name}svg" and len(out.read_text()) < 200_000
    assert any("1.00 MiB changed since set" in text for text in texts)
    for words in ("3 data", "xfs 'data'", "crypto_LUKS", "nothing known"):
        assert any(words in text for text in texts) == (words != "nothing known"), words
    changed = [e.get("d", "") for e in root.iter(f"{name}path") if e.get("fill") == "#e07b00"]
    column = 40 + int((_start(3) + 200 * MIB) / SIZE * 960)
    assert len(changed) == 1 and changed[0].startswith(f"M{column} ")
    assert show(bench, "--svg", "-") == out.read_text()


def test_a_source_without_partitions(bench: Workbench, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 100_000)
    bench.backup(image)
    told = show(bench, "--layout")
    assert "whole disk: 97.7 KiB at byte 0" in told and "nothing that is known" in told
    ElementTree.fromstring(show(bench, "--svg", "-"))


def test_a_stream_has_none(bench: Workbench, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "imager", "-r", str(bench.root), "backup", "-", "--name", "stream"]
    subprocess.run(argv, input=b"x" * 5000, check=True, capture_output=True)
    assert "not in this set" in show(bench, "--layout")
    assert ElementTree.fromstring(show(bench, "--svg", "-")) is not None


def test_extents_of_a_disk_add_up(disk: Path) -> None:
    found = captured(str(disk))
    assert found.table is not None
    parts = Extents.of((p.start, p.end) for p in found.table.partitions)
    gaps = Extents.of((gap.start, gap.start + gap.size) for gap in found.table.gaps)
    assert not parts & gaps
    # The rest is what the table itself takes, at both ends.
    assert (parts | gaps).complement(SIZE) == Extents(((0, 34 * 512), (SIZE - 33 * 512, SIZE)))
