"""Restore: a disk of a set onto a device or into a file, read back and compared.

Invariant: a target that is not whole does not look whole: its first MiB is
cleared first and written last, after all else is on the medium and, unless
told otherwise, has been read back equal. Nothing is written before the guard
has let the target through, and a damaged block is never written.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from imager import config
from imager._native import WriteError
from imager.device import guard
from imager.engine.compare import Comparer
from imager.engine.fetching import Damage, Fetcher, gather_of, merged
from imager.engine.restore_plan import (
    SHOWN,
    Planned,
    RestoreOptions,
    RestorePlan,
    RestoreSummary,
    plan,
)
from imager.engine.target import HEAD, Target
from imager.engine.windows import Window, pieces
from imager.errors import IntegrityError, Interrupted, StorageError, TargetError
from imager.events import Reporter
from imager.extents import Extents
from imager.repository.repository import Repository
from imager.units import format_size

__all__ = ["RestoreOptions", "RestorePlan", "RestoreSummary", "execute", "plan"]

_ALIGN = 4096
"What direct writes are multiples of; every block size is."
_MANY = 1 << 16
"Written ranges that are remembered one by one; beyond, gaps between them are read back too."


def execute(
    repository: Repository, plan: RestorePlan, reporter: Reporter, confirmation: str | None = None
) -> RestoreSummary:
    """Carry out a plan. `confirmation` is what the person typed, None where nobody was asked.

    Raises `NotConfirmed` and `GuardRefused` (nothing was written), `TargetError`
    where the target fails, `IntegrityError` where blocks are damaged, `Interrupted`.
    After an error the target is incomplete: its first MiB is empty.
    """
    if not isinstance(plan, Planned):
        raise TypeError("a plan comes from plan()")
    begun = time.monotonic()
    confirmed = guard.confirm(plan.verdict, typed=confirmation, confirm_device=plan.options.confirm_device)
    for warning in plan.warnings:
        reporter.warn(warning)
    with guard.open_target(confirmed, state_folder=Path(config.state_dir(), "tables")) as guarded:
        target = Target(guarded)
        if guarded.created:
            info = guarded.identity
            plan.journal.place(info.dev, info.inode)
        run = _Run(plan, target, reporter)
        try:
            run.all()
        except (KeyboardInterrupt, Interrupted) as error:
            if not run.cleared:
                raise Interrupted(f"interrupted before anything was written to {plan.target}") from error
            raise Interrupted(
                f"interrupted: {plan.target} is incomplete, its first {format_size(HEAD)} are empty",
                hint="the same command with --resume goes on where it stopped",
            ) from error
        except (WriteError, TargetError, StorageError) as error:
            if run.cleared:
                again = "once the cause is gone, the same command with --resume goes on where it stopped"
                reporter.warn(
                    f"{plan.target} is incomplete, its first {format_size(HEAD)} are empty",
                    hint=None if isinstance(error, TargetError) else again,
                )
            if isinstance(error, WriteError):
                raise target.failed(None, error) from error
            raise
        finally:
            target.close()
        saved = guarded.saved_table
        if target.is_device and guarded.identity.kind != "partition" and not target.rescan():
            old = f"the kernel still has the old list of {plan.target}'s partitions"
            reporter.note(f"{old}: partx --update {plan.target}")
    plan.journal.remove()
    seconds = time.monotonic() - begun
    written = min(run.written_bytes, plan.size - run.zeroed_bytes - plan.unused)  # the last may be short
    return RestoreSummary(
        set=plan.set,
        name=plan.name,
        disk=plan.disk,
        target=plan.target,
        mode=plan.mode,
        size=plan.size,
        bytes_written=written,
        bytes_zeroed=run.zeroed_bytes,
        bytes_kept=plan.size - written - run.zeroed_bytes - plan.unused,
        bytes_unused=plan.unused,
        unused=run.unused,
        verified=plan.verify,
        seconds=round(seconds, 3),
        left_alone=plan.left_alone,
        saved_table=str(saved) if saved else None,
        unreadable=plan.unreadable,
    )


class _Run:
    """One restore under way."""

    def __init__(self, plan: Planned, target: Target, reporter: Reporter) -> None:
        self.plan = plan
        self.image = plan.image
        self.geometry = plan.image.geometry
        self.target = target
        self.reporter = reporter
        self.written_bytes = 0
        self.zeroed_bytes = 0
        self.written: list[tuple[int, int]] = []  # what a delta wrote, in blocks
        self.keep = plan.mode != "full"
        self.unused = plan.options.unused
        self.cleared = False
        blocks = self.geometry.blocks
        self.head = min(blocks, -(-HEAD // self.geometry.block_size))
        self.body = Extents.of([(self.head, blocks)])
        # What the first pass goes through: a delta looks at the head, too.
        self.covered = Extents.whole(blocks) if plan.mode == "delta" else self.body
        repository = plan.image.repository
        fd, direct = target.writer()
        # A last block that is no multiple of 4 KiB cannot be written directly.
        tail = Extents.of([(blocks - 1, blocks)]) if direct and plan.size % _ALIGN else Extents()
        self.routes = [(self.fetcher(fd), Extents.whole(blocks) - tail), (self.fetcher(target.fd), tail)]
        self.comparer = Comparer(
            repository.vault,
            self.geometry,
            target.reader(plan.size),
            reporter,
            plan.options.threads,
        )

    def fetcher(self, fd: int | None) -> Fetcher:
        return Fetcher(
            self.image.repository,
            self.plan.disk,
            self.geometry,
            self.reporter,
            target=fd,
            threads=self.plan.options.threads,
        )

    def all(self) -> None:
        self.target.prepare(self.plan.size, keep=self.keep)
        if self.plan.mode != "delta":
            self.clear_head()
        else:
            self.target.forget()  # what is compared must come from the medium, too
        names = {"full": "writing", "delta": "comparing and writing", "resume": "writing the rest"}
        self.reporter.phase(names[self.plan.mode], self.geometry.total(self.covered))
        self.write_body()
        self.reporter.end()
        if self.plan.verify:
            self.target.forget()
            self.check_body()
        else:
            self.target.flush()
        if self.cleared:
            self.write_head()

    def clear_head(self) -> None:
        """From here on the target is incomplete, and looks it."""
        if not self.cleared:
            self.cleared = True
            self.target.zero(0, self.geometry.length(0, self.head))
            self.target.flush()

    # -- what is unused ----------------------------------------------------------

    def windows(self, blocks: Extents | None = None) -> Iterator[Window]:
        """The map, or a part of it, with unused blocks as they are to be."""
        for window in self.image.windows() if blocks is None else self.image.part(blocks):
            yield window.zeroed() if self.plan.options.unused == "zero" else window

    def give_up(self, window: Window) -> None:
        """Discard what is unused, if that is wanted. Only once the target looks incomplete."""
        if self.unused != "discard" or not (self.keep or self.target.is_device):
            return  # a new file has holes
        for start, end in Extents(tuple(window.unused)) & self.body:
            at = start * self.geometry.block_size
            if not self.target.discard(at, at + self.geometry.length(start, end)):
                self.unused = "leave"
                said = "takes no discards: what no filesystem uses is left as it was"
                self.reporter.note(f"{self.plan.target} {said}")
                return

    # -- the body ------------------------------------------------------------

    def write_body(self) -> None:
        """Write all but the head, which is cleared before anything is written."""
        done = self.plan.journal.done
        waiting = 0
        for window in self.windows():
            here = Extents.of([(window.first, window.end)])
            if not here - done:
                self.reporter.advance(self.geometry.total(here & self.covered))
                continue
            body = here & self.body
            compare = self.plan.mode == "delta" or bool(here & self.plan.journal.begun)
            if compare:
                differing = self.comparer.differing(window, self.covered)
                if differing:
                    self.clear_head()
                body = differing & self.body
            self.reporter.advance(self.geometry.total(Extents(tuple(window.unused)) & self.covered))
            if self.cleared:
                self.give_up(window)
            else:
                waiting = window.end
            if compare and not differing:
                continue
            self.plan.journal.begin(window.first, window.end)
            self.write(window, body, counted=compare)
            self.target.flush()
            self.plan.journal.finish()
        if self.cleared and waiting:
            # What stood there belonged to a target that was whole, until the first difference was found.
            for window in self.windows(Extents.of([(0, waiting)])):
                self.give_up(window)
        elif waiting and self.unused == "discard":
            self.unused = "leave"  # no difference: nothing is done to the target

    def write(self, window: Window, blocks: Extents, *, counted: bool) -> None:
        """Write `blocks` of a window. `counted`: the reporter knows of them from the comparison."""
        for start, end in Extents.of(window.zeroes()) & blocks:
            length = self.geometry.length(start, end)
            if self.keep or self.target.is_device:
                self.target.zero(start * self.geometry.block_size, start * self.geometry.block_size + length)
                self.zeroed_bytes += length
            if not counted:
                self.reporter.advance(length)
        for fetcher, where in self.routes:
            gather = gather_of(pieces(window), blocks & where)
            for damage in fetcher.slices(gather, quiet=counted):
                if damage:
                    raise _damaged(self.plan, merged(damage))
            self.written_bytes += self.geometry.block_size * gather.blocks
        self.remember(blocks)

    def remember(self, blocks: Extents) -> None:
        self.written += blocks
        if len(self.written) > _MANY:
            pairs = zip(self.written[::2], self.written[1::2], strict=False)
            self.written = [(first[0], last[1]) for first, last in pairs] + self.written[
                len(self.written) & ~1 :
            ]

    def check_body(self) -> None:
        """Read back what was written. In a delta the rest was read just now."""
        blocks = Extents.of(self.written) & self.body if self.plan.mode == "delta" else self.body
        if not blocks:
            return
        self.reporter.phase("reading back", self.geometry.total(blocks))
        for window in self.windows(blocks):
            self.expect_none(self.comparer.differing(window))
            self.reporter.advance(self.geometry.total(window.unused))
        self.reporter.end()

    def expect_none(self, differing: Extents) -> None:
        if differing:
            places = self.geometry.extents(differing)
            raise TargetError(
                f"{self.plan.target} reads back otherwise than it was written: {_listed(places)}",
                hint="the target does not keep what is written to it: do not use it; "
                "after a --resume, try once more with --delta",
            )

    # -- the head ------------------------------------------------------------

    def write_head(self) -> None:
        """The first MiB, last: from here on the target is whole. A failure leaves it empty again."""
        head = Extents.of([(0, self.head)])
        checker = self.fetcher(None)
        for window in self.windows(head):
            # All of it, or nothing: half a head could pass for a whole one.
            for damage in checker.slices(gather_of(pieces(window), head), quiet=True):
                if damage:
                    raise _damaged(self.plan, merged(damage))
        try:
            for window in self.windows(head):
                self.write(window, head, counted=True)
            self.target.flush()
            if self.plan.verify:
                self.target.forget()
                for window in self.windows(head):
                    self.expect_none(self.comparer.differing(window))
        except BaseException:
            self.cleared = False
            try:
                self.clear_head()
            except TargetError:
                pass  # It takes no writes any more: the error that led here tells.
            raise


def _damaged(plan: RestorePlan, damage: tuple[Damage, ...]) -> IntegrityError:
    places = Extents.of((one.start, one.start + one.length) for one in damage)
    reasons = "; ".join(dict.fromkeys(f"{one.reason} (pack {one.pack})" for one in damage[:3]))
    return IntegrityError(
        f"stored blocks of {plan.disk} are damaged: {_listed(places)}: {reasons}; "
        f"{plan.target} is incomplete, its first {format_size(HEAD)} are empty",
        hint=f"imager verify {plan.set[:8]} names all that is damaged; restore another set",
    )


def _listed(extents: Extents) -> str:
    shown = ", ".join(f"{end - start} bytes at {start}" for start, end in extents.ranges[:SHOWN])
    more = len(extents) - SHOWN
    return shown + (f" and {more} more extents" if more > 0 else "")
