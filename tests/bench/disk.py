"""The disk of the benchmarks: 6 GiB with a GPT, a FAT, an ext4 and an XFS filesystem, 1.3 GiB of real data.

Invariant: it needs no mount, no loop device and no root (the filesystems' own tools fill them), its
generated content is seeded, and wherever the filesystems left nothing the image has a hole.

    python tests/bench/disk.py OUT      makes the disk and says what is in it
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import content
import sparse

MIB = 1 << 20
GIB = 1 << 30
SIZE = 6 * GIB
VERSION = 1
"""Of the recipe: a cached disk of another version is not used."""

ESP = (1 * MIB, 255 * MIB)
ROOT = (256 * MIB, 3072 * MIB)
DATA = (3328 * MIB, SIZE - 3328 * MIB - 1 * MIB)

NOISE = 310 * MIB
PROSE = 310 * MIB
TREE_BUDGET = 700 * MIB

PACKAGES = (
    "linux-image-cloud-amd64,python3,perl,git,vim,openssh-server,locales,man-db,nginx-core,"
    "sqlite3,curl,cpp,busybox"
)
ROOT_UUID = "5a0d3f0e-30a5-4a49-9d0b-1b7b3f4f0a01"
DATA_UUID = "5a0d3f0e-30a5-4a49-9d0b-1b7b3f4f0a02"
TABLE = f"""label: gpt
label-id: 5A0D3F0E-30A5-4A49-9D0B-1B7B3F4F0A00
start={ESP[0] // 512}, size={ESP[1] // 512}, type=U, uuid=5A0D3F0E-30A5-4A49-9D0B-1B7B3F4F0A10
start={ROOT[0] // 512}, size={ROOT[1] // 512}, type=L, uuid=5A0D3F0E-30A5-4A49-9D0B-1B7B3F4F0A11
start={DATA[0] // 512}, size={DATA[1] // 512}, type=L, uuid=5A0D3F0E-30A5-4A49-9D0B-1B7B3F4F0A12
"""


@dataclass(frozen=True)
class Disk:
    """What was built: where the system's tree came from, and how much the image holds."""

    version: int
    tree: str
    data_bytes: int


def cached(image: Path, cache: Path | None = None) -> Disk:
    """Put the disk at `image`, from the cache if it is there, else built now and kept there."""
    folder = cache or Path(tempfile.gettempdir()) / "imager-bench-cache"
    stored, note = folder / "disk.img", folder / "disk.json"
    if stored.exists() and note.exists():
        disk = Disk(**json.loads(note.read_text()))
        if disk.version == VERSION:
            sparse.copy(stored, image)
            return disk
    folder.mkdir(parents=True, exist_ok=True)
    script = [sys.executable, str(Path(__file__).resolve()), "--note", str(note) + ".new", str(image)]
    _call(script)  # in a process of its own: the kernel counts a parent's peak memory into its children's
    note.unlink(missing_ok=True)
    sparse.copy(image, stored)
    Path(str(note) + ".new").replace(note)
    return Disk(**json.loads(note.read_text()))


def build(image: Path) -> Disk:
    """Build the disk from nothing."""
    with tempfile.TemporaryDirectory(prefix="imager-bench-build-") as name:
        work = Path(name)
        tree = work / "tree"
        source = _debian_tree(tree) or _own_tree(tree)
        with image.open("wb") as file:
            file.truncate(SIZE)
        for make, place in ((_make_esp, ESP), (_make_root, ROOT), (_make_data, DATA)):
            part = work / "part.img"
            with part.open("wb") as file:
                file.truncate(place[1])
            make(part, tree, work)
            sparse.copy_into(part, image, place[0])
            part.unlink()
        _call(["sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", str(image)], TABLE)
    return Disk(VERSION, source, sparse.data_bytes(image))


def _debian_tree(tree: Path) -> str | None:
    """An installed Debian, from the mirror that this system is configured with."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    suite = release.get("VERSION_CODENAME", "").strip('"')
    if release.get("ID") != "debian" or not suite or os.geteuid() != 0:
        return None
    command = ["mmdebstrap", "--quiet", "--variant=important", f"--include={PACKAGES}", suite, str(tree)]
    mirrors = Path("/etc/apt/sources.list.d/debian.sources")
    if mirrors.exists():
        command.append(str(mirrors))
    if shutil.which("mmdebstrap"):
        done = subprocess.run(command, check=False, capture_output=True, stdin=subprocess.DEVNULL)
        if done.returncode == 0:
            return f"Debian {suite}, installed by mmdebstrap"
        shutil.rmtree(tree, ignore_errors=True)
    if shutil.which("debootstrap"):
        command = ["debootstrap", "--merged-usr", f"--include={PACKAGES}", suite, str(tree)]
        if subprocess.run(command, check=False, capture_output=True).returncode == 0:
            return f"Debian {suite}, installed by debootstrap"
        shutil.rmtree(tree, ignore_errors=True)
    return None


def _own_tree(tree: Path) -> str:
    """A copy of this machine's own /usr, in name order, up to the budget."""
    total = 0
    for folder, names, files in os.walk("/usr"):
        names.sort()
        target = tree / folder.lstrip("/")
        target.mkdir(parents=True, exist_ok=True)
        for name in sorted(files):
            source = Path(folder, name)
            if not source.is_symlink() and source.is_file():
                total += source.stat().st_size
                if total > TREE_BUDGET:
                    return "a copy of this machine's /usr, cut at the budget"
            shutil.copy2(source, target / name, follow_symlinks=False)
    return "a copy of this machine's /usr"


def _make_esp(part: Path, tree: Path, work: Path) -> None:
    _call(["mkfs.fat", "-F", "32", "-i", "5A0D3F0E", "-n", "EFI", str(part)])
    _call(["mmd", "-i", str(part), "::EFI", "::EFI/BOOT", "::EFI/debian"])
    loader = work / "loader"
    content.write(loader, content.noise(1, 2 * MIB))
    _call(["mcopy", "-i", str(part), str(loader), "::EFI/BOOT/BOOTX64.EFI"])
    for kernel in sorted(tree.glob("boot/vmlinuz-*")) + sorted(tree.glob("boot/initrd.img-*")):
        _call(["mcopy", "-i", str(part), str(kernel), f"::EFI/debian/{kernel.name.split('-')[0]}"])


def _make_root(part: Path, tree: Path, _work: Path) -> None:
    options = f"lazy_itable_init=1,lazy_journal_init=1,hash_seed={ROOT_UUID}"
    _call(["mkfs.ext4", "-q", "-F", "-L", "root", "-U", ROOT_UUID, "-E", options, "-d", str(tree), str(part)])


def _make_data(part: Path, _tree: Path, work: Path) -> None:
    """XFS takes its files from a prototype: name, mode, owner, group and the file to copy."""
    lines = ["/", "0 0", "d--755 0 0"]
    for kind, total, make in (("media", NOISE, content.noise), ("logs", PROSE, content.prose)):
        lines.append(f"{kind} d--755 0 0")
        left, number = total, 0
        while left:
            size = min(left, (1 << number % 6) * MIB)
            path = work / f"{kind}-{number}"
            content.write(path, make(hash_seed(kind, number), size))
            lines.append(f"{path.name} ---644 0 0 {path}")
            left, number = left - size, number + 1
        lines.append("$")
    lines.append("$")
    prototype = work / "prototype"
    prototype.write_text("\n".join(lines) + "\n")
    _call(["mkfs.xfs", "-q", "-f", "-L", "data", "-m", f"uuid={DATA_UUID}", "-p", str(prototype), str(part)])


def hash_seed(kind: str, number: int) -> int:
    """A seed of its own for each file."""
    return int.from_bytes(kind.encode(), "big") * 1000 + number


def _call(command: list[str], text: str | None = None) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True, input=text)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed: {done.stderr.strip() or done.stdout.strip()}")


def main() -> None:
    """Make the disk at the path given."""
    parser = argparse.ArgumentParser(description="Build the benchmark disk.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--note", type=Path, help="write what was built here, as JSON")
    arguments = parser.parse_args()
    disk = build(arguments.out)
    if arguments.note:
        arguments.note.write_text(json.dumps(asdict(disk)))
    print(f"{arguments.out}: {SIZE} bytes, of them {disk.data_bytes} data; system: {disk.tree}")


if __name__ == "__main__":
    main()
