"""One trial: a filesystem at work, a copy of its disk at some moment, imaged by used blocks, restored.

Invariant: the copy is never mounted itself, only clones of it; the reference, against which a restore is
compared, is what the kernel makes of the copy with every block of it. What was promised (`workload.Ledger`)
and is not even in the reference is the kernel's loss and counts apart.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from imager.device.loop import attach
from imager.errors import CommandError
from imager.lab.mounting import mounted
from tests import filesystems as fs
from tests.crash.workload import Ledger, Worker

MIB = 1 << 20
SIZES = {"ext": 96 * MIB, "xfs": 320 * MIB, "btrfs": 256 * MIB}
OPTIONS = {
    "ext": [
        "-t ext4",
        "-t ext4 -b 1024",
        "-t ext3",
        "-t ext4 -O ^metadata_csum",
        "-t ext4 -O ^64bit -I 128",
        "-t ext4 -O bigalloc -C 16384",
        "-t ext4 -O orphan_file",
        "-t ext4 -O meta_bg,^resize_inode,^flex_bg -b 1024",
    ],
    "xfs": ["", "-b size=1024", "-m rmapbt=1", "-d agcount=2"],
    "btrfs": ["", "--mixed", "-d dup", "--nodesize 4096"],
}  # fmt: skip
MOUNTS = {"ext": "ext4", "xfs": "xfs", "btrfs": "btrfs"}
NOISE = 320 * MIB
Listing = dict[str, str]
"Of every entry, what it holds: a digest, a link's target, or why it cannot be read."


@dataclass
class Outcome:
    """What became of one copy in one tool's hands."""

    code: int = 0
    mounts: bool = True
    lost: list[str] = field(default_factory=list)
    """Promised, in the reference, and not in the restored one byte for byte."""
    differing: list[str] = field(default_factory=list)
    """Entries that are not as in the reference."""
    problem: str = ""
    """What the checker says after the log was replayed."""
    fraction: float = 1.0
    """Of the bytes, imaged."""
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing is missing."""
        return self.code == 0 and self.mounts and not (self.lost or self.differing or self.problem)


@dataclass
class Trial:
    """What one trial came to."""

    kind: str
    options: str
    seed: int
    smeared: bool
    operations: int = 0
    promised: int = 0
    kernel_lost: list[str] = field(default_factory=list)
    reference: bool = True
    """Whether the copy mounts with all its blocks."""
    imager: Outcome = field(default_factory=Outcome)
    partclone: Outcome | None = None
    forced: Outcome | None = None
    """partclone's with `--force`, where it refused without."""


class Stand:
    """A filesystem that shares blocks between files, in a file in `folder`: it makes copies at one instant.

    While XFS clones a file it lets no write to it through, so what a loop device had written by then is in
    the clone, all of it, and nothing that it wrote later: what a crash of the machine leaves.
    """

    def __init__(self, folder: Path) -> None:
        self.root = folder / "stand"
        self._image = folder / "stand.img"
        self._folder = folder

    @contextmanager
    def up(self) -> Iterator[Stand]:
        """For as long as the context lasts."""
        with open(self._image, "wb") as file:
            file.truncate(12 << 30)
        subprocess.run(["mkfs.xfs", "-qf", "-m", "reflink=1", str(self._image)], check=True)
        with attach(self._image) as device, mounted(device.path, "xfs", self.root):
            noise = random.Random(1).randbytes(MIB)
            with open(self.root / "noise", "wb") as file:
                for number in range(NOISE // MIB):
                    file.write(noise[number:] + noise[:number])
            yield self

    def clone(self, source: str, target: str, size: int | None = None) -> Path:
        """A file's content of this instant, under another name."""
        with open(self.root / source, "rb") as one, open(self.root / target, "wb") as other:
            fcntl.ioctl(other.fileno(), fs.FICLONE, one.fileno())
            if size is not None:
                other.truncate(size)
        return self.root / target

    def clear(self) -> None:
        """Remove what a trial made."""
        for path in self.root.iterdir():
            if path.name != "noise":
                subprocess.run(["rm", "-rf", str(path)], check=True)


def run(stand: Stand, kind: str, seed: int, *, smeared: bool = False, partclone: bool = True) -> Trial:
    """Carry one out. `smeared`: the disk is read from its start to its end while work goes on."""
    chance = random.Random(f"{kind} {seed}")
    trial = Trial(kind, chance.choice(OPTIONS[kind]), seed, smeared)
    fs.make(kind, stand.root / "disk", SIZES[kind], trial.options)
    try:
        promised = _copied(stand, trial, chance)
        trial.promised = len(promised)
        reference = _seen(stand, kind, stand.clone("copy", "reference"))
        trial.reference = reference is not None
        trial.kernel_lost = _missing(promised, reference or {})
        trial.imager = _by_imager(stand, trial)
        _judge(stand, trial, trial.imager, promised, reference)
        if partclone:
            trial.partclone = _by_partclone(stand, trial)
            _judge(stand, trial, trial.partclone, promised, reference)
            if trial.partclone.code:
                trial.forced = _by_partclone(stand, trial, "-F")
                _judge(stand, trial, trial.forced, promised, reference)
    finally:
        stand.clear()
    return trial


def _copied(stand: Stand, trial: Trial, chance: random.Random) -> dict[str, str]:
    """Work, and a copy at a moment of it: what was promised all the while that it was made."""
    ledger = Ledger()
    with (
        attach(stand.root / "disk") as device,
        mounted(device.path, MOUNTS[trial.kind], stand.root.parent / "mnt") as root,
    ):
        workers = [Worker(trial.kind, root, f"w{n}", trial.seed, ledger) for n in range(2)]
        for worker in workers:
            worker.start()
        try:
            moment = chance.randrange(20, 900)
            pause = chance.choice((0, 0, 0, 0.3))
            while ledger.operations < moment and any(worker.is_alive() for worker in workers):
                time.sleep(0.002)
            if chance.random() < 0.2:
                os.sync()  # what is in place is new, and the log short
            time.sleep(pause)
            trial.operations = ledger.operations
            before = ledger.seen()
            if trial.smeared:
                _smear(stand.root / "disk", stand.root / "copy")
            else:
                stand.clone("disk", "copy")
            after = ledger.seen()
        finally:
            for worker in workers:
                worker.stopping.set()
            for worker in workers:
                worker.join()
        for worker in workers:
            if worker.error:
                raise worker.error
    return Ledger.throughout(before, after)


def _smear(source: Path, target: Path) -> None:
    """As `dd` copies a device that is in use: each MiB at its own moment, a fraction of a second in all."""
    with open(source, "rb", buffering=0) as one, open(target, "wb") as other:
        while piece := one.read(MIB):
            other.write(piece)
            time.sleep(0.001)


# --- the tools ---------------------------------------------------------------------------------


def _by_imager(stand: Stand, trial: Trial) -> Outcome:
    """The program itself: init, backup, restore onto noise."""
    out = Outcome()
    copy = stand.root / "copy"
    argv = [sys.executable, "-m", "imager", "--json", "--repo", str(stand.root / "repo")]
    environment = {
        **os.environ,
        "XDG_STATE_HOME": str(stand.root / "state"),
        "XDG_CACHE_HOME": str(stand.root / "cache"),
    }
    target = stand.clone("noise", "restored", copy.stat().st_size)
    backup = ["backup", "--block-size", "4K", str(copy)]
    for command in (["init", "--encryption", "none"], backup, ["restore", "latest", str(target), *RESTORE]):
        done = subprocess.run([*argv, *command], capture_output=True, text=True, check=False, env=environment)
        if command is backup:
            out.note, out.fraction = _told(done.stdout)
        if done.returncode:
            out.code = done.returncode
            out.note = done.stderr.strip() or done.stdout[-300:]
            break
    return out


RESTORE = ["--overwrite", "--unused", "leave"]


def _told(output: str) -> tuple[str, float]:
    """Why every block was imaged, or nothing; and what was imaged of the source, as a part of it."""
    for line in output.splitlines():
        message = json.loads(line)
        if message["message_type"] == "summary":
            [image] = message["images"]
            [part] = image["parts"]
            return part["every_block"], image["bytes_used"] / image["size"]
    return "", 1.0


def _by_partclone(stand: Stand, trial: Trial, *more: str) -> Outcome:
    """Onto the same noise."""
    out = Outcome()
    tool, image = fs.PARTCLONE[trial.kind], stand.root / "partclone.img"
    image.unlink(missing_ok=True)
    target = stand.clone("noise", "restored", (stand.root / "copy").stat().st_size)
    quiet = ["-q", "-L", "/dev/null"]
    for argv in (
        [tool, "-c", *more, *quiet, "-s", str(stand.root / "copy"), "-o", str(image)],
        ["partclone.restore", *quiet, "-C", "-s", str(image), "-O", str(target)],
    ):
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        if done.returncode:
            out.code = done.returncode
            out.note = (done.stderr.strip() or done.stdout.strip())[-200:]
            break
    out.fraction = image.stat().st_size / target.stat().st_size if image.exists() else 1.0
    return out


# --- the judgement ------------------------------------------------------------------------------


def _judge(
    stand: Stand, trial: Trial, out: Outcome, promised: dict[str, str], reference: Listing | None
) -> None:
    """Mount what was restored; compare it with the promises and with the reference."""
    if out.code or reference is None:
        return
    found = _seen(stand, trial.kind, stand.root / "restored")
    out.mounts = found is not None
    found = found or {}
    kept = {path: digest for path, digest in promised.items() if reference.get(path) == digest}
    out.lost = _missing(kept, found)
    out.differing = sorted(p for p in reference.keys() | found.keys() if reference.get(p) != found.get(p))
    if not trial.smeared and out.mounts and not out.differing:
        out.problem = _checked(trial.kind, stand.root / "restored")


def _missing(promised: dict[str, str], found: Listing) -> list[str]:
    return sorted(path for path, digest in promised.items() if found.get(path) != digest)


def _checked(kind: str, image: Path) -> str:
    """What the checker says of a filesystem whose log the mount before has replayed."""
    for argv in fs.CHECK[kind]:
        done = subprocess.run([*argv, str(image)], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{argv[0]} ends with {done.returncode}: {(done.stdout + done.stderr)[-300:]}"
    return ""


def _seen(stand: Stand, kind: str, image: Path) -> Listing | None:
    """Everything on it, after the kernel replayed its log; None where it mounts no more."""
    try:
        with attach(image) as device, mounted(device.path, MOUNTS[kind], stand.root.parent / "mnt") as root:
            return _listing(root)
    except CommandError:
        return None


def _listing(root: Path) -> Listing:
    found: Listing = {}
    problems: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=problems.append):
        for name in [*folders, *files]:
            path = Path(folder) / name
            found[str(path.relative_to(root))] = _content(path)
    for error in problems:
        found[f"{error.filename} (folder)"] = errno.errorcode.get(error.errno or 0, "?")
    return found


def _content(path: Path) -> str:
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            return os.readlink(path)
        return hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else oct(mode)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?")
