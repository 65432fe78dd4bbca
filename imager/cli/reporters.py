"""How progress and remarks reach a person or a program.

Invariant: a reporter never ends the work it reports on: when its stream is
gone it falls silent. What it says of remaining time comes from true totals
and the rate of the last seconds, or it says nothing.
"""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import IO, TYPE_CHECKING

from imager.cli.style import clean, is_terminal, paint
from imager.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from imager.cli.shell import Settings

PLAIN_INTERVAL = 10.0
"Seconds between two lines of plain progress."
JSON_INTERVAL = 0.5
"Seconds between two progress messages."
BAR_DELAY = 0.5
"A bar is drawn only for work that takes longer: loading it would cost more than the work."
_WINDOW = 15.0


class Meter:
    """One phase of work: how far it is, how fast, how long it will take."""

    def __init__(self, name: str, total: int | None) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self.stored = 0
        self.began = monotonic()
        self._marks: deque[tuple[float, int]] = deque([(self.began, 0)])

    def advance(self, done: int, stored: int) -> float:
        """Add what was done; returns the time now."""
        self.done += done
        self.stored += stored
        now = monotonic()
        if now - self._marks[-1][0] > 0.2:
            self._marks.append((now, self.done))
            while len(self._marks) > 2 and now - self._marks[0][0] > _WINDOW:
                self._marks.popleft()
        return now

    @property
    def seconds(self) -> float:
        return monotonic() - self.began

    @property
    def rate(self) -> float | None:
        """Bytes a second over the last seconds; None at the very beginning."""
        since, done = self._marks[0]
        elapsed = monotonic() - since
        return (self.done - done) / elapsed if elapsed > 0.05 else None

    @property
    def remaining(self) -> float | None:
        """Seconds until the end; None where the total or the rate is not known."""
        rate = self.rate
        if self.total is None or not rate:
            return None
        return max(0, self.total - self.done) / rate

    @property
    def ratio(self) -> float | None:
        """Bytes done for each byte stored."""
        return self.done / self.stored if self.stored else None

    def describe(self, *, ended: bool = False) -> str:
        """`reading: 42 %, 2.52 GiB of 6.00 GiB, 1.90 GiB/s, 402 MiB stored (6.4 to 1), 1.83 s left`."""
        parts: list[str] = []
        if ended:
            parts += [f"{format_size(self.done)} in {format_duration(self.seconds)}"]
            parts += [format_rate(self.done, self.seconds)]
        else:
            if self.total:
                parts += [f"{100 * self.done // self.total} %"]
                parts += [f"{format_size(self.done)} of {format_size(self.total)}"]
            else:
                parts += [format_size(self.done)]
            if (rate := self.rate) is not None:
                parts += [format_rate(rate, 1)]
        if self.ratio is not None:
            parts += [f"{format_size(self.stored)} stored ({self.ratio:.1f} to 1)"]
        if not ended and (remaining := self.remaining) is not None:
            parts += [f"{format_duration(remaining)} left"]
        return f"{self.name}: {', '.join(parts)}"


class TerminalReporter:
    """Remarks as lines on standard error; progress not shown. The base of the others."""

    def __init__(self, stream: IO[str], *, verbose: int = 0, quiet: bool = False) -> None:
        self._stream = stream
        self._verbose = verbose
        self._quiet = quiet
        self._meter: Meter | None = None
        self._open = True

    def phase(self, name: str, total: int | None) -> None:
        self.end()
        self._meter = Meter(name, total)

    def advance(self, done: int, *, stored: int = 0) -> None:
        if self._meter is not None:
            self._show(self._meter, self._meter.advance(done, stored))

    def end(self) -> None:
        if self._meter is not None:
            meter, self._meter = self._meter, None
            self._ended(meter)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._line(text)

    def warn(self, text: str, *, hint: str | None = None) -> None:
        if not self._quiet:
            self._line(f"{paint('warning:', 'yellow', self._stream)} {text}")
            if hint:
                self._line(f"   {paint('hint:', 'cyan', self._stream)} {hint}")

    def close(self) -> None:
        """Leave the terminal as it was found. Safe to call twice."""
        self._meter = None

    def __enter__(self) -> TerminalReporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, meter: Meter, now: float) -> None:
        """The meter moved."""

    def _ended(self, meter: Meter) -> None:
        if self._verbose and not self._quiet:
            self._line(meter.describe(ended=True))

    def _line(self, text: str) -> None:
        if not self._open:
            return
        try:
            self._stream.write(clean(text) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            self._open = False


class PlainReporter(TerminalReporter):
    """A line now and then: for logs."""

    def phase(self, name: str, total: int | None) -> None:
        super().phase(name, total)
        self._next = monotonic() + PLAIN_INTERVAL
        self._shown = False

    def _show(self, meter: Meter, now: float) -> None:
        if now >= self._next:
            self._next = now + PLAIN_INTERVAL
            self._shown = True
            self._line(meter.describe())

    def _ended(self, meter: Meter) -> None:
        if self._shown or self._verbose:
            self._line(meter.describe(ended=True))


class JsonReporter(TerminalReporter):
    """Events as JSON Lines: `progress`, `note`, `warning`."""

    def phase(self, name: str, total: int | None) -> None:
        super().phase(name, total)
        self._next = 0.0

    def note(self, text: str) -> None:
        if not self._quiet:
            self._event("note", text=text)

    def warn(self, text: str, *, hint: str | None = None) -> None:
        # A program that asked for JSON is told of every warning, quiet or not.
        self._event("warning", text=text, hint=hint)

    def _show(self, meter: Meter, now: float) -> None:
        if now >= self._next:
            self._next = now + JSON_INTERVAL
            self._progress(meter, ended=False)

    def _ended(self, meter: Meter) -> None:
        self._progress(meter, ended=True)

    def _progress(self, meter: Meter, *, ended: bool) -> None:
        if self._quiet:
            return
        rate, remaining = meter.rate, meter.remaining
        self._event(
            "progress",
            phase=meter.name,
            total=meter.total,
            done=meter.done,
            stored=meter.stored,
            seconds=round(meter.seconds, 3),
            rate=None if rate is None else round(rate),
            remaining=None if remaining is None else round(remaining, 1),
            ended=ended,
        )

    def _event(self, message_type: str, **fields: object) -> None:
        from imager.cli.shell import encode

        self._line(encode({"message_type": message_type, **fields}))


class BarReporter(TerminalReporter):
    """A bar that moves, by rich, for work that takes long enough to look at."""

    _progress: Progress | None = None
    _task: TaskID

    def _show(self, meter: Meter, now: float) -> None:
        if self._progress is None:
            if now - meter.began < BAR_DELAY:
                return
            self._begin(meter)
        assert self._progress is not None
        remaining = meter.remaining
        self._progress.update(
            self._task,
            completed=meter.done,
            size=f"{format_size(meter.done)}" + (f" of {format_size(meter.total)}" if meter.total else ""),
            rate=format_rate(meter.rate or 0, 1),
            ratio=""
            if meter.ratio is None
            else f"stored {format_size(meter.stored)} ({meter.ratio:.1f} to 1)",
            left="" if remaining is None else f"{format_duration(remaining)} left",
        )

    def _begin(self, meter: Meter) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
        from rich.table import Column

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TaskProgressColumn(),
            # On a narrow terminal what stands last is cut off, never wrapped.
            TextColumn(
                "{task.fields[size]}  {task.fields[rate]}  {task.fields[left]}  {task.fields[ratio]}",
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            console=Console(file=self._stream),
            transient=True,
            refresh_per_second=8,
        )
        self._task = self._progress.add_task(
            meter.name, total=meter.total, size="", rate="", ratio="", left=""
        )
        self._progress.start()

    def _ended(self, meter: Meter) -> None:
        self._stop()
        super()._ended(meter)

    def _stop(self) -> None:
        if self._progress is not None:
            progress, self._progress = self._progress, None
            progress.stop()

    def close(self) -> None:
        self._stop()
        super().close()

    def _line(self, text: str) -> None:
        if self._progress is not None:
            from rich.text import Text

            self._progress.console.print(Text.from_ansi(text))
        else:
            super()._line(text)


def choose(settings: Settings, stream: IO[str], *, long_job: bool = True) -> TerminalReporter:
    """The reporter for these settings.

    `stream` is standard output where events join the JSON stream of a long job, else
    standard error. A query that is answered in JSON shows progress only on demand.
    """
    mode = settings.progress
    if settings.json and mode in ("none", "plain") or settings.json and mode == "auto" and not long_job:
        # Warnings are messages all the same.
        return JsonReporter(stream, quiet=True)
    if settings.json or mode == "json":
        return JsonReporter(stream, verbose=settings.verbose, quiet=settings.quiet)
    if settings.quiet or mode == "none":
        return TerminalReporter(stream, verbose=settings.verbose, quiet=settings.quiet)
    if mode == "auto" and is_terminal(stream):
        return BarReporter(stream, verbose=settings.verbose)
    return PlainReporter(stream, verbose=settings.verbose)
