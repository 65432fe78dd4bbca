"""What the lab found, as data and as a table.

Invariant: every step that was begun has a row; `ok` of the whole is that of
all rows and of the sequence having come to its end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct, field

from imager.errors import ImagerError
from imager.events import Reporter
from imager.lab.disk import LeftOut
from imager.units import format_duration, format_size


class Row(Struct, frozen=True):
    """One step. Sizes in bytes; None where a figure has no meaning for the step.

    `bytes_used` of `bytes_total` of a filesystem are in use.
    """

    step: str
    ok: bool
    seconds: float
    bytes_read: int | None = None
    bytes_stored: int | None = None
    bytes_written: int | None = None
    blocks_read: int | None = None
    blocks_changed: int | None = None
    blocks_new: int | None = None
    blocks_shared: int | None = None
    bytes_used: int | None = None
    bytes_total: int | None = None
    remark: str = ""


class LabSummary(Struct, frozen=True):
    """The whole rehearsal."""

    ok: bool
    mode: str
    """devices, or files where loop devices and mounts cannot be used"""
    why_files: str | None
    """what kept the lab from loop devices"""
    size: int
    data: int
    """bytes of the disk that were not holes at the full backup"""
    filesystems: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    seconds: float
    kept: str | None
    """the folder in which everything was left"""
    rows: tuple[Row, ...]

    def describe(self) -> list[str]:
        """The summary as lines of text."""
        where = "on loop devices" if self.mode == "devices" else f"on files alone ({self.why_files})"
        lines = [
            f"a disk of {format_size(self.size)} holding {format_size(self.data)}: "
            f"{', '.join(self.filesystems)}; {where}"
        ]
        lines += [f"left out: {one.name} ({one.why})" for one in self.left_out]
        lines += ["", *_table(self.rows), ""]
        if self.kept:
            lines.append(f"everything is left in {self.kept}; README.txt there tells what is what")
        failed = [row.step for row in self.rows if not row.ok]
        end = f"{len(self.rows)} steps in {format_duration(self.seconds)}"
        lines.append(f"{end}, all held" if self.ok else f"{end}, FAILED: {', '.join(failed)}")
        return lines


class Draft(Struct):
    """A row that is being found out. `figures` are fields of `Row`."""

    remark: str = ""
    problem: str = ""
    figures: dict[str, int | None] = field(default_factory=dict)

    def fail(self, problem: str) -> None:
        """The step did not hold. Said once, the first problem counts."""
        self.problem = self.problem or problem


class Recorder:
    """Makes rows of steps and tells the reporter of each."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.rows: list[Row] = []

    @contextmanager
    def step(self, name: str) -> Iterator[Draft]:
        """Time a step. An error makes it a failed row, and is raised again."""
        draft = Draft()
        began = time.perf_counter()
        try:
            yield draft
        except BaseException as error:
            message = error.message if isinstance(error, ImagerError) else str(error) or type(error).__name__
            draft.fail(message)
            raise
        finally:
            self._add(name, draft, time.perf_counter() - began)

    def _add(self, name: str, draft: Draft, seconds: float) -> None:
        row = Row(
            name, not draft.problem, round(seconds, 3), **draft.figures, remark=draft.problem or draft.remark
        )
        self.rows.append(row)
        if row.ok:
            self.reporter.note(f"{name}: {format_duration(seconds)}{': ' if row.remark else ''}{row.remark}")
        else:
            self.reporter.warn(f"{name} did not hold: {row.remark}")


_HEADS = ("step", "time", "read", "written", "stored", "blocks read", "changed", "new", "", "remark")
_LEFT = (0, 8, 9)


def _table(rows: tuple[Row, ...]) -> list[str]:
    cells = [_HEADS, *(_cells(row) for row in rows)]
    used = [any(line[column] for line in cells[1:]) for column in range(len(_HEADS))]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_HEADS))]
    out = []
    for line in cells:
        parts = [
            cell.ljust(width) if column in _LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
            if used[column]
        ]
        out.append("  ".join(parts).rstrip())
    out.insert(1, "-" * max(len(line) for line in out[:1]))
    return out


def _cells(row: Row) -> tuple[str, ...]:
    sizes = (row.bytes_read, row.bytes_written, row.bytes_stored)
    blocks = (row.blocks_read, row.blocks_changed, row.blocks_new)
    return (
        row.step,
        format_duration(row.seconds),
        *("" if size is None else format_size(size) for size in sizes),
        *("" if count is None else str(count) for count in blocks),
        "ok" if row.ok else "FAILED",
        row.remark,
    )
