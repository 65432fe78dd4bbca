"""What a storage really guarantees, found out by trying.

Invariant: a promise counts as kept only where it was tried and held; the objects
of the trial have names of their own (`probe/`), and those that were made are
removed again, whatever happens. Nothing else in the storage is touched.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

from msgspec import Struct
from msgspec.structs import replace

from imager.errors import ImagerError
from imager.storage.base import Storage
from imager.storage.errors import AlreadyExists, NotFound, StorageError
from imager.storage.folder import FolderStorage
from imager.storage.location import bare, local_path

PROBE = "probe/"

KEPT = "kept"
BROKEN = "BROKEN"
UNKNOWN = "unknown"
NOTE = "note"

_CLOCK_OFF = 120
"Seconds that clocks may differ without a word. No decision hangs on them; listings show them."


class Finding(Struct, frozen=True):
    """One promise. `essential`: without it a repository there is not safe."""

    promise: str
    state: str
    detail: str
    essential: bool = False


class Diagnosis(Struct, frozen=True):
    """What a probe found. `ok`: nothing essential is broken or could not be tried."""

    location: str
    findings: tuple[Finding, ...]
    seconds: float
    ok: bool


def probe(storage: Storage) -> Diagnosis:
    """Try everything. Raises `StorageError` where the storage cannot be reached at all.

    A folder without a repository is tried in a folder of its own inside.
    """
    root = local_path(storage)
    if root is None or os.path.exists(f"{root}/config"):
        return _probe(storage)
    try:
        with tempfile.TemporaryDirectory(prefix="imager-probe-", dir=root) as inside:
            folder = FolderStorage(inside)
            with folder.initializing():
                folder.create("config", b"{}")
                return replace(_probe(folder), location=storage.url)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(f"{root} cannot be tried: {reason}", hint="name a folder that is there") from error


def _probe(storage: Storage) -> Diagnosis:
    begun = time.monotonic()
    trial = _Trial(storage, rounds=12, writers=16)
    with trial:
        findings = [*trial.essentials(), *trial.rest()]
    findings += trial.left()
    return Diagnosis(storage.url, tuple(findings), round(time.monotonic() - begun, 3), _fit(findings))


def refuse_unfit(storage: Storage) -> None:
    """The quick part, before a repository is made. Raises `StorageError` where it would not be safe."""
    trial = _Trial(storage, rounds=8, writers=16)
    with trial:
        findings = [*trial.essentials()]
    if not _fit(findings):
        broken = next(finding for finding in findings if finding.essential and finding.state != KEPT)
        raise StorageError(
            f"{storage.url} is not fit for a repository: {broken.promise}: {broken.detail}",
            hint=f"imager doctor {storage.url} tells all; use another storage",
        )


def _fit(findings: list[Finding]) -> bool:
    return all(finding.state == KEPT for finding in findings if finding.essential)


class _Trial:
    def __init__(self, storage: Storage, *, rounds: int, writers: int) -> None:
        self.storage = storage
        self.rounds = rounds
        self.writers = writers
        self._tag = os.urandom(8).hex()
        self._count = 0
        self._made: list[str] = []
        self._stuck: list[str] = []
        self._older = 0

    def __enter__(self) -> _Trial:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was made."""
        for name in self._made:
            try:
                self.storage.delete(name)
            except NotFound:
                pass
            except StorageError:
                self._stuck.append(name)
        root = local_path(self.storage)
        if root is not None:
            try:
                os.rmdir(f"{root}/{PROBE.rstrip('/')}")
            except OSError:
                pass  # Another probe is under way; the last one takes it.

    def _name(self) -> str:
        self._count += 1
        name = f"{PROBE}{self._tag}-{self._count}"
        self._made.append(name)
        return name

    def _tried(self, promise: str, essential: bool, do: Callable[[], str | None], held: str) -> Finding:
        """`do` says what is broken, or None."""
        try:
            problem = do()
        except ImagerError as error:
            return Finding(promise, UNKNOWN, error.message, essential)
        return Finding(promise, BROKEN if problem else KEPT, problem or held, essential)

    # --- what safety hangs on ------------------------------------------------------------

    def essentials(self) -> Iterator[Finding]:
        """Create-only writes, raced too, and seeing what was written."""
        self._older = len(self.storage.list_names(PROBE))  # An error here is the caller's: it is not there.
        yield self._tried("create-only", True, self._create_only, "a second writer of a name is refused")
        yield self._tried("create-only, raced", True, self._raced, self._raced_detail())
        yield self._tried("read after write", True, self._read_back, "what was written is read at once")
        yield self._tried("list after write", True, self._listed, "what was written is listed at once")

    def _create_only(self) -> str | None:
        name = self._name()
        self.storage.create(name, b"first")
        for way, write in (("write", self.storage.create), ("upload", self._publish)):
            try:
                write(name, b"second")
                return f"a second {way} of a name was accepted: conditional writes are ignored"
            except AlreadyExists:
                if self.storage.read(name) != b"first":
                    return f"a {way} that was refused replaced the object"
        return None

    def _publish(self, name: str, data: bytes) -> None:
        staged = self.storage.stage()
        try:
            os.write(staged.fd, data)
            staged.publish(name)
        finally:
            staged.discard()

    def _raced_detail(self) -> str:
        return f"of {self.writers} writers at once exactly one won, {self.rounds} times"

    def _raced(self) -> str | None:
        for _ in range(self.rounds):
            name = self._name()
            won, failed = _race(self.writers, self.storage, name)
            if failed is not None:
                raise failed
            if len(won) != 1:
                return f"of {self.writers} writers at once {len(won)} were told that they had won"
            if self.storage.read(name) != _mark(won[0]):
                return "the object that is there is not that of the writer who won"
        return None

    def _read_back(self) -> str | None:
        for size in (1, 100_000):
            name, data = self._name(), os.urandom(size)
            self._publish(name, data)
            if self.storage.read(name) != data or self.storage.size(name) != size:
                return "what was written does not read back"
            if self.storage.read(name, size // 2, size) != data[size // 2 :]:
                return "a part of an object reads otherwise than the whole"
        return None

    def _listed(self) -> str | None:
        for _ in range(5):
            name = self._name()
            self.storage.create(name, b"x")
            if name not in self.storage.list_names(PROBE):
                return "a new object is missing in the listing that follows"
        return None

    # --- what is good to know ----------------------------------------------------------------

    def rest(self) -> Iterator[Finding]:
        """What upkeep and people want to know."""
        yield self._tried("delete", False, self._deleted, "what was deleted is gone at once")
        yield self._tried("move", False, self._moved, "an object gets another name, and replaces none")
        yield self._clock()
        yield self._durability()
        yield self._pace()
        if bare(self.storage).url.startswith("s3://"):
            yield self._object_lock()
        free = self.storage.free_space()
        from imager.units import format_size

        yield Finding("free space", NOTE, "not told" if free is None else format_size(free))

    def _deleted(self) -> str | None:
        name = self._name()
        self.storage.create(name, b"x")
        self.storage.delete(name)
        if self.storage.exists(name):
            return "a deleted object is still there"
        if name in self.storage.list_names(PROBE):
            return "a deleted object is still listed"
        return None

    def _moved(self) -> str | None:
        name, target, taken = self._name(), self._name(), self._name()
        self.storage.create(name, b"x")
        self.storage.create(taken, b"y")
        try:
            self.storage.move(name, taken)
            return "a move replaced another object"
        except AlreadyExists:
            pass
        self.storage.move(name, target)
        moved = self.storage.read(target) == b"x" and not self.storage.exists(name)
        return None if moved else "a moved object is not where it should be"

    def _clock(self) -> Finding:
        modified: Callable[[str], float] | None = getattr(bare(self.storage), "modified", None)
        if modified is None:
            return Finding("clock", UNKNOWN, "this kind of storage does not tell its time")
        name = self._name()
        try:
            before = time.time()
            self.storage.create(name, b"x")
            after = time.time()
            told = modified(name)
        except ImagerError as error:
            return Finding("clock", UNKNOWN, error.message)
        # Stores tell whole seconds.
        off = max(before - 1 - told, told - after - 1, 0.0)
        if off > _CLOCK_OFF:
            return Finding("clock", NOTE, f"it differs by {off:.0f} s from this machine's")
        return Finding("clock", KEPT, "it agrees with this machine's")

    def _durability(self) -> Finding:
        root = local_path(self.storage)
        if root is None:
            return Finding("durability", UNKNOWN, "as the store promises: what it acknowledges is kept")
        what = filesystem(root)
        if what in ("tmpfs", "ramfs"):
            return Finding("durability", BROKEN, f"{what} keeps nothing when the machine goes off")
        staged = self.storage.stage()
        try:
            nameless = os.fstat(staged.fd).st_nlink == 0
        finally:
            staged.discard()
        try:
            os.link(f"{root}/config", f"{root}/{self._name()}")
            links = True
        except FileNotFoundError:
            links = True  # No repository there yet: nothing to try it on.
        except OSError:
            links = False
        if not links:
            torn = "a crash in the middle of a write can leave a torn object under its name"
            return Finding("durability", NOTE, f"{what} has no links: {torn} (it is noticed)")
        how = "files without a name" if nameless else "named files in tmp/"
        return Finding("durability", KEPT, f"{what}: {how}, flushed, then linked, then the folder flushed")

    def _pace(self) -> Finding:
        name = self._name()
        self.storage.create(name, b"x")
        times = []
        for _ in range(5):
            begun = time.monotonic()
            self.storage.read(name, 0, 1)
            times.append(time.monotonic() - begun)
        return Finding("answers", NOTE, f"a small read takes {sorted(times)[2] * 1000:.1f} ms")

    def _object_lock(self) -> Finding:
        from imager.storage.object_versions import versions_of

        promise = "object lock"
        try:
            versions = versions_of(self.storage)
            locking = versions.locking()
            if locking is None:
                return Finding(promise, NOTE, "none: whoever may delete here can destroy what is stored")
            if locking.mode is None:
                detail = "new objects are not locked: imager retain --at-upload 30d has the bucket do that"
                return Finding(promise, NOTE, detail)
            name = self._name()
            self.storage.create(name, b"x")
            refused = versions.try_delete(next(versions.versions(name)))
        except ImagerError as error:
            return Finding(promise, UNKNOWN, error.message)
        if refused is None:
            return Finding(promise, BROKEN, "a locked object could be removed")
        mode = f"{locking.mode.lower()}, {locking.days} days from upload"
        return Finding(promise, KEPT, f"{mode}: removing a locked object was refused")

    def left(self) -> Iterator[Finding]:
        """What could not be removed."""
        if self._older:
            yield Finding("clean-up", NOTE, f"{self._older} objects of earlier probes lie below {PROBE}")
        if self._stuck:
            yield Finding(
                "clean-up",
                NOTE,
                f"{len(self._stuck)} objects below {PROBE} could not be removed: this access may not delete",
            )


def _mark(number: int) -> bytes:
    return b"writer %d\n" % number * 500


def _race(writers: int, storage: Storage, name: str) -> tuple[list[int], StorageError | None]:
    """Let `writers` write at once: the numbers of those who won, and an error that is not a lost race."""
    barrier = threading.Barrier(writers)
    won: list[int] = []
    failed: list[StorageError] = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            storage.create(name, _mark(number))
            won.append(number)
        except AlreadyExists:
            pass
        except StorageError as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return won, failed[0] if failed else None


def filesystem(path: str) -> str:
    """The type of the filesystem that a folder lies on, or "an unknown filesystem"."""
    best, kind = "", "an unknown filesystem"
    here = os.path.realpath(path)
    try:
        with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                fields = line.split()
                where = fields[1].replace("\\040", " ")
                if (here == where or here.startswith(where.rstrip("/") + "/")) and len(where) >= len(best):
                    best, kind = where, fields[2]
    except (OSError, IndexError):
        pass
    return kind
