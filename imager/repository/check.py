"""Check a repository: its structure, its stored bytes, and what damage costs.

Invariant: a check changes nothing unless it is told to repair; and what it
calls whole has been read, and was what its name, its signature or its
parent says.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass, replace

from imager import _native
from imager.errors import UsageError
from imager.events import Reporter
from imager.repository import index, missing, structure
from imager.repository.damage import hurt_by_pack
from imager.repository.findings import Hurt, Problem, Survey
from imager.repository.format import DAMAGED, INDEX, KIND_DATA, KIND_MAP, PACKS, pack_object
from imager.repository.repository import Repository
from imager.storage.errors import NotFound
from imager.units import parse_size

__all__ = ["Hurt", "Problem", "Summary", "check", "choose"]

_PART = re.compile(r"(\d+)/(\d+)")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class Summary:
    """What a check found. `packs` counts those there are, `packs_read` those whose bytes were read."""

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


def check(
    repository: Repository,
    reporter: Reporter,
    *,
    read_data: str | None = None,
    repair: bool = False,
    threads: int = 0,
) -> Summary:
    """Check the structure; with `read_data` also packs and index segments; then trace what damage costs.

    read_data: `all`, `N/M` (the N-th of M parts; M runs cover all), `10%` or `5G` (a random choice).
    repair: set damaged packs aside, so that the next backup stores their blocks anew, rebuild the index,
    and remove what dead writers left. Raises `UsageError`, `StorageError`.
    """
    begun = time.monotonic()
    if read_data is not None:
        choose({}, read_data)  # A wrong wish is told before the work begins.
    found = structure.survey(repository, reporter)
    chosen = choose(found.sizes, read_data) if read_data is not None else []
    if read_data is not None:
        _read_index(found)
        _read_packs(found, chosen, threads)
    costs = hurt_by_pack(found)
    done: list[str] = []
    if repair:
        _set_aside(found, done)
    problems = _pack_problems(found, costs)
    if repair:
        problems += _rebuild(found, done)
    else:
        problems += found.problems
    problems.sort(key=lambda problem: (problem.kind, problem.object))
    return Summary(
        sets=len(found.listing.sets),
        packs=len(found.sizes),
        packs_read=len(chosen),
        pages=found.pages,
        bytes_read=found.read,
        problems=tuple(problems),
        notes=tuple(found.notes),
        repaired=tuple(done),
        seconds=round(time.monotonic() - begun, 3),
        ok=all(problem.repaired for problem in problems),
    )


# --- which packs to read --------------------------------------------------------------------


def choose(sizes: dict[str, int], wish: str) -> list[str]:
    """The packs to read, by object name, out of `sizes`. Raises `UsageError`."""
    names = sorted(sizes)
    if wish in ("all", "100%"):
        return names
    part = _PART.fullmatch(wish)
    if part:
        number, parts = int(part[1]), int(part[2])
        if not 1 <= number <= parts:
            raise UsageError(f"no part {wish}", hint="write 1/7 to 7/7: seven runs read everything once")
        # By name, so that a pack stays in its part however many others come and go.
        return [name for name in names if int(name[-16:], 16) % parts == number - 1]
    share = _SHARE.fullmatch(wish)
    if share and not 0 < float(share[1]) <= 100:
        raise UsageError(f"{wish} of the data cannot be read", hint="write a share from 1% to 100%")
    wanted = float(share[1]) / 100 * sum(sizes.values()) if share else parse_size(wish)
    import random

    random.SystemRandom().shuffle(names)
    chosen: list[str] = []
    total = 0
    for name in names:
        if total >= wanted:
            break
        chosen.append(name)
        total += sizes[name]
    return sorted(chosen)


def _read_packs(found: Survey, chosen: list[str], threads: int) -> None:
    """Check whole packs: name, frame, and the digest of every payload. No key takes part."""
    repository = found.repository
    found.reporter.phase("reading packs", sum(found.sizes[name] for name in chosen))
    for path in chosen:
        name = bytes.fromhex(path[-64:])
        number = repository.names.intern(name)
        try:
            fd = repository.storage.open(path)
        except NotFound:
            found.blame(number, "it is missing")
            continue
        try:
            report = _native.check_pack(fd, name, repository.id, threads)
            if report.problem is not None:
                found.blame(number, report.problem)
            elif report.damaged:
                found.blame(number, f"{len(report.damaged)} of its {report.records} records are damaged")
            elif path.startswith(PACKS) and number in found.used:
                _compare_index(found, fd, number, name)
        except OSError as error:
            found.blame(number, f"it cannot be read: {error.strerror}")
        finally:
            os.close(fd)
        found.read += found.sizes[path]
        found.reporter.advance(found.sizes[path])
    found.reporter.end()


def _compare_index(found: Survey, fd: int, number: int, name: bytes) -> None:
    """Tell of blocks that an image set uses and no index segment knows: a segment got lost."""
    records = _native.pack_records(fd, name, found.repository.id)
    unknown = len(records) - found.known.count(b"".join(identity for _, identity, _, _ in records))
    if unknown:
        found.problems.append(
            Problem(
                "index",
                "the index",
                f"it lacks {unknown} blocks of pack {name.hex()}: a segment is missing or damaged; "
                "nothing is lost, but such blocks may be stored twice",
            )
        )


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
        repository.storage.move(path, DAMAGED + path)
        found.aside.add(number)
        done.append(f"set {path} aside: the next backup stores again what its source still has of it")


def _rebuild(found: Survey, done: list[str]) -> list[Problem]:
    """Rebuild the index and sweep the staging area; the problems that are left, repaired ones marked."""
    repository = found.repository
    made, dropped = index.rebuild(repository, found.reporter)
    if dropped or any(problem.kind == "index" for problem in found.problems):
        done.append(f"rebuilt the index: {len(made)} segments made or kept, {len(dropped)} dropped")
    swept = repository.storage.sweep()
    if swept:
        done.append(f"removed {len(swept)} files that dead writers left")
    return [replace(problem, repaired=problem.kind == "index") for problem in found.problems]
