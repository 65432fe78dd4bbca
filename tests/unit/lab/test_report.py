from __future__ import annotations

import msgspec
import pytest

from imager.errors import SourceError
from imager.events import Silent
from imager.lab.disk import LeftOut
from imager.lab.report import LabSummary, Recorder


def summary(recorder: Recorder, ok: bool) -> LabSummary:
    return LabSummary(
        ok=ok,
        mode="files",
        why_files="loop devices and mounts need root",
        size=1 << 30,
        data=300 << 20,
        filesystems=("ext4",),
        left_out=(LeftOut("xfs", "mkfs.xfs is not installed"),),
        seconds=12.0,
        kept=None,
        rows=tuple(recorder.rows),
    )


def test_a_failing_step_is_a_row_a_warning_and_an_error() -> None:
    reporter = Silent()
    recorder = Recorder(reporter)
    with recorder.step("full backup") as row:
        row.figures["bytes_read"] = 4096
        row.figures["blocks_new"] = 1
    with pytest.raises(SourceError), recorder.step("restore"):
        raise SourceError("it went wrong", hint="do better")
    assert [(row.step, row.ok, row.bytes_read) for row in recorder.rows] == [
        ("full backup", True, 4096),
        ("restore", False, None),
    ]
    assert reporter.warnings == ["restore did not hold: it went wrong"]


def test_the_table_shows_what_there_is() -> None:
    recorder = Recorder(Silent())
    with recorder.step("full backup") as row:
        row.figures["bytes_read"] = 4096
        row.remark = "well"
    with recorder.step("comparison") as row:
        row.fail("3 extents differ")
        row.fail("and more")
    lines = summary(recorder, ok=False).describe()
    assert "left out: xfs (mkfs.xfs is not installed)" in lines
    head = next(line for line in lines if line.startswith("step"))
    assert "read" in head and "stored" not in head
    assert any(
        "full backup" in line and "4.00 KiB" in line and line.endswith("ok      well") for line in lines
    )
    assert any("comparison" in line and line.endswith("FAILED  3 extents differ") for line in lines)
    assert lines[-1].endswith("FAILED: comparison")


def test_the_summary_is_json() -> None:
    recorder = Recorder(Silent())
    with recorder.step("full backup"):
        pass
    value = msgspec.json.decode(msgspec.json.encode(summary(recorder, ok=True)))
    assert value["ok"] is True and value["rows"][0]["step"] == "full backup"
    assert value["left_out"][0] == {"name": "xfs", "why": "mkfs.xfs is not installed"}
