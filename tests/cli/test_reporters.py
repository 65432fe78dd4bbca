"""Progress and remarks, in each way of showing them."""

from __future__ import annotations

import io
import json
import time

import pytest

from imager.cli import reporters
from imager.cli.shell import Settings
from imager.events import Reporter, Silent


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    """A stream whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def work(reporter: Reporter) -> None:
    """Ten steps of a phase with a known end, a remark in the middle."""
    reporter.phase("reading", 10 << 20)
    for step in range(10):
        reporter.advance(1 << 20, stored=1 << 18)
        if step == 5:
            reporter.warn("something is wrong", hint="look at it")
            reporter.note("by the way")
    reporter.end()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PLAIN_INTERVAL", "JSON_INTERVAL", "BAR_DELAY"):
        monkeypatch.setattr(reporters, name, 0.0)


@pytest.mark.parametrize(
    ("settings", "terminal", "kind"),
    [
        (Settings(), True, reporters.BarReporter),
        (Settings(), False, reporters.PlainReporter),
        (Settings(progress="plain"), True, reporters.PlainReporter),
        (Settings(progress="none"), True, reporters.TerminalReporter),
        (Settings(progress="json"), True, reporters.JsonReporter),
        (Settings(json=True), False, reporters.JsonReporter),
        (Settings(json=True, progress="none"), False, reporters.JsonReporter),
        (Settings(quiet=True), True, reporters.TerminalReporter),
    ],
)
def test_the_right_one_is_chosen(settings: Settings, terminal: bool, kind: type) -> None:
    stream = Terminal() if terminal else io.StringIO()
    assert type(reporters.choose(settings, stream)) is kind


def test_quick_work_is_not_commented() -> None:
    stream = io.StringIO()
    with reporters.PlainReporter(stream) as reporter:
        work(reporter)
    assert stream.getvalue().splitlines() == [
        "warning: something is wrong",
        "   hint: look at it",
        "by the way",
    ]


def test_plain_lines(no_waiting: None) -> None:
    stream = io.StringIO()
    with reporters.PlainReporter(stream) as reporter:
        work(reporter)
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("reading")]
    assert "10 %" in lines[0] and "of 10.0 MiB" in lines[0] and "(4.0 to 1)" in lines[0]
    assert lines[-1].startswith("reading: 10.0 MiB in ")


def test_json_lines(no_waiting: None) -> None:
    stream = io.StringIO()
    with reporters.JsonReporter(stream) as reporter:
        work(reporter)
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    progress = [event for event in events if event["message_type"] == "progress"]
    assert [event["ended"] for event in progress] == [False] * 10 + [True]
    assert progress[-1]["done"] == progress[-1]["total"] == 10 << 20
    assert {"message_type": "warning", "text": "something is wrong", "hint": "look at it"} in events
    assert {"message_type": "note", "text": "by the way"} in events


def test_quiet_json_keeps_warnings(no_waiting: None) -> None:
    stream = io.StringIO()
    with reporters.choose(Settings(json=True, quiet=True), stream) as reporter:
        work(reporter)
    assert [json.loads(line)["message_type"] for line in stream.getvalue().splitlines()] == ["warning"]


def test_bars(no_waiting: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with reporters.BarReporter(stream, verbose=1) as reporter:
        work(reporter)
    shown = stream.getvalue()
    assert "something is wrong" in shown
    assert "reading: 10.0 MiB in " in shown.splitlines()[-1]


def test_an_unknown_total_promises_nothing(no_waiting: None) -> None:
    stream = io.StringIO()
    with reporters.PlainReporter(stream) as reporter:
        reporter.phase("reading", None)
        time.sleep(0.1)
        reporter.advance(1 << 20)
        reporter.end()
    text = stream.getvalue()
    assert "1.00 MiB" in text and "left" not in text and "%" not in text


def test_remaining_time_is_from_the_rate() -> None:
    meter = reporters.Meter("reading", 100)
    time.sleep(0.3)
    meter.advance(25, 0)
    assert meter.remaining == pytest.approx(0.9, rel=0.5)


@pytest.mark.parametrize(
    "kind", [reporters.PlainReporter, reporters.JsonReporter, reporters.TerminalReporter]
)
def test_work_goes_on_when_nobody_listens(kind: type[reporters.TerminalReporter], no_waiting: None) -> None:
    with kind(Gone()) as reporter:
        work(reporter)


def test_silent_keeps_warnings() -> None:
    reporter = Silent()
    work(reporter)
    assert reporter.warnings == ["something is wrong"]
