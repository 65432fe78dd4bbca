"""What a tool of the benchmark is, and imager as one: classes that know only command lines.

Invariant: every tool gets the same image at the same path, works in an empty folder of its own in the
same storage, encrypts if it can, and is told to use what makes it fastest for the job: holes skipped
where it can skip them, no cache of file times, no progress output.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import measure

JOBS = ("full", "restore", "verify", "same", "changed")
"""In the order they run: `same` and `changed` are backups of an unchanged and a changed source."""

PASSPHRASE = "correct horse battery staple"


@dataclass(frozen=True)
class Place:
    """Where a tool works: its own folder, the image it reads, and the ext4 partition cut out of that."""

    folder: Path
    image: Path
    partition: Path
    changed_map: Path


class Tool(ABC):
    """One tool: the command for each job that it can do."""

    name: str
    program: str
    jobs: tuple[str, ...] = JOBS
    says: str = ""
    partition_only = False

    @classmethod
    def describe(cls) -> str:
        """How it is run, in words."""
        return cls.says

    def __init__(self, place: Place) -> None:
        self.place = place
        self.store = place.folder / "store"
        self.target = place.folder / "target"

    @classmethod
    def installed(cls) -> bool:
        """Whether the program is there."""
        return shutil.which(cls.program) is not None

    @classmethod
    def version(cls) -> str:
        """Its own word for its version."""
        done = subprocess.run([cls.program, "--version"], check=False, capture_output=True, text=True)
        return (done.stdout + done.stderr).strip().splitlines()[0].strip("* ")

    @property
    def env(self) -> dict[str, str]:
        """What to add to the environment."""
        return {}

    @property
    def cwd(self) -> Path:
        """Where to run it."""
        return self.place.folder

    @property
    def restored(self) -> Path:
        """The file that a restore makes."""
        return self.target

    def prepare(self) -> None:
        """Make the empty repository, not timed; most tools need none."""
        return

    @abstractmethod
    def command(self, job: str) -> list[str]:
        """The command line of a job."""

    def stored(self) -> int:
        """How many bytes are kept."""
        return measure.tree_bytes(self.store)


class Imager(Tool):
    """This project: encrypted, lz4, 64 KiB, restore with read-back.

    `unlock` is how the repository is opened: with a keyfile, as an unattended run does, or
    with a passphrase, whose key derivation (Argon2id, 64 MiB) adds its time to every job.
    """

    name = "imager"
    program = "imager"
    unlock = "keyfile"

    @classmethod
    def describe(cls) -> str:
        """Its options in words."""
        return f"encrypted ({cls.unlock}), lz4, 64 KiB, every block; restore reads back"

    @classmethod
    def base_command(cls) -> list[str]:
        """The command beside this interpreter, else the one in the path."""
        given = os.environ.get("IMAGER_BENCH_COMMAND")
        if given:
            return given.split()
        beside = Path(sys.executable).parent / "imager"
        return [str(beside)] if beside.exists() else [shutil.which("imager") or "imager"]

    @classmethod
    def installed(cls) -> bool:
        """Whether it runs."""
        try:
            return (
                subprocess.run(
                    [*cls.base_command(), "--version"], check=False, capture_output=True
                ).returncode
                == 0
            )
        except OSError:
            return False

    @classmethod
    def version(cls) -> str:
        """Its own word for its version."""
        done = subprocess.run([*cls.base_command(), "--version"], check=False, capture_output=True, text=True)
        return done.stdout.strip()

    @property
    def env(self) -> dict[str, str]:
        """The secret; and compiled modules are kept, as they are where a tool is installed."""
        secret = {"IMAGER_PASSPHRASE": PASSPHRASE}
        if self.unlock == "keyfile":
            secret = {"IMAGER_KEYFILE": str(self.place.folder / "keyfile")}
        state = {"IMAGER_STATE_DIR": str(self.place.folder / "state")}
        return {**secret, **state, "PYTHONDONTWRITEBYTECODE": ""}

    def prepare(self) -> None:
        """An encrypted repository."""
        measure.run([*self.base_command(), "init", str(self.store), "--encryption", self.unlock], self.env)

    def command(self, job: str) -> list[str]:
        """As the README tells people to do it."""
        start = [*self.base_command(), "--json", "-r", str(self.store)]
        # As its peers do it: all that a filesystem does not use is imaged too.
        backup = [*start, "backup", str(self.place.image), "--name", "disk", "--all-blocks"]
        backup += ["--compression", "lz4"]
        return {
            "full": [*backup, "--strategy", "full"],
            "same": [*backup, "--strategy", "incremental"],
            "changed": [*backup, "--strategy", "incremental", "--changed", str(self.place.changed_map)],
            "restore": [*start, "restore", "disk", str(self.target)],
            "verify": [*start, "verify", "disk"],
        }[job]


def summary(output: str) -> dict[str, object]:
    """The last line that a job of imager prints with --json; counts of blocks summed over its images."""
    found: dict[str, object] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            message = json.loads(line)
            if isinstance(message, dict) and message.get("message_type") == "summary":
                found = message
    images = found.get("images")
    if isinstance(images, list) and images:
        for name in ("blocks_read", "blocks_changed", "blocks_new"):
            found[name] = sum(image[name] for image in images)
    return found
