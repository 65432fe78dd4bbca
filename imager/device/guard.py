"""The write guard: nothing is written to the wrong disk.

Invariant: the only way to a writable descriptor of a target is `examine`
(no reason to refuse), then `confirm` (the person or the script named this
very device), then `open_target` (claimed exclusively and found unchanged,
its old table kept). Each step takes the former's result; none has a way
round, and until the last has returned not one byte was written.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from msgspec import Struct
from msgspec.structs import replace

from imager.device import blockio, guard_checks, rescue_table
from imager.device.guard_checks import Reason, aliases
from imager.device.identity import Identity, identify, identify_node, normal_wwn
from imager.device.machine import Machine
from imager.errors import GuardRefused, NotConfirmed, SourceError


class Request(Struct, frozen=True):
    """What is to be written where: all that the guard judges by."""

    target: str
    sources: tuple[Identity, ...] = ()
    repository: str | None = None
    required_size: int | None = None
    overwrite: bool = False
    whole_disk: bool | None = None


class Verdict(Struct, frozen=True):
    """What the guard found. `identity` is None where nothing is there yet."""

    request: Request
    path: str
    identity: Identity | None
    reasons: tuple[Reason, ...]

    @property
    def allowed(self) -> bool:
        return not self.reasons

    @property
    def is_device(self) -> bool:
        return self.identity is not None and self.identity.is_device

    def require(self) -> None:
        """Raise `GuardRefused` with every reason, where there is one."""
        if self.reasons:
            raise refused(self.path, self.reasons)


class Confirmed(Struct, frozen=True):
    """A verdict whose device was named. Made by `confirm`."""

    verdict: Verdict


def refused(path: str, reasons: Sequence[Reason]) -> GuardRefused:
    """The error that tells all the reasons."""
    said = "; ".join(dict.fromkeys(reason.text for reason in reasons))
    hints = dict.fromkeys(reason.hint for reason in reasons if reason.hint)
    return GuardRefused(f"{path} will not be written: {said}", hint="; ".join(hints) or None)


def examine(
    target: str | os.PathLike[str],
    *,
    source_identities: Sequence[Identity] = (),
    repository_path: str | os.PathLike[str] | None = None,
    required_size: int | None = None,
    overwrite: bool = False,
    whole_disk: bool | None = None,
    machine: Machine | None = None,
) -> Verdict:
    """Every reason not to write to `target`; nothing is changed.

    `source_identities` are what this operation reads from (not what an image
    set was once taken from). `whole_disk` says whether the image is of a
    whole disk, where that is known. Never raises for a bad target.
    """
    repository = os.path.abspath(repository_path) if repository_path is not None else None
    request = Request(
        os.fspath(target), tuple(source_identities), repository, required_size, overwrite, whole_disk
    )
    return _judge(request, machine or Machine.read(), claim=True)


def _judge(request: Request, machine: Machine, *, claim: bool) -> Verdict:
    path = os.path.realpath(request.target)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        return Verdict(request, path, None, (guard_checks.refusal(path, error),))
    if mode is not None and stat.S_ISBLK(mode):
        return examine_device(request, machine, os.stat(path).st_rdev, claim=claim)
    if mode is not None and not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        hint = "name a block device or an image file"
        return Verdict(request, path, None, (Reason("not-a-target", f"{path} is {what}", hint),))
    try:
        return _judge_file(request, machine, path, exists=mode is not None)
    except (OSError, SourceError):
        return Verdict(request, path, None, (Reason("changed", f"{path} changed while it was examined"),))


def _judge_file(request: Request, machine: Machine, path: str, *, exists: bool) -> Verdict:
    reasons = [*guard_checks.misplaced_file(path)]
    if exists:
        reasons += guard_checks.existing_file(machine, path, request.sources, request.overwrite)
    elif not reasons:
        reasons += guard_checks.new_file(path)
    if request.repository:
        reasons += guard_checks.in_repository(machine, path, None, request.repository)
    return Verdict(request, path, identify(path) if exists else None, tuple(reasons))


def examine_device(request: Request, machine: Machine, dev: int, *, claim: bool) -> Verdict:
    """The verdict on a block device. `claim` tries a short exclusive open as well."""
    node = machine.nodes.get(dev)
    if node is None:
        text = f"the kernel lists no block device {os.major(dev)}:{os.minor(dev)}"
        return Verdict(request, request.target, None, (Reason("unusable", text),))
    identity = identify_node(node)
    reasons = [*guard_checks.in_use(machine, node)]
    reasons += guard_checks.is_source(machine, node, identity, request.sources)
    system = machine.system_devices()
    reasons += guard_checks.lives_on(machine, node, system, "system", "the running system lives on")
    if request.repository:
        repository = dict.fromkeys(machine.devices_of_path(_existing(request.repository)), request.repository)
        reasons += guard_checks.lives_on(machine, node, repository, "repository", "the repository lives on")
        reasons += guard_checks.in_repository(machine, node.path, node, request.repository)
    if node.read_only or node.kind == "rom":
        hint = f"blockdev --setrw {node.path}" if node.kind != "rom" else None
        reasons.append(Reason("read-only", f"{node.path} is read-only", hint))
    reasons += guard_checks.fits(identity, request.required_size)
    reasons += guard_checks.right_shape(identity, request.whole_disk)
    if claim and not any(r.code in ("mounted", "swap", "held", "no-medium") for r in reasons):
        reasons += guard_checks.claimable(node.path)
    return Verdict(request, node.path, identity, tuple(reasons))


def _existing(path: str) -> str:
    """`path`, or the nearest folder above it that is there."""
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def confirmations(identity: Identity) -> tuple[str, ...]:
    """What `--confirm-device` may be for this device, the best first.

    A kernel name counts only where there is neither serial nor WWN: names
    move between boots, and a script would repeat the target it was given.
    """
    stable = (identity.serial, identity.wwn, identity.stack_uuid, identity.partuuid, identity.ptuuid)
    names = (identity.name, os.path.basename(identity.path), identity.path)
    usable = stable if identity.serial or identity.wwn else (*stable, *names)
    return tuple(dict.fromkeys(value for value in usable if value))


def confirm(verdict: Verdict, *, typed: str | None = None, confirm_device: str | None = None) -> Confirmed:
    """Hold what was typed, or `--confirm-device`, against the device.

    Raises `GuardRefused` where the verdict is a refusal, `NotConfirmed`
    where the device was not named or another one was. A file needs nothing.
    """
    verdict.require()
    identity = verdict.identity
    if identity is None or not identity.is_device:
        return Confirmed(verdict)
    if confirm_device is not None:
        if _named(identity, confirm_device.strip()):
            return Confirmed(verdict)
        raise NotConfirmed(
            f"{identity.path} is not {confirm_device!r}; nothing was written",
            hint=f"{_who(identity)}; if it is the right one: --confirm-device {confirmations(identity)[0]}",
        )
    if typed is not None and typed.strip().casefold() == identity.confirmation.strip().casefold():
        return Confirmed(verdict)
    what = "the last four characters of its serial" if identity.serial else "its name"
    said = "was not confirmed" if typed is None else f"was not confirmed: {typed.strip()!r} is not {what}"
    raise NotConfirmed(
        f"{identity.path} {said}; nothing was written",
        hint=f"{_who(identity)}; unattended, name it: --confirm-device {confirmations(identity)[0]}",
    )


def _named(identity: Identity, given: str) -> bool:
    if not given:
        return False
    if given.startswith("/dev/disk/by-id/"):
        return os.path.realpath(given) == identity.path
    if given.lower() in {u.lower() for u in (identity.ptuuid, identity.partuuid) if u}:
        return not _has_clone(identity)
    if identity.wwn and normal_wwn(given) == normal_wwn(identity.wwn):
        return True
    return given in confirmations(identity)


def _has_clone(identity: Identity) -> bool:
    """Whether another disk holds a table with the same UUID: it then names neither."""
    machine = Machine.read()
    me = machine.nodes.get(identity.dev)
    if me is None:
        return True
    mine = {node.dev for node in aliases(machine, machine.disk_of(me))}
    disks = (n for n in machine.nodes.values() if n.kind in ("disk", "loop", "dm", "md") and n.size)
    return any(n.dev not in mine and identify_node(n).ptuuid == identity.ptuuid for n in disks)


def _who(identity: Identity) -> str:
    serial = f"serial {identity.serial}" if identity.serial else "no serial"
    return f"{identity.path} is {identity.model or identity.kind}, {serial}"


class Guarded:
    """A target, open for writing and claimed. A context manager; `fd` closes with it."""

    def __init__(
        self, fd: int, verdict: Verdict, identity: Identity, created: bool, saved: Path | None
    ) -> None:
        self.fd = fd
        self.verdict = verdict
        self.identity = identity
        self.created = created
        self.saved_table = saved

    @property
    def path(self) -> str:
        return self.identity.path

    @property
    def proc_path(self) -> str:
        """A path that leads to this very target, whatever happens to its name."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @property
    def size(self) -> int:
        return blockio.size(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_target(confirmed: Confirmed, *, state_folder: Path | None = None) -> Guarded:
    """Claim the target and see that it is still what was confirmed.

    A device is opened with O_EXCL, judged anew from scratch while claimed,
    and both its ends are kept in `state_folder` (default
    `rescue_table.default_folder()`). A file is created or opened, never
    truncated, and locked. Raises `GuardRefused`.
    """
    verdict = confirmed.verdict
    verdict.require()
    fd, created = _open(verdict)
    try:
        now = _recheck(verdict, fd, created)
        saved = rescue_table.save(fd, now, state_folder) if now.is_device else None
        return Guarded(fd, verdict, now, created, saved)
    except BaseException:
        os.close(fd)
        raise


def _open(verdict: Verdict) -> tuple[int, bool]:
    path = verdict.path
    base = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        if verdict.is_device:
            return os.open(path, base | os.O_EXCL), False
        if verdict.identity is None:
            return os.open(path, base | os.O_CREAT | os.O_EXCL, 0o600), True
        return os.open(path, base), False
    except FileExistsError:
        raise refused(path, [Reason("changed", f"{path} appeared after it was examined")]) from None
    except OSError as error:
        raise refused(path, [guard_checks.refusal(path, error)]) from error


def _recheck(verdict: Verdict, fd: int, created: bool) -> Identity:
    """The whole examination again, on what is open now."""
    info = os.fstat(fd)
    before = verdict.identity
    if before is None or not before.is_device:
        _lock(fd, verdict.path)
        request = replace(verdict.request, overwrite=True) if created else verdict.request
        now = _judge(request, Machine.read(), claim=False)
        here = (info.st_dev, info.st_ino)
        same = all(i is None or (i.dev, i.inode) == here for i in (before, now.identity))
    else:
        if not stat.S_ISBLK(info.st_mode):
            raise refused(verdict.path, [Reason("changed", f"{verdict.path} is no longer a block device")])
        now = examine_device(verdict.request, Machine.read(), info.st_rdev, claim=False)
        same = now.identity is not None and _unchanged(before, now.identity, fd)
    now.require()
    if not same or now.identity is None:
        raise refused(verdict.path, [Reason("changed", f"{verdict.path} is not what was examined any more")])
    return now.identity


def _unchanged(before: Identity, now: Identity, fd: int) -> bool:
    sequence = blockio.disk_sequence(fd)
    if sequence is not None and before.diskseq is not None and sequence != before.diskseq:
        return False
    if blockio.size(fd) != before.size:
        return False
    return (before.dev, before.diskseq, before.key) == (now.dev, now.diskseq, now.key)


def _lock(fd: int, path: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise refused(path, [Reason("busy", f"{path} is locked by another program")]) from error
