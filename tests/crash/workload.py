"""Random work on a mounted filesystem, and what of it has to survive a crash at any moment.

Invariant: a promise stands in the ledger only from the return of the fsyncs that make it until the next
operation on that path begins; whatever happens in between, the file is there, byte for byte.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import mmap
import os
import random
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

from tests.filesystems import FICLONE

PAGE = 4096
PUNCH_HOLE = 3
"FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE"
SIZES = (0, 20, 700, 4096, 9000, 30_000, 70_000, 300_000)
MOST = 700_000
"Bytes of a file."
LIVE = 8 << 20
"Bytes of all files of one thread, about: then some are deleted."


class Ledger:
    """Promises: path (below the mount point) to the digest of what it holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._promised: dict[str, tuple[int, str]] = {}
        self._serial = 0
        self.operations = 0

    def withdraw(self, *paths: str) -> None:
        """Something is about to happen to these."""
        with self._lock:
            for path in paths:
                self._promised.pop(path, None)

    def promise(self, path: str, content: bytes) -> None:
        """This has been fsynced, and its folder with it."""
        digest = hashlib.sha256(content).hexdigest()
        with self._lock:
            self._serial += 1
            self._promised[path] = (self._serial, digest)

    def seen(self) -> dict[str, tuple[int, str]]:
        """All promises of this moment."""
        with self._lock:
            return dict(self._promised)

    @staticmethod
    def throughout(before: dict[str, tuple[int, str]], after: dict[str, tuple[int, str]]) -> dict[str, str]:
        """Those that stood at both moments and all the time between."""
        return {path: kept[1] for path, kept in before.items() if after.get(path) == kept}


class Worker(threading.Thread):
    """One thread of work, in a folder of its own."""

    def __init__(self, kind: str, root: Path, name: str, seed: int, ledger: Ledger) -> None:
        super().__init__(name=name, daemon=True)
        self._kind = kind
        self._root = root
        self._own = name
        self._chance = random.Random(f"{seed} {name}")
        self._ledger = ledger
        self._files: dict[str, bytearray] = {}
        self._snapshots: list[str] = []
        self._held: list[int] = []
        self._made = 0
        self.stopping = threading.Event()
        self.error: BaseException | None = None
        (root / name).mkdir(exist_ok=True)
        for folder in range(3):
            (root / name / f"d{folder}").mkdir(exist_ok=True)

    def run(self) -> None:
        steps: list[tuple[int, Callable[[], None]]] = [
            (24, self.create), (9, self.append), (9, self.overwrite), (8, self.mapped), (8, self.direct),
            (7, self.truncate), (10, self.rename), (14, self.unlink), (4, self.punch), (3, self.link),
            (1, self.sync_all), (3, self.replace), (3, self.hold),
        ]  # fmt: skip
        if self._kind in ("xfs", "btrfs"):
            steps.append((6, self.clone))
        if self._kind == "btrfs":
            steps.append((3, self.snapshot))
        weights, actions = [weight for weight, _ in steps], [action for _, action in steps]
        try:
            while not self.stopping.is_set():
                if sum(map(len, self._files.values())) > LIVE:
                    self.unlink()
                self._chance.choices(actions, weights)[0]()
                self._ledger.operations += 1
        except OSError as error:
            if error.errno != errno.ENOSPC:
                self.error = error
        except BaseException as error:
            self.error = error
        finally:
            for fd in self._held:
                os.close(fd)

    # --- what is done ----------------------------------------------------------------------

    def create(self) -> None:
        path, content = self._new(), self._bytes(self._chance.choice(SIZES))
        with open(self._root / path, "wb") as file:
            file.write(content)
        self._files[path] = bytearray(content)
        self._perhaps(path)

    def append(self) -> None:
        if path := self._any():
            more = self._bytes(self._chance.choice(SIZES))
            if len(self._files[path]) + len(more) > MOST:
                return
            with open(self._root / path, "ab") as file:
                file.write(more)
            self._files[path] += more
            self._perhaps(path)

    def overwrite(self) -> None:
        if path := self._any():
            content = self._files[path]
            at = self._chance.randrange(len(content) + 20_000)
            new = self._bytes(self._chance.choice((1, 100, 5000, 40_000)))
            with open(self._root / path, "r+b") as file:
                file.seek(at)
                file.write(new)
            self._put(content, at, new)
            self._perhaps(path)

    def mapped(self) -> None:
        """Through memory, msync and fsync."""
        path = self._any()
        if not path or not self._files[path]:
            return
        content = self._files[path]
        with open(self._root / path, "r+b") as file, mmap.mmap(file.fileno(), len(content)) as memory:
            for _ in range(self._chance.randrange(1, 6)):
                at = self._chance.randrange(len(content))
                new = self._bytes(min(self._chance.randrange(1, 6000), len(content) - at))
                memory[at : at + len(new)] = new
                content[at : at + len(new)] = new
            memory.flush()
        self._perhaps(path)

    def direct(self) -> None:
        """Past the page cache; O_DIRECT promises nothing without an fsync either."""
        if path := self._any():
            content = self._files[path]
            at = self._chance.randrange(len(content) // PAGE + 2) * PAGE
            pages = self._chance.randrange(1, 9)
            new = self._bytes(pages * PAGE)
            fd = os.open(self._root / path, os.O_RDWR | os.O_DIRECT)
            try:
                with mmap.mmap(-1, len(new)) as buffer:
                    buffer.write(new)
                    os.pwrite(fd, buffer, at)
            finally:
                os.close(fd)
            self._put(content, at, new)
            self._perhaps(path)

    def truncate(self) -> None:
        if path := self._any():
            content = self._files[path]
            size = self._chance.randrange(len(content) + 10_000)
            os.truncate(self._root / path, size)
            del content[size:]
            content += bytes(size - len(content))
            self._perhaps(path)

    def rename(self) -> None:
        """To a new name or over another file, in this folder or the next."""
        path = self._any()
        if not path:
            return
        new = self._new() if self._chance.random() < 0.6 else self._any() or self._new()
        if new == path:
            return
        os.rename(self._root / path, self._root / new)
        self._files[new] = self._files.pop(path)
        self._perhaps(new, also=path)

    def replace(self) -> None:
        """As editors do: written beside, fsynced, renamed over."""
        path = self._any()
        if not path:
            return
        content = self._bytes(self._chance.choice(SIZES))
        beside = self._new()
        with open(self._root / beside, "wb") as file:
            file.write(content)
            os.fsync(file.fileno())
        os.rename(self._root / beside, self._root / path)
        self._files[path] = bytearray(content)
        self._perhaps(path, also=beside)

    def unlink(self) -> None:
        if path := self._any():
            os.unlink(self._root / path)
            del self._files[path]

    def hold(self) -> None:
        """Deleted while it is open: what a crash leaves for the next mount to clean up."""
        path = self._new()
        fd = os.open(self._root / path, os.O_RDWR | os.O_CREAT)
        self._held.append(fd)
        os.write(fd, self._bytes(self._chance.choice(SIZES)))
        os.unlink(self._root / path)
        if self._chance.random() < 0.5:
            os.fsync(fd)
        if len(self._held) > 4:
            os.close(self._held.pop(0))

    def punch(self) -> None:
        """Room ahead, or a hole."""
        if path := self._any():
            content = self._files[path]
            with open(self._root / path, "r+b") as file:
                if self._chance.random() < 0.5:
                    at, length = self._chance.randrange(60_000), self._chance.randrange(1, 60_000)
                    os.posix_fallocate(file.fileno(), at, length)
                    content += bytes(max(0, at + length - len(content)))
                elif len(content) > 3 * PAGE:
                    _libc("fallocate", file.fileno(), PUNCH_HOLE, PAGE, PAGE)
                    content[PAGE : 2 * PAGE] = bytes(PAGE)
            self._perhaps(path)

    def link(self) -> None:
        """A second name; contents are written to one name only, from then on to none."""
        if path := self._any():
            os.link(self._root / path, self._root / f"{path}.link")
            content = bytes(self._files.pop(path))
            for name in (path, f"{path}.link"):
                self._sync(name)
                self._ledger.promise(name, content)

    def clone(self) -> None:
        path = self._any()
        if not path:
            return
        new = self._new()
        with open(self._root / path, "rb") as source, open(self._root / new, "wb") as out:
            try:
                fcntl.ioctl(out.fileno(), FICLONE, source.fileno())
                self._files[new] = bytearray(self._files[path])
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                self._files[new] = bytearray()
        self._perhaps(new)

    def snapshot(self) -> None:
        """Of the folder's subvolume; or an old one deleted."""
        if len(self._snapshots) > 2:
            old = self._snapshots.pop(0)
            subprocess.run(["btrfs", "-q", "subvolume", "delete", str(self._root / old)], check=True)
            return
        name = f"snap-{self._own}-{self._made}"
        self._made += 1
        argv = ["btrfs", "-q", "subvolume", "snapshot", str(self._root), str(self._root / name)]
        subprocess.run(argv, check=True)
        self._snapshots.append(name)

    def sync_all(self) -> None:
        """All that there is, at once."""
        files = {path: bytes(content) for path, content in self._files.items()}
        fd = os.open(self._root, os.O_RDONLY)
        try:
            _libc("syncfs", fd)
        finally:
            os.close(fd)
        for path, content in files.items():
            self._ledger.promise(path, content)

    # --- helpers -------------------------------------------------------------------------------

    def _new(self) -> str:
        self._made += 1
        return f"{self._own}/d{self._chance.randrange(3)}/f{self._made}-{'n' * self._chance.randrange(30)}"

    def _any(self) -> str | None:
        """A file to do something to: what was promised of it is so no longer."""
        if not self._files:
            return None
        path = self._chance.choice(list(self._files))
        self._ledger.withdraw(path)
        return path

    def _bytes(self, count: int) -> bytes:
        """Half of it random, so that no two files are alike; half of it compresses."""
        half = count // 2
        return self._chance.randbytes(count - half) + bytes([self._chance.randrange(256)]) * half

    @staticmethod
    def _put(content: bytearray, at: int, new: bytes) -> None:
        content += bytes(max(0, at - len(content)))
        content[at : at + len(new)] = new

    def _perhaps(self, path: str, also: str | None = None) -> None:
        """Often, have it written out: a promise from then on."""
        if self._chance.random() < 0.55:
            self._sync(path)
            if also:
                self._sync_folder(also)
            self._ledger.promise(path, bytes(self._files[path]))

    def _sync(self, path: str) -> None:
        fd = os.open(self._root / path, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        self._sync_folder(path)

    def _sync_folder(self, path: str) -> None:
        fd = os.open((self._root / path).parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _libc(name: str, *arguments: int) -> None:
    """A call that Python's os has not."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*map(ctypes.c_long, arguments)):
        raise OSError(ctypes.get_errno(), name)
