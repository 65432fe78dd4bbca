"""The whole rehearsal, on loop devices and on files alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from imager import command, lab
from imager.errors import StorageError, UsageError
from imager.events import Silent
from imager.filesystem import whole
from imager.lab import guide, raw, rig
from imager.lab.disk import KINDS
from imager.units import MIB

ROOT = Path(__file__).parents[2]
SMALL = 192 * MIB
WHOLE = 900 * MIB
TOOLS = {"sfdisk", *(tool for kind in KINDS for tool in (*kind.tools, *kind.offline_tools))}
MISSING = sorted(tool for tool in TOOLS if command.find(tool) is None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]
WITHOUT = rig.without_devices()
devices = pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT))


class Meddler(Silent):
    """Does something once a step of the lab is over."""

    def __init__(self, after: str, folder: Path) -> None:
        super().__init__()
        self.after = after
        self.folder = folder

    def note(self, text: str) -> None:
        super().note(text)
        if text.startswith(f"{self.after}:"):
            self.meddle(next(self.folder.glob("imager-lab-*")))

    def meddle(self, work: Path) -> None:
        raise KeyboardInterrupt


def clean(folder: Path) -> bool:
    """Nothing of a lab in `folder` is left, nor mounted, nor attached."""
    backing = Path("/sys/block").glob("loop*/loop/backing_file")
    used = [path.read_text() for path in backing if path.exists()]
    return (
        not list(folder.glob("imager-lab-*"))
        and str(folder) not in Path("/proc/self/mountinfo").read_text()
        and not any(str(folder) in name for name in used)
    )


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A folder of an ordinary user. pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="imager-test-") as name:
        os.chown(name, 65534, 65534)
        yield Path(name)


@devices
@pytest.mark.root
def test_everything_holds_on_loop_devices(tmp_path: Path) -> None:
    reporter = Silent()
    summary = lab.run(lab.LabOptions(size=WHOLE, workdir=tmp_path), reporter)
    assert summary.ok, summary.describe()
    assert reporter.warnings == []
    assert summary.mode == "devices" and summary.filesystems == ("fat", "ext4", "xfs", "btrfs")
    assert not summary.left_out
    full, incremental, differential = (row for row in summary.rows if row.step.endswith(" backup"))
    assert full.bytes_stored and incremental.bytes_stored and differential.bytes_stored
    assert incremental.bytes_stored < full.bytes_stored / 2
    assert incremental.blocks_changed and differential.blocks_changed
    assert differential.blocks_changed >= incremental.blocks_changed / 2
    _by_used_blocks(summary)
    assert clean(tmp_path)


def _by_used_blocks(summary: lab.LabSummary) -> None:
    """Every filesystem has a row for what was read of it, and the rest of the target is noise still."""
    rows = {row.step: row for row in summary.rows}
    for name in summary.filesystems:
        row = rows[f"full: used blocks of {name}"]
        assert row.bytes_read and row.bytes_used and row.bytes_total and "in use" in row.remark
        assert row.bytes_read <= row.bytes_used < row.bytes_total / 2
    [restored] = [row for row in summary.rows if row.step == "restore"]
    assert restored.bytes_written and restored.bytes_written < WHOLE / 2
    assert "noise elsewhere" in rows["compare the disks"].remark


def test_everything_holds_on_files_alone(tmp_path: Path) -> None:
    summary = lab.run(lab.LabOptions(size=WHOLE, workdir=tmp_path, files_only=True), Silent())
    assert summary.ok, summary.describe()
    assert summary.mode == "files" and summary.filesystems == ("fat", "ext4", "xfs", "btrfs")
    remark = next(row.remark for row in summary.rows if row.step == "changes, round 1")
    assert "ext4 by debugfs" in remark and "xfs made anew" in remark
    _by_used_blocks(summary)
    assert clean(tmp_path)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_an_ordinary_user_needs_nothing_more(theirs: Path) -> None:
    program = (
        "from imager import lab; from imager.events import Silent; from imager.units import MIB\n"
        f"s = lab.run(lab.LabOptions(size={SMALL}), Silent()); print(*s.describe(), sep='\\n')\n"
        "assert s.ok and s.mode == 'files'"
    )
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable]
    environment = {"PATH": "/usr/bin:/bin", "TMPDIR": str(theirs), "PYTHONDONTWRITEBYTECODE": "1"}
    if subprocess.run([*as_nobody, "-c", ""], env=environment, check=False, capture_output=True).returncode:
        pytest.skip("nobody may not start this Python")
    done = subprocess.run(
        [*as_nobody, "-c", program], env=environment, cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert clean(theirs) and not list(theirs.iterdir())


@pytest.mark.parametrize("files_only", [pytest.param(False, marks=devices), True])
@pytest.mark.parametrize("after", ["partition the disk", "build the disk", "full backup", "restore"])
def test_an_interrupted_lab_leaves_nothing(tmp_path: Path, files_only: bool, after: str) -> None:
    before = dict(os.environ)
    options = lab.LabOptions(size=SMALL, workdir=tmp_path, files_only=files_only)
    with pytest.raises(KeyboardInterrupt):
        lab.run(options, Meddler(after, tmp_path))
    assert clean(tmp_path)
    assert dict(os.environ) == before


@pytest.mark.parametrize("files_only", [pytest.param(False, marks=devices), True])
def test_a_restore_that_went_wrong_is_noticed(tmp_path: Path, files_only: bool) -> None:
    class Spoiler(Meddler):
        def meddle(self, work: Path) -> None:
            with (work / "restored.img").open("r+b") as file:
                file.seek(41 * MIB + 4096)  # ext4's group descriptors
                file.write(bytes(4096))

    reporter = Spoiler("restore", tmp_path)
    summary = lab.run(lab.LabOptions(size=SMALL, workdir=tmp_path, files_only=files_only), reporter)
    assert not summary.ok
    failed = {row.step: row.remark for row in summary.rows if not row.ok}
    assert (
        {"compare the disks", "check ext4"}
        <= set(failed)
        <= {"compare the disks", "check ext4", "files of ext4"}
    )
    assert str(41 * MIB + 4096) in failed["compare the disks"]
    assert any("compare the disks did not hold" in text for text in reporter.warnings)
    assert clean(tmp_path)


def test_a_step_that_fails_ends_the_lab_with_a_failed_row(tmp_path: Path) -> None:
    class Thief(Meddler):
        def meddle(self, work: Path) -> None:
            shutil.rmtree(work / "repository" / "packs")

    options = lab.LabOptions(size=SMALL, workdir=tmp_path, files_only=True)
    summary = lab.run(options, Thief("differential backup", tmp_path))
    assert not summary.ok
    assert summary.rows[-1].step == "restore" and not summary.rows[-1].ok and summary.rows[-1].remark
    assert clean(tmp_path)


def test_what_is_kept_can_be_looked_at(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    summary = lab.run(lab.LabOptions(size=SMALL, keep=folder, files_only=True), Silent())
    assert summary.ok, summary.describe()
    assert summary.kept == str(folder)
    readme = (folder / "README.txt").read_text()
    for name in os.listdir(folder):
        if name != "README.txt":
            known = name if not name.startswith("tree-") else "tree-*"
            assert f"  {known}" in readme, f"README.txt does not tell of {name}"
    with (folder / "disk.img").open("rb") as file:
        used = whole.used_blocks(file.fileno(), SMALL).used
    differing = raw.differences(folder / "disk.img", folder / "restored.img", SMALL)
    assert differing and not differing & used
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    with pytest.raises(UsageError, match="not empty"):
        lab.run(lab.LabOptions(size=SMALL, keep=folder, files_only=True), Silent())


def test_the_commands_of_a_kept_lab_work(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    assert lab.run(lab.LabOptions(size=SMALL, keep=folder, files_only=True), Silent()).ok
    text = (folder / "README.txt").read_text()
    lines = [line.strip() for line in text[text.index("To try") :].splitlines() if line.startswith("  ")]
    exports = f'imager() {{ "{sys.executable}" -m imager "$@"; }}\n'
    results = []
    for line in lines:
        if line.startswith("export "):
            exports += f"{line}\n"
            continue
        done = subprocess.run(
            ["bash", "-c", exports + line],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=False,
            capture_output=True,
            text=True,
        )
        results.append((line, done.returncode, done.stdout + done.stderr))
        if line == "imager show lab":
            assert "DAMAGED" not in done.stdout, done.stdout
    assert [code for _, code, _ in results] == [0, 0, 0, 0, 0, 0, 30, 30], results


def test_too_little_room_is_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="are free"):
        lab.run(lab.LabOptions(size=1 << 50, workdir=tmp_path), Silent())
    assert clean(tmp_path)


def test_the_guide_names_every_filesystem(tmp_path: Path) -> None:
    guide.write(tmp_path, ["ext4", "xfs"], devices=True)
    assert "ext4, xfs" in (tmp_path / "README.txt").read_text()
