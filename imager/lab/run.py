"""The whole rehearsal, and cleaning up after it.

Invariant: however it ends, nothing stays mounted and no loop device attached;
unless `keep` names it, the folder is gone too. The engine's memory of
repositories stays in that folder, not among the machine's own.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from msgspec import Struct

from imager.errors import ImagerError, Interrupted, StorageError, UsageError
from imager.events import Reporter
from imager.lab import disk, guide, mounting, raw, rig, steps
from imager.lab.filesystems import Filesystem
from imager.lab.report import LabSummary, Recorder
from imager.units import GIB, MIB, format_size

DEFAULT_SIZE = 3 * GIB // 2
_SECTOR = 512
_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class LabOptions(Struct, frozen=True):
    """What is asked for.

    size: of the disk, in bytes. keep: an empty or new folder to work in and to
    leave everything in. workdir: where a temporary folder is made otherwise
    (the system's temporary folder). files_only: no loop devices and mounts,
    even where they could be used. seed: of the generated content.
    """

    size: int = DEFAULT_SIZE
    keep: str | os.PathLike[str] | None = None
    workdir: str | os.PathLike[str] | None = None
    files_only: bool = False
    seed: int = 1


def run(options: LabOptions, reporter: Reporter) -> LabSummary:
    """Rehearse everything. What did not hold is in the summary; only what kept the lab from
    starting is raised: `UsageError`, `CommandError` (no tools for ext4), `StorageError` (no room),
    and `Interrupted`."""
    began = time.monotonic()
    why = "as asked for" if options.files_only else rig.without_devices()
    size = options.size // _SECTOR * _SECTOR
    partitions, left_out = disk.choose(size, devices=why is None)
    recorder = Recorder(reporter)
    for one in left_out:
        reporter.warn(f"the lab goes without {one.name}: {one.why}")
    data = 0
    with _folder(options, reporter) as work:
        _need_room(work, size, devices=why is None)
        with steps.memory(work / "state"), ExitStack() as stack:
            try:
                lab = _set_up(stack, work, size, partitions, recorder, options, devices=why is None)
                data = _rehearse(lab)
            except (Interrupted, KeyboardInterrupt):
                raise
            except (ImagerError, OSError) as error:
                if not recorder.rows or recorder.rows[-1].ok:
                    with recorder.step("between two steps") as row:
                        row.fail(str(error))
                if isinstance(error, ImagerError) and error.hint:
                    reporter.note(f"hint: {error.hint}")
            finally:
                _unmount_all(work, reporter)  # before the stack detaches the loop devices
                if options.keep is not None:
                    names = tuple(part.name for part in partitions)
                    guide.write(work, names, devices=why is None)
    return LabSummary(
        ok=bool(recorder.rows) and all(row.ok for row in recorder.rows),
        mode="devices" if why is None else "files",
        why_files=why,
        size=size,
        data=data,
        filesystems=tuple(part.name for part in partitions),
        left_out=left_out,
        seconds=round(time.monotonic() - began, 3),
        kept=os.fspath(options.keep) if options.keep is not None else None,
        rows=tuple(recorder.rows),
    )


def _set_up(
    stack: ExitStack,
    work: Path,
    size: int,
    partitions: tuple[disk.Partition, ...],
    recorder: Recorder,
    options: LabOptions,
    *,
    devices: bool,
) -> steps.Rehearsal:
    source: rig.SourceDisk
    target: rig.TargetDisk
    with recorder.step("partition the disk") as row:
        raw.fill_with_noise(work / "restored.img", size)
        if devices:
            source = rig.LoopSource(stack, work, size, partitions)
            target = rig.LoopTarget(stack, work / "restored.img", partitions)
        else:
            source = rig.FileSource(work, size, partitions)
            target = rig.FileTarget(work / "restored.img", partitions)
        row.remark = f"GPT: {', '.join(f'{part.name} {format_size(part.size)}' for part in partitions)}"
    filesystems = tuple(Filesystem(part, work, options.seed * 16 + part.number) for part in partitions)
    return steps.Rehearsal(work, size, filesystems, source, target, recorder)


def _rehearse(lab: steps.Rehearsal) -> int:
    """All the steps; returns the bytes that the disk held at the full backup."""
    steps.build(lab)
    steps.init(lab)
    data = raw.data_bytes(lab.source.image)
    sequence: list[Callable[[], None]] = [
        lambda: steps.back_up(lab, "full"),
        lambda: steps.change(lab, 1),
        lambda: steps.back_up(lab, "incremental"),
        lambda: steps.change(lab, 2),
        lambda: steps.back_up(lab, "differential"),
        lambda: steps.restore_latest(lab),
        lambda: steps.examine_filesystems(lab),
        lambda: steps.restore_earlier(lab),
        lambda: steps.verify_all(lab),
        lambda: steps.corrupt(lab),
    ]
    for step in sequence:
        step()
    return data


@contextmanager
def _folder(options: LabOptions, reporter: Reporter) -> Iterator[Path]:
    """The folder to work in: the one to keep, or a temporary one that goes away."""
    if options.keep is not None:
        folder = Path(options.keep).absolute()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise UsageError(f"{folder} is not empty", hint="name a new or an empty folder")
        except OSError as error:
            raise UsageError(f"cannot work in {folder}: {error.strerror}") from error
        yield folder.resolve()
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix="imager-lab-", dir=options.workdir)).resolve()
    except OSError as error:
        raise StorageError(f"cannot make a temporary folder: {error.strerror}", hint="set TMPDIR") from error
    try:
        yield folder
    finally:
        with _undisturbed():
            if not mounting.sweep(folder):  # never look for files to remove behind a mount
                _remove(folder, reporter)


def _remove(folder: Path, reporter: Reporter) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        reporter.warn(f"{folder} could not be removed: {error}", hint="remove it by hand")


def _need_room(work: Path, size: int, *, devices: bool) -> None:
    """Refuse to begin where the disk images would not fit. What is here was measured, and some added."""
    copy = size * 3 // 10 + 64 * MIB
    noise = size * (1 if devices else 2)  # the second disk, and in files alone a copy of its partitions
    needed = copy * (3 if devices else 5) + noise
    stat = os.statvfs(work)
    free = stat.f_bavail * stat.f_frsize
    if free < needed:
        raise StorageError(
            f"the lab needs about {format_size(needed)} in {work.parent}, and {format_size(free)} are free",
            hint="choose a smaller --size, or another place with --keep or TMPDIR",
        )


def _unmount_all(work: Path, reporter: Reporter) -> None:
    with _undisturbed():
        for left in mounting.sweep(work):
            reporter.warn(f"{left} could not be unmounted", hint=f"umount {left}")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait: a second Ctrl-C must not leave half of it behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
