"""Check a repository: its structure, its stored bytes, and what damage costs.

Invariant: a check changes nothing unless it is told to repair; and what it
calls whole has been read, and was what its name, its signature or its
parent says.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial

from msgspec import Struct
from msgspec.structs import replace

from imager import _native
from imager.events import Reporter
from imager.repository import checked, index, missing, references, sessions, structure
from imager.repository.checked import Record, Wish
from imager.repository.damage import hurt_by_pack
from imager.repository.findings import Hurt, Problem, Survey
from imager.repository.format import DAMAGED, INDEX, KIND_DATA, KIND_MAP, PACKS, pack_object
from imager.repository.repository import Repository
from imager.repository.transfer import in_parallel
from imager.storage.errors import AlreadyExists, NotFound

__all__ = ["Hurt", "PackAge", "Problem", "Summary", "check"]

_CHUNK = 4 << 20
_PIECE = 1024
"After so many packs the record is written, so that a check that is stopped was not in vain."


class PackAge(Struct, frozen=True):
    """When a pack was last read back whole (microseconds since 1970 UTC); None: never, as far as known."""

    pack: str
    size: int
    read: int | None


class Summary(Struct, frozen=True):
    """What a check found. `packs` counts those there are, `packs_read` those whose bytes were read.

    `keyless`: nothing was decrypted. `packs_unread`: packs that no check on record has read whole;
    `oldest_read`: when the longest unread of the others was (microseconds since 1970 UTC), None where
    there is none. `ages`: of each pack, where that was asked for.
    """

    sets: int
    packs: int
    packs_read: int
    pages: int
    bytes_read: int
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    repaired: tuple[str, ...]
    seconds: float
    ok: bool
    keyless: bool = False
    packs_unread: int = 0
    oldest_read: int | None = None
    ages: tuple[PackAge, ...] | None = None


def check(
    repository: Repository,
    reporter: Reporter,
    *,
    read_data: str | None = None,
    repair: bool = False,
    ages: bool = False,
    threads: int = 0,
) -> Summary:
    """Check the structure; with `read_data` also packs and index segments; then trace what damage costs.

    read_data: `all`; or a share `N/M` or `10%`, or an amount `5G`, of the packs that were not read for
    the longest time. A repository that was opened without a key is checked as far as that goes.
    repair: set damaged packs aside, so that the next backup stores their blocks anew, rebuild the index,
    and remove what dead writers left. Raises `UsageError`, `StorageError`.
    """
    begun = time.monotonic()
    wish = checked.parse_wish(read_data) if read_data is not None else None
    found = structure.survey(repository, reporter)
    record = checked.load(repository)
    chosen: list[str] = []
    if wish is not None:
        chosen = record.choose(found.sizes, wish)
        _read_index(found)
        _read_packs(found, chosen, threads, record, wish)
        if found.keyless:
            references.check_blocks(found, chosen)
    costs = references.hurt_sets(found) if found.keyless else hurt_by_pack(found)
    _excuse(found, costs)
    done: list[str] = []
    if repair:
        _set_aside(found, done)
    problems = _pack_problems(found, costs)
    if repair:
        problems += _rebuild(found, done)
    else:
        problems += found.problems
    problems.sort(key=lambda problem: (problem.kind, problem.object))
    reads = {path: record.last_read(path) for path in sorted(found.sizes)}
    known = [at for at in reads.values() if at is not None]
    return Summary(
        sets=len(found.listing.sets),
        packs=len(found.sizes),
        packs_read=len(chosen),
        pages=found.pages,
        bytes_read=found.read,
        problems=tuple(problems),
        notes=(*found.notes, *record.notes),
        repaired=tuple(done),
        seconds=round(time.monotonic() - begun, 3),
        ok=all(problem.repaired for problem in problems),
        keyless=found.keyless,
        packs_unread=len(reads) - len(known),
        oldest_read=min(known, default=None),
        ages=tuple(PackAge(path, found.sizes[path], at) for path, at in reads.items()) if ages else None,
    )


# --- reading --------------------------------------------------------------------------------


def _read_packs(found: Survey, chosen: list[str], threads: int, record: Record, wish: Wish) -> None:
    """Check whole packs: name, frame, and the digest of every payload. No key takes part."""
    found.reporter.phase("reading packs", sum(found.sizes[name] for name in chosen))
    whole: list[str] = []
    share = 0
    try:
        for path, result in _reads(found, chosen, threads):
            if _take(found, path, result):
                whole.append(path)
            if len(whole) >= _PIECE:
                record.keep(0, whole, found.sizes)
                whole = []
            found.reporter.advance(found.sizes[path])
        share = record.share_of(wish, found.sizes)
        if found.unlisted:
            found.notes.append(f"{found.unlisted} blocks are not in the index: a backup may store them again")
    finally:
        if whole or share:
            record.keep(share, whole, found.sizes)
    found.reporter.end()


class _Read(Struct, frozen=True):
    """What reading a pack showed. `unknown`: blocks of it that no index segment names."""

    problem: str | None = None
    unknown: int = 0
    read: bool = True


def _reads(found: Survey, chosen: list[str], threads: int) -> Iterator[tuple[str, _Read]]:
    """Read packs: those of a far storage many at a time, for there each one takes long to come."""
    if getattr(found.repository.storage, "local", True):
        for path in chosen:
            yield path, _read_pack(found, path, threads)
        return
    jobs = [partial(_read_pack, found, path, 1) for path in chosen]
    yield from zip(chosen, in_parallel(jobs), strict=True)


def _read_pack(found: Survey, path: str, threads: int) -> _Read:
    """Read one pack and check it. Changes nothing of `found`, so that several can do it at once."""
    repository, name = found.repository, bytes.fromhex(path[-64:])
    try:
        fd = repository.storage.open(path)
    except NotFound:
        return _Read("it is missing", read=False)
    try:
        report = _native.check_pack(fd, name, repository.id, threads)
        if report.problem is not None:
            return _Read(report.problem)
        if report.damaged:
            return _Read(f"{len(report.damaged)} of its {report.records} records are damaged")
        if not path.startswith(PACKS):
            return _Read()
        records = _native.pack_records(fd, name, repository.id)
        return _Read(unknown=len(records) - found.known.count(b"".join(record[1] for record in records)))
    except (OSError, _native.DamagedError) as error:
        return _Read(f"it cannot be read: {getattr(error, 'strerror', error)}")
    finally:
        os.close(fd)


def _take(found: Survey, path: str, result: _Read) -> bool:
    """Take down what reading a pack showed; whether it is whole."""
    number = found.repository.names.intern(bytes.fromhex(path[-64:]))
    if result.read:
        found.read += found.sizes[path]
    if result.problem is not None:
        found.blame(number, result.problem)
    elif result.unknown and number in found.used and found.known.naming([bytes.fromhex(path[-64:])]):
        # Stored twice once: a merged segment kept the other place, and a prune has deleted that.
        found.unlisted += result.unknown
    elif result.unknown and number in found.used:
        found.problems.append(
            Problem(
                "index",
                "the index",
                f"it lacks {result.unknown} blocks of pack {path[-64:]}: a segment is missing or damaged; "
                "nothing is lost, but such blocks may be stored twice",
            )
        )
    return result.problem is None


def _read_index(found: Survey) -> None:
    """Check every index segment against its name."""
    import blake3

    repository = found.repository
    for name in index.segment_names(repository):
        digest = blake3.blake3(b"imager index v1")
        try:
            fd = repository.storage.open(name)
        except NotFound:
            continue
        try:
            while chunk := os.read(fd, _CHUNK):
                digest.update(chunk)
                found.read += len(chunk)
        except OSError as error:
            found.problems.append(Problem("index", name, f"it cannot be read: {error.strerror}"))
            continue
        finally:
            os.close(fd)
        if digest.hexdigest() != name.removeprefix(INDEX) and not _told(found, name):
            found.problems.append(
                Problem("index", name, "it is not the one its name says: damaged or swapped")
            )


def _told(found: Survey, name: str) -> bool:
    return any(problem.object == name for problem in found.problems)


# --- what it comes to ---------------------------------------------------------------------------


def _excuse(found: Survey, costs: dict[int, list[Hurt]]) -> None:
    """Packs that are gone while all that sets need of them is elsewhere: the index does not say where."""
    if not found.keyless and any(manifest.body is None for manifest in found.listing.sets):
        return  # What those need was not traced.
    gone = [
        number
        for number, reasons in found.bad.items()
        if reasons == ["it is missing"] and number not in costs and number not in found.maps | found.aside
    ]
    for number in gone:
        del found.bad[number]
    if gone:
        found.notes.append(
            f"the index does not tell where the blocks of {len(gone)} packs are that are gone; they are "
            "there, but finding them takes long: imager check --repair mends it"
        )


def _pack_problems(found: Survey, costs: dict[int, list[Hurt]]) -> list[Problem]:
    problems: list[Problem] = []
    names = found.repository.names
    for number in sorted({*found.bad, *costs, *found.aside}):
        name = names.name(number)
        kind = KIND_MAP if number in found.maps else KIND_DATA
        path = pack_object(kind, name) if name is not None else "?"
        hurt = tuple(costs.get(number, ()))
        if number in found.aside:
            if not hurt:
                found.notes.append(f"{DAMAGED}{path} was set aside by a repair; no image set has lost by it")
                continue
            detail = "; ".join([*found.bad.get(number, ()), "it was set aside by a repair"])
        else:
            detail = "; ".join(found.bad[number])
        problems.append(Problem("map" if kind == KIND_MAP else "pack", path, detail, hurt))
    return problems


def _set_aside(found: Survey, done: list[str]) -> None:
    """Move packs whose bytes are damaged out of the way, after a second look at each.

    Their healthy records can still be read there; but no new image set will
    refer to them, so the next backup stores again what its source still has.
    """
    repository = found.repository
    for number in sorted(set(found.bad) - found.aside):
        name = repository.names.name(number)
        if name is None:
            continue
        path = pack_object(KIND_MAP if number in found.maps else KIND_DATA, name)
        try:
            fd = repository.storage.open(path)
        except NotFound:
            # The index is going to forget it, and a backup by a map of changes must not inherit it.
            missing.note(repository, name)
            done.append(
                f"noted that {path} is missing: the next backup stores again what its source still has"
            )
            continue
        try:
            whole = _native.check_pack(fd, name, repository.id).ok
        except OSError:
            whole = False
        finally:
            os.close(fd)
        if whole:
            found.notes.append(f"{path} is whole by its name; it stays")
            continue
        if _move_aside(repository, path, name):
            found.aside.add(number)
            done.append(f"set {path} aside: the next backup stores again what its source still has of it")


def _move_aside(repository: Repository, path: str, name: bytes) -> bool:
    """Move a damaged pack below `damaged/`; False where it is gone. Raises `StorageError`."""
    storage, target = repository.storage, DAMAGED + path
    for number in range(1, 100):
        try:
            storage.move(path, target)
            return True
        except NotFound:
            return False  # Another repair was quicker, or a prune.
        except AlreadyExists:
            if _healthy(repository, path, name) <= _healthy(repository, target, name):
                # The same, where a repair was killed midway; else the one that is there gives back more.
                storage.delete(path)
                return True
            storage.move(target, f"{target}.{number}")
    return False


def _healthy(repository: Repository, path: str, name: bytes) -> int:
    """How many records of a damaged pack are whole, as far as its frame tells."""
    try:
        fd = repository.storage.open(path)
    except NotFound:
        return -1
    try:
        report = _native.check_pack(fd, name, repository.id)
        return 0 if report.problem is not None else report.records - len(report.damaged)
    except OSError:
        return -1
    finally:
        os.close(fd)


def _rebuild(found: Survey, done: list[str]) -> list[Problem]:
    """Rebuild the index and sweep the staging area; the problems that are left, repaired ones marked."""
    repository = found.repository
    made, dropped = index.rebuild(repository, found.reporter)
    if len(dropped) != len(made) or any(problem.kind == "index" for problem in found.problems):
        done.append(f"rebuilt the index: {len(made)} segments made, {len(dropped)} dropped")
    swept = repository.storage.sweep()
    if swept:
        done.append(f"removed {len(swept)} files that dead writers left")
    announced = {problem.object for problem in found.problems if problem.detail == structure.UNANNOUNCED}
    for name in sorted(announced):
        if sessions.announce_again(repository.storage, repository.config.repository, name[-32:]):
            done.append(f"made {name} anew: it was missing")
    return [
        replace(problem, repaired=problem.kind == "index" or problem.object in announced)
        for problem in found.problems
    ]
