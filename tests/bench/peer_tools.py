"""The peers: one class each, with the options that make the tool fastest for the job.

Invariant: as in `tools`: the same image, an empty folder, encryption where the tool has it, holes
skipped where it can skip them, no cache of file times, no progress output.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import measure
from tools import PASSPHRASE, Imager, Tool


class Borg(Tool):
    """Borg with blocks of a fixed size; its cache of file times is off, so it reads the file each time."""

    name = "borg"
    program = "borg"
    mode = "repokey-blake2"

    @classmethod
    def describe(cls) -> str:
        """Its options in words."""
        return f"{cls.mode}, lz4, fixed 64 KiB, --sparse, --files-cache disabled"

    @property
    def env(self) -> dict[str, str]:
        """Key, cache and configuration below the tool's own folder."""
        return {"BORG_PASSPHRASE": PASSPHRASE, "BORG_BASE_DIR": str(self.place.folder / "base")}

    @property
    def cwd(self) -> Path:
        """Borg extracts to where it is."""
        self.target.mkdir(exist_ok=True)
        return self.target

    @property
    def restored(self) -> Path:
        """Below the target by its full path."""
        return self.target / str(self.place.image).lstrip("/")

    def prepare(self) -> None:
        """An encrypted repository."""
        measure.run(["borg", "init", "-e", self.mode, str(self.store)], self.env)

    def command(self, job: str) -> list[str]:
        """Options as fast as they go."""
        create = [
            "borg",
            "create",
            "--sparse",
            "--files-cache",
            "disabled",
            "--chunker-params",
            "fixed,65536",
        ]
        create += ["--compression", "lz4"]
        if job in ("full", "same", "changed"):
            return [*create, f"{self.store}::{job}", str(self.place.image)]
        if job == "restore":
            return ["borg", "extract", "--sparse", f"{self.store}::full"]
        return ["borg", "check", "--verify-data", str(self.store)]


class BorgSha(Borg):
    """Borg with SHA-256, which is faster than its BLAKE2b where the processor has instructions for it."""

    name = "borg-sha256"
    mode = "repokey"


class Restic(Tool):
    """restic with its own content-defined chunks; --force, so it reads the file each time."""

    name = "restic"
    program = "restic"
    says = "its own chunks, zstd, --force; restore without --verify"

    @classmethod
    def version(cls) -> str:
        """restic has a verb for it."""
        return subprocess.run(
            ["restic", "version"], check=False, capture_output=True, text=True
        ).stdout.strip()

    @property
    def env(self) -> dict[str, str]:
        """Repository and password."""
        cache = str(self.place.folder / "cache")
        return {
            "RESTIC_PASSWORD": PASSPHRASE,
            "RESTIC_REPOSITORY": str(self.store),
            "RESTIC_CACHE_DIR": cache,
        }

    @property
    def restored(self) -> Path:
        """Below the target by its full path."""
        return self.target / str(self.place.image).lstrip("/")

    def prepare(self) -> None:
        """A repository of the second version, which compresses."""
        measure.run(["restic", "init", "--repository-version", "2"], self.env)

    def command(self, job: str) -> list[str]:
        """Quiet, and with the file read each time."""
        if job == "restore":
            return ["restic", "-q", "restore", "latest", "--target", str(self.target)]
        if job == "verify":
            return ["restic", "-q", "check", "--read-data"]
        return ["restic", "-q", "backup", "--force", str(self.place.image)]


class Qemu(Tool):
    """qemu-img convert to a compressed qcow2 and back to raw: no encryption, no repository."""

    name = "qemu-img"
    program = "qemu-img"
    jobs = ("full", "restore")
    says = "qcow2, zstd, -W -m 8; not encrypted"

    def command(self, job: str) -> list[str]:
        """Out of order and on eight coroutines, the fastest way it has."""
        if job == "restore":
            return [
                "qemu-img",
                "convert",
                "-f",
                "qcow2",
                "-O",
                "raw",
                "-W",
                "-m",
                "8",
                str(self.store),
                str(self.target),
            ]
        make = [
            "qemu-img",
            "convert",
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-c",
            "-o",
            "compression_type=zstd",
            "-W",
            "-m",
            "8",
        ]
        return [*make, str(self.place.image), str(self.store)]


class Zstd(Tool):
    """A plain compressed copy: reads the holes too, no encryption, no repository."""

    name = "zstd"
    program = "zstd"
    jobs = ("full", "restore", "verify")
    says = "-1 -T0; not encrypted"

    def command(self, job: str) -> list[str]:
        """All cores for compression; zstd decompresses on one."""
        if job == "full":
            return ["zstd", "-q", "-1", "-T0", str(self.place.image), "-o", str(self.store)]
        if job == "verify":
            return ["zstd", "-q", "-t", str(self.store)]
        return ["zstd", "-q", "-d", "--sparse", str(self.store), "-o", str(self.target)]


class Casync(Tool):
    """casync with its chunk store: no encryption."""

    name = "casync"
    program = "casync"
    jobs = ("full", "restore", "same", "changed")
    says = "blob index and chunk store, its defaults; not encrypted"

    @property
    def index(self) -> str:
        """The blob index of a backup."""
        return str(self.place.folder / "full.caibx")

    def command(self, job: str) -> list[str]:
        """One index a backup, one store for all."""
        if job == "restore":
            return [
                "casync",
                "extract",
                "--punch-holes=yes",
                f"--store={self.store}",
                self.index,
                str(self.target),
            ]
        index = str(self.place.folder / f"{job}.caibx")
        return ["casync", "make", f"--store={self.store}", index, str(self.place.image)]

    def stored(self) -> int:
        """The chunks and the index."""
        return super().stored() + measure.tree_bytes(Path(self.index))


class Partclone(Tool):
    """partclone on the ext4 partition alone: only the blocks in use, piped through zstd; no encryption."""

    name = "partclone"
    program = "partclone.ext4"
    jobs = ("full", "restore")
    says = "ext4 partition only, used blocks, through zstd -1 -T0; not encrypted"
    partition_only = True

    @classmethod
    def version(cls) -> str:
        """It prints its version with -v."""
        done = subprocess.run([cls.program, "-v"], check=False, capture_output=True, text=True)
        return (done.stdout + done.stderr).strip().splitlines()[0]

    def command(self, job: str) -> list[str]:
        """As Clonezilla runs it; the target is a sparse file of the partition's size."""
        log = self.place.folder / "log"
        if job == "full":
            pipe = f"partclone.ext4 -q -c -L {log} -s {self.place.partition} -o - "
            pipe += f"| zstd -q -1 -T0 -o {self.store}"
        else:
            size = self.place.partition.stat().st_size
            self.target.touch()
            os.truncate(self.target, size)
            pipe = f"zstd -q -d -c {self.store} | partclone.ext4 -q -r -C -L {log} -s - -O {self.target}"
        return ["bash", "-o", "pipefail", "-c", pipe]


TOOLS: tuple[type[Tool], ...] = (Imager, Borg, BorgSha, Restic, Qemu, Zstd, Casync, Partclone)
