"""The steps of the rehearsal, each judged by itself.

Invariant: a step holds only if what it claims was checked: by comparison with
what was kept before, by the filesystems' own tools, or by a figure that must
follow; and each opens the repository anew, as a command does.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct, field

from imager.device.identity import identify
from imager.engine import backup, restore, verify
from imager.errors import IntegrityError
from imager.events import Silent
from imager.extents import Extents
from imager.filesystem import whole
from imager.lab import disk, raw, tree, wound
from imager.lab.filesystems import Filesystem
from imager.lab.report import Draft, Recorder
from imager.lab.rig import SourceDisk, TargetDisk
from imager.repository import check
from imager.repository.credentials import Credentials
from imager.repository.repository import Repository
from imager.storage.location import open_storage
from imager.units import format_size

NAME = "lab"


class Kept(Struct, frozen=True):
    """A set's id; what was in use of the disk then, in bytes; and a digest of that."""

    id: str
    used: Extents
    digest: str


class Rehearsal(Struct):
    """What the steps work on. `sets`: what was backed up so far, in order."""

    work: Path
    size: int
    filesystems: tuple[Filesystem, ...]
    source: SourceDisk
    target: TargetDisk
    recorder: Recorder
    sets: list[Kept] = field(default_factory=list)

    @property
    def place(self) -> Path:
        """The repository."""
        return self.work / "repository"

    @contextmanager
    def open(self, place: Path | None = None, *, writing: bool = False) -> Iterator[Repository]:
        """The repository, opened by its passphrase as a command would."""
        with Repository.open(
            open_storage(str(place or self.place)), self.credentials(), writing=writing
        ) as it:
            yield it

    def credentials(self) -> Credentials:
        """The passphrase's file."""
        return Credentials(passphrase_file=str(self.work / "passphrase.txt"), interactive=False)


def build(lab: Rehearsal) -> None:
    """Make and fill the filesystems."""
    with lab.recorder.step("build the disk") as row, phase(lab, "filling filesystems") as progress:
        files = 0
        lacking: dict[str, None] = {}
        for one in lab.filesystems:
            stock = one.build(lab.source.parts()[one.part.number], progress)
            files += stock.files
            lacking |= dict.fromkeys(f"{one.part.name}: no {what}" for what in stock.lacking)
        lab.source.settle()
        row.figures["bytes_written"] = raw.data_bytes(lab.source.image)
        row.remark = "; ".join([f"{files} files", *lacking])


def init(lab: Rehearsal) -> None:
    """Create the encrypted repository."""
    (lab.work / "passphrase.txt").write_text(os.urandom(12).hex() + "\n")
    os.chmod(lab.work / "passphrase.txt", 0o600)
    with lab.recorder.step("init") as row:
        Repository.init(open_storage(str(lab.place)), lab.credentials(), encryption="passphrase").close()
        row.remark = "encrypted, a passphrase"


def back_up(lab: Rehearsal, strategy: str) -> None:
    """Back the disk up, and keep its digest for later."""
    with lab.recorder.step(f"{strategy} backup") as row:
        with lab.open(writing=True) as repository:
            options = backup.BackupOptions(name=NAME, strategy=strategy)
            plan = backup.plan(repository, [lab.source.source], options, lab.recorder.reporter)
            summary = backup.execute(repository, plan, lab.recorder.reporter)
        image = summary.images[0]
        row.figures.update(
            bytes_read=image.bytes_read,
            bytes_stored=image.bytes_stored,
            blocks_read=image.blocks_read,
            blocks_changed=image.blocks_changed,
            blocks_new=image.blocks_new,
            blocks_shared=image.blocks_shared,
        )
        base = lab.sets[0].id if lab.sets else None
        row.remark = f"set {summary.set[:8]}" + (f" on {summary.base[:8]}" if summary.base else "")
        if summary.strategy != strategy:
            row.fail(f"a {strategy} backup was asked for, and it was {summary.strategy}")
        if summary.base != base:
            row.fail(f"its base should be {base}, and is {summary.base}")
        if summary.incomplete:
            row.fail("it is incomplete")
        if lab.sets and not 0 < image.blocks_changed * image.block_size < lab.size:
            row.fail(f"{image.blocks_changed} blocks are said to have changed")
    _used_blocks(lab, summary, image)
    used = _in_use(lab)
    lab.sets.append(Kept(summary.set, used, raw.digest(lab.source.image, used)))


def _in_use(lab: Rehearsal) -> Extents:
    """What is in use of the disk, by the filesystems' own maps."""
    with lab.source.image.open("rb") as file:
        return whole.used_blocks(file.fileno(), lab.size).used


def _used_blocks(lab: Rehearsal, summary: backup.BackupSummary, image: backup.ImageSummary) -> None:
    """Each filesystem was imaged by its own map: what was read of it, what is in use, and all of it."""
    uses = {use.number: use for use in image.parts}
    for one in lab.filesystems:
        with lab.recorder.step(f"{summary.strategy}: used blocks of {one.part.name}") as row:
            use = uses[one.part.number]
            row.figures.update(bytes_read=use.read, bytes_used=use.used, bytes_total=use.size)
            row.remark = f"{format_size(use.used)} of {format_size(use.size)} in use"
            if use.every_block:
                row.fail(f"every block was imaged: {use.every_block}")


def change(lab: Rehearsal, number: int) -> None:
    """Change files inside every filesystem."""
    with lab.recorder.step(f"changes, round {number}") as row:
        counts: Counter[str] = Counter()
        means = []
        for one in lab.filesystems:
            done = one.change(lab.source.parts()[one.part.number], number, lab.source.renew)
            means.append(f"{one.part.name} {done.remark}")
            counts += done.counts
        lab.source.settle()
        lab.recorder.reporter.note(", ".join(f"{what} {n}" for what, n in sorted(counts.items())))
        row.remark = f"{counts.total()} changes: {'; '.join(means)}"
        last = lab.sets[-1]
        if raw.digest(lab.source.image, last.used) == last.digest:
            row.fail("the disk is the same as before")


def restore_latest(lab: Rehearsal) -> None:
    """Restore the last set to the second disk, full of random bytes, and hold it against the source."""
    last = lab.sets[-1]
    with lab.recorder.step("restore") as row:
        # Over a file that is kept, as a device's content is.
        kept = lab.target.target == str(lab.target.image)
        _restore(lab, row, last.id, lab.target.target, delta=kept, unused="leave")
        row.remark += "; nothing written where nothing is in use"
    with lab.recorder.step("compare the disks") as row:
        others = raw.differences(lab.source.image, lab.target.image, lab.size)
        differing = others & last.used
        noise = (others - last.used).total
        row.remark = f"byte for byte where it is in use; {format_size(noise)} of noise elsewhere"
        if not noise:
            row.fail("nothing was left out")
        if differing:
            row.fail(f"{format_size(differing.total)} differ, the first at byte {differing.ranges[0][0]}")


def examine_filesystems(lab: Rehearsal) -> None:
    """Have each restored filesystem checked by its own tool, and its files compared with the source's."""
    expected = {one.part.number: one.expected(lab.source.parts()[one.part.number]) for one in lab.filesystems}
    with lab.target.parts() as paths:
        for one in lab.filesystems:
            path = paths[one.part.number]
            with lab.recorder.step(f"check {one.part.name}") as row:
                problem = disk.check_filesystem(one.part, path)
                row.remark = "by its own tool, changing nothing"
                if problem:
                    row.fail(problem)
            with lab.recorder.step(f"files of {one.part.name}") as row:
                _compare_files(row, expected[one.part.number], one.found(path))


def _compare_files(row: Draft, expected: tree.Listing, found: tree.Listing | None) -> None:
    if found is None:
        row.remark = "not read: without mounting it, no tool can; its bytes were compared"
        return
    problems = tree.compare(expected, found)
    size = sum(node.size for node in found.values())
    row.remark = f"{len(found)} entries, {format_size(size)}"
    if problems:
        row.fail(f"{len(problems)} entries differ, the first: {problems[0]}")


def restore_earlier(lab: Rehearsal) -> None:
    """Restore the earlier sets to a file: the first anew, the others over it, writing what differs."""
    target = lab.work / "earlier.img"
    for at, one in enumerate(lab.sets[:-1]):
        name = "restore the first set" if at == 0 else f"restore set {at + 1} over it (--delta)"
        with lab.recorder.step(name) as row:
            _restore(lab, row, one.id, str(target), delta=at > 0)
            row.remark = "the same as when it was backed up"
            if raw.digest(target, one.used) != one.digest:
                row.fail("not what was backed up")


def _restore(
    lab: Rehearsal, row: Draft, text: str, target: str, *, delta: bool = False, unused: str = "discard"
) -> None:
    options = restore.RestoreOptions(
        delta=delta,
        unused=unused,
        overwrite=delta,
        confirm_device=identify(target).confirmation if os.path.exists(target) else None,
    )
    with lab.open() as repository:
        plan = restore.plan(repository, text, target, options, lab.recorder.reporter)
        summary = restore.execute(repository, plan, lab.recorder.reporter)
    row.figures["bytes_written"] = summary.bytes_written
    row.remark = "read back and equal"
    if not summary.verified:
        row.fail("it was not read back")


def verify_all(lab: Rehearsal) -> None:
    """Every set and the whole repository are sound."""
    for one in lab.sets:
        with lab.recorder.step(f"verify {one.id[:8]}") as row, lab.open() as repository:
            summary = verify.verify(repository, one.id, lab.recorder.reporter)
            row.figures.update(bytes_read=summary.bytes, blocks_read=summary.blocks)
            if not summary.ok:
                row.fail(f"{len(summary.damage)} damaged extents")
    with lab.recorder.step("check --read-data") as row, lab.open() as repository:
        report = check.check(repository, lab.recorder.reporter, read_data="all")
        row.figures["bytes_read"] = report.bytes_read
        row.remark = f"{report.sets} sets, {report.packs} packs"
        if not report.ok:
            row.fail(f"{len(report.problems)} problems, the first: {report.problems[0]}")


def corrupt(lab: Rehearsal) -> None:
    """Damage one byte in a copy of the repository: it must be named, and never come back as good data."""
    folder = lab.work / "damaged"
    folder.mkdir()
    with memory(folder / "state"):  # what is known of the copy is not true of the repository
        _corrupt(lab, folder / "repository")


def _corrupt(lab: Rehearsal, copy: Path) -> None:
    sets = [one.id for one in lab.sets]
    with lab.recorder.step("damage one byte") as row:
        with lab.open() as repository:
            hurt = wound.choose(repository, sets)
        hurt.inflict(lab.place, copy)
        row.remark = f"in a copy: byte {hurt.offset} of {hurt.file}"
    for one in sets:
        with lab.recorder.step(f"verify {one[:8]}, damaged copy") as row, lab.open(copy) as repository:
            _judge_verify(row, verify.verify(repository, one, Silent()), hurt, one)
    with lab.recorder.step("check --read-data, damaged copy") as row, lab.open(copy) as repository:
        _judge_check(row, check.check(repository, Silent(), read_data="all"), hurt)
    with lab.recorder.step("restore from the damaged copy") as row, lab.open(copy) as repository:
        _must_fail(row, lambda: _try_restore(repository, sets[-1], copy.parent / "refused.img"))


def _judge_verify(row: Draft, summary: verify.VerifySummary, hurt: wound.Wound, one: str) -> None:
    named = Extents.of((damage.start, damage.start + damage.length) for damage in summary.damage)
    expected = hurt.extents[one]
    row.figures.update(bytes_read=summary.bytes, blocks_read=summary.blocks)
    row.remark = f"names {_said(expected)}" if expected else "this set has no part in it: whole"
    if summary.ok == bool(expected) or named != expected:
        row.fail(f"{_said(expected)} should be named, and {_said(named)} is")
    if any(damage.pack != hurt.pack for damage in summary.damage):
        row.fail("another pack is named")


def _judge_check(row: Draft, report: check.Summary, hurt: wound.Wound) -> None:
    row.figures["bytes_read"] = report.bytes_read
    row.remark = f"names the pack, the set {', '.join(one[:8] for one in hurt.touched())} and the bytes"
    if [problem.object for problem in report.problems] != [hurt.file]:
        named = ", ".join(problem.object for problem in report.problems) or "nothing"
        row.fail(f"{hurt.file} should be named alone, and {named} is")
        return
    found = {
        one.set: Extents.of((start, start + length) for start, length in one.extents)
        for one in report.problems[0].hurt
    }
    for one in found.keys() | set(hurt.touched()):
        named_extents = found.get(one, Extents())
        if named_extents != hurt.extents.get(one):
            row.fail(
                f"set {one[:8]}: {_said(hurt.extents[one])} should be named, and {_said(named_extents)} is"
            )


def _said(extents: Extents) -> str:
    shown = ", ".join(f"{end - start} bytes at {start}" for start, end in extents.ranges[:3])
    return shown + (", ..." if len(extents) > 3 else "") or "nothing"


def _try_restore(repository: Repository, text: str, target: Path) -> None:
    plan = restore.plan(repository, text, str(target), restore.RestoreOptions(), Silent())
    restore.execute(repository, plan, Silent())


def _must_fail(row: Draft, work: Callable[[], None]) -> None:
    try:
        work()
    except IntegrityError:
        row.remark = "refused, and says why"
        return
    row.fail("damaged data was restored as if it were good")


@contextmanager
def memory(folder: Path) -> Iterator[None]:
    """What the engine remembers of repositories between runs goes into `folder` for a while."""
    ours = {"IMAGER_STATE_DIR": str(folder), "IMAGER_CACHE_DIR": str(folder / "cache")}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def phase(lab: Rehearsal, name: str) -> Iterator[Callable[[int], None]]:
    """A phase whose total nobody knows; yields what is to be told the bytes done."""
    reporter = lab.recorder.reporter
    reporter.phase(name, None)
    try:
        yield reporter.advance
    finally:
        reporter.end()
