"""A repository under test: backups by the engine, read back by the engine and by the reference reader.

Whatever the engine stores is proved here by two readers: restore, which
shares its native core, and `imager.reference`, which shares nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from imager import reference
from imager.engine import backup, restore
from imager.engine.backup import BackupOptions, BackupSummary
from imager.engine.restore import RestoreOptions, RestoreSummary
from imager.engine.verify import verify
from imager.events import Silent
from imager.repository.blockmap import MapReader
from imager.repository.check import check
from imager.repository.credentials import Credentials
from imager.repository.imageset import Image, Manifest, read_set
from imager.repository.repository import Repository
from imager.storage.base import Storage
from imager.storage.folder import FolderStorage
from imager.storage.rehearsal import Recording

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"Where many small repositories are made quickly; None: the usual temporary folder."
KEYFILE = bytes(range(64))
PASSPHRASE = "correct horse"


class Workbench:
    """A repository in a folder, opened anew for each step as each command of the tool does."""

    def __init__(
        self,
        folder: Path,
        *,
        encryption: str = "none",
        block_size: int = 0,
        record: bool = False,
        create: bool = True,
    ) -> None:
        """`record`: count the storage's calls (`calls`). The state folder is the caller's to set."""
        self.folder = folder
        self.root = folder / "repo"
        self.encryption = encryption
        self.calls: Counter[str] = Counter()
        self.names: list[tuple[str, str]] = []
        self._record = record
        key = folder / "key"
        secret = folder / "passphrase"
        if not key.exists():
            key.write_bytes(KEYFILE)
            secret.write_text(PASSPHRASE)
        self.credentials = Credentials(keyfile=str(key), passphrase_file=str(secret), interactive=False)
        if create:
            Repository.init(
                self.storage(), self.credentials, encryption=encryption, block_size=block_size
            ).close()

    def storage(self) -> Storage:
        storage = FolderStorage(str(self.root))
        return Recording(storage, self.calls, self.names) if self._record else storage

    def open(self, *, writing: bool = True) -> Repository:
        """The repository, opened anew; the caller closes it."""
        return Repository.open(self.storage(), self.credentials, writing=writing)

    def backup(
        self, *sources: Path | str, reporter: Silent | None = None, **options: object
    ) -> BackupSummary:
        """One run of `imager backup`."""
        wanted = BackupOptions(**options)  # type: ignore[arg-type]
        reporter = reporter or Silent()
        with self.open() as repository:
            plan = backup.plan(repository, [str(source) for source in sources], wanted, reporter)
            return backup.execute(repository, plan, reporter)

    def restore(self, text: str, target: Path, **options: object) -> RestoreSummary:
        """One run of `imager restore` onto a file."""
        wanted = RestoreOptions(**options)  # type: ignore[arg-type]
        with self.open(writing=False) as repository:
            plan = restore.plan(repository, text, str(target), wanted, Silent())
            return restore.execute(repository, plan, Silent())

    def reference(self, text: str, target: Path, disk: str | None = None) -> None:
        """What the reference reader makes of an image."""
        passphrase = PASSPHRASE if self.encryption == "passphrase" else None
        keyfile = KEYFILE if self.encryption == "keyfile" else None
        repository = reference.Repository(str(self.root), passphrase, keyfile)
        images = repository.images(repository.resolve(text))
        (image,) = [one for one in images if disk in (None, one.disk)]
        reference.write_image(repository, image, str(target))

    def manifest(self, text: str) -> Manifest:
        with self.open(writing=False) as repository:
            return read_set(repository, text)

    @contextmanager
    def reading(self, text: str, disk: int = 0) -> Iterator[tuple[Repository, Image, MapReader]]:
        """The block map of a set's image."""
        with self.open(writing=False) as repository:
            image = read_set(repository, text).images[disk]
            yield repository, image, MapReader(repository, image)

    def objects(self) -> set[str]:
        """Names of all objects."""
        with self.open(writing=False) as repository:
            folders = ("packs/", "maps/", "index/", "sets/", "sessions/")
            return {name for folder in folders for name in repository.storage.list_names(folder)}

    def damage(self, prefix: str, number: int = 0) -> Path:
        """The path of an object, for a test to harm."""
        paths = sorted(path for path in (self.root / prefix).rglob("*") if path.is_file())
        return paths[number]

    # --- what must hold -----------------------------------------------------------------

    def is_whole(self, sets: Iterable[str] = (), *, read_data: str | None = "all") -> None:
        """`verify` of the sets and `check --read-data` find nothing."""
        for one in sets:
            with self.open(writing=False) as repository:
                found = verify(repository, one, Silent())
                assert found.ok, (one, found.damage)
        with self.open(writing=False) as repository:
            summary = check(repository, Silent(), read_data=read_data)
            problems = [(problem.object, problem.detail) for problem in summary.problems]
            assert summary.ok and not problems, problems

    def gives(
        self,
        text: str,
        wanted: Mapping[str, bytes | Path],
        *,
        old: bytes | None = None,
        reference: bool = True,
    ) -> None:
        """Each disk comes back exactly: in full, with `old` also by `--delta`, and by the reference."""
        for disk, content in wanted.items():
            name = f"{text}:{disk}"
            target = self.folder / "restored"
            summary = self.restore(name, target)
            assert summary.verified
            same(target, content, f"restore of {name}")
            if old is not None:
                target.write_bytes(old)
                self.restore(name, target, delta=True, overwrite=True, unused="zero")
                same(target, content, f"restore --delta of {name}")
            target.unlink()
            if reference:
                self.reference(text, target, disk)
                same(target, content, f"the reference reader's {name}")
                target.unlink()


def same(path: Path, wanted: bytes | Path, what: str) -> None:
    """Assert that a file has these bytes; a file is compared piece by piece."""
    if isinstance(wanted, bytes):
        got = path.read_bytes()
        assert len(got) == len(wanted), f"{what}: {len(got)} bytes instead of {len(wanted)}"
        if got != wanted:
            first = next(at for at, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b)
            raise AssertionError(f"{what}: differs from byte {first} on")
        return
    assert path.stat().st_size == wanted.stat().st_size, what
    done = subprocess.run(["cmp", str(path), str(wanted)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{what}: {done.stdout}{done.stderr}"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_map(path: Path, extents: Sequence[tuple[int, int]], **facts: object) -> Path:
    """A changed-block map: `extents` as (start, length) in bytes."""
    path.write_text(json.dumps({"extents": [list(one) for one in extents], **facts}))
    return path


def imager(*arguments: str | Path) -> list[str]:
    """The command line of the tool, for `subprocess`."""
    return [sys.executable, "-m", "imager", *map(str, arguments)]


@contextmanager
def state_in(folder: Path) -> Iterator[None]:
    """What this machine remembers, kept in `folder`; for tests that make many repositories in one run."""
    kept = {name: os.environ.get(name) for name in ("IMAGER_STATE_DIR", "IMAGER_CACHE_DIR")}
    os.environ.update({name: str(folder / name) for name in kept})
    try:
        yield
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
