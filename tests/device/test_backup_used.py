"""Backups of devices by used blocks: mounted, frozen, written to meanwhile; what a restore discards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from imager import command
from imager.engine import restore, unused
from imager.engine.restore import RestoreOptions, RestoreSummary
from imager.events import Silent
from imager.filesystem import whole
from imager.lab import rig
from imager.lab.mounting import mounted
from imager.lab.raw import fill_with_noise
from tests import filesystems as fs
from tests import foreign
from tests.workbench import Workbench, state_in

MIB = 1 << 20
MISSING = [tool for tool in sorted({argv[0] for argv in fs.MAKE.values()}) if command.find(tool) is None]
WITHOUT = rig.without_devices()
SIZES = {"ext": 64 * MIB, "xfs": 320 * MIB, "btrfs": 256 * MIB}
OPTIONS = {"ext": "-t ext4", "xfs": "", "btrfs": ""}
WRITTEN = "it is mounted for writing, and changes while it is read"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT)),
]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Workbench]:
    with state_in(tmp_path / "state"):
        yield Workbench(tmp_path, block_size=4096)


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def filled(kind: str, image: Path) -> fs.Listing:
    """A filesystem that was filled, unmounted, and is in use by nobody."""
    fs.make(kind, image, SIZES[kind], OPTIONS[kind])
    with fs.mount(kind, image) as root:
        fs.fill(root, 3, kind=kind, most=3 * MIB)
        return fs.listing(root)


def gives(place: Workbench, set_id: str, kind: str, expected: fs.Listing) -> None:
    """Restored onto random bytes, the filesystem has no fault and every file."""
    target = place.folder / "target"
    fill_with_noise(target, SIZES[kind])
    place.restore(set_id, target, delta=True, overwrite=True, unused="leave")
    with fs.mount(kind, target) as root:
        assert fs.listing(root) == expected
    fs.checked(kind, target)


@pytest.mark.parametrize("kind", ["ext", "xfs", "btrfs"])
def test_mounted_for_writing(kind: str, place: Workbench, undo: ExitStack, tmp_path: Path) -> None:
    """Every block, and why; read-only, or not mounted at all, by its map."""
    filled(kind, tmp_path / "image")
    device = undo.enter_context(fs.attach(tmp_path / "image"))
    with mounted(device.path, fs.MOUNT[kind], tmp_path / "mnt") as root:
        (root / "more").write_bytes(os.urandom(5000))
        fs.sync([root / "more"])
        [image] = place.backup(device.path, name="rw").images
        assert image.parts[0].every_block == WRITTEN and image.blocks_unused == 0
    with mounted(device.path, fs.MOUNT[kind], tmp_path / "mnt", read_only=True) as root:
        expected = fs.listing(root)
        one = place.backup(device.path, name="ro")
        [image] = one.images
        assert not image.parts[0].every_block and image.bytes_read < SIZES[kind] // 2
    gives(place, one.set, kind, expected)


@pytest.mark.parametrize("kind", ["ext", "xfs"])
def test_frozen(kind: str, place: Workbench, undo: ExitStack, tmp_path: Path) -> None:
    filled(kind, tmp_path / "image")
    device = undo.enter_context(fs.attach(tmp_path / "image"))
    with mounted(device.path, fs.MOUNT[kind], tmp_path / "mnt") as root:
        (root / "more").write_bytes(os.urandom(5000))
        expected = fs.listing(root)
        with fs.frozen(root):
            one = place.backup(device.path, name="d")
    [part] = one.images[0].parts
    assert not part.every_block and part.note.endswith(whole.AT_REST)
    gives(place, one.set, kind, expected)


@pytest.mark.parametrize("kind", ["ext", "xfs"])
def test_thawed_too_early(kind: str, place: Workbench, undo: ExitStack, tmp_path: Path) -> None:
    """What was written before all was read is in the image: every block is read."""
    filled(kind, tmp_path / "image")
    device = undo.enter_context(fs.attach(tmp_path / "image"))
    root = undo.enter_context(mounted(device.path, fs.MOUNT[kind], tmp_path / "mnt"))
    frozen = undo.enter_context(ExitStack())
    frozen.enter_context(fs.frozen(root))

    class Thawing(Silent):
        def advance(self, done: int, *, stored: int = 0) -> None:
            if not (root / "late").exists():
                frozen.close()
                (root / "late").write_bytes(os.urandom(1 * MIB))
                fs.sync([root / "late"])

    reporter = Thawing()
    summary = place.backup(device.path, name="d", reporter=reporter)
    [image] = summary.images
    assert image.parts[0].every_block == unused.WRITTEN and image.blocks_unused == 0
    assert "written to while it was read" in reporter.warnings[0]
    target = tmp_path / "target"
    place.restore(summary.set, target)
    late = (root / "late").read_bytes()
    with fs.mount(kind, target) as copy:
        assert (copy / "late").read_bytes() == late


def test_a_btrfs_that_is_written_to_unseen(place: Workbench, tmp_path: Path) -> None:
    """Of another machine's mount nothing is known here but what it does to the disk."""
    image = tmp_path / "image"
    filled("btrfs", image)

    class Other(Silent):
        def advance(self, done: int, *, stored: int = 0) -> None:
            if not (tmp_path / "done").exists():
                (tmp_path / "done").touch()
                with fs.mount("btrfs", image) as root:
                    (root / "late").write_bytes(b"late" * 10_000)

    summary = place.backup(image, name="d", reporter=Other())
    assert summary.images[0].parts[0].every_block == unused.WRITTEN


@pytest.mark.parametrize("how", ["discard", "zero", "leave"])
@pytest.mark.parametrize("sector", [512, 4096])
def test_unused_blocks_of_a_device(how: str, sector: int, place: Workbench, tmp_path: Path) -> None:
    expected = filled("ext", tmp_path / "image")
    one = place.backup(tmp_path / "image", name="d")
    target = tmp_path / "target"
    fill_with_noise(target, SIZES["ext"])
    noise = target.read_bytes()
    with fs.attach(target, sector_size=sector) as device:
        summary = to_device(place, device.path, how)
    left_out = one.images[0].blocks_unused
    assert (summary.unused, summary.bytes_unused) == (how, 0 if how == "zero" else left_out * 4096)
    raw = target.read_bytes()
    same = sum(raw[at : at + 4096] == noise[at : at + 4096] for at in range(0, len(raw), 4096))
    assert same == (left_out if how == "leave" else 0)
    assert (target.stat().st_blocks * 512 < SIZES["ext"] // 2) == (how != "leave")
    with fs.mount("ext", target, read_only=True) as root:
        assert fs.listing(root) == expected
    fs.checked("ext", target)


def to_device(place: Workbench, path: str, how: str) -> RestoreSummary:
    with place.open(writing=False) as repository:
        options = RestoreOptions(confirm_device=os.path.basename(path), unused=how)
        plan = restore.plan(repository, "d", path, options, Silent())
        return restore.execute(repository, plan, Silent())


@pytest.mark.skipif(command.find("mount.exfat-fuse") is None, reason="not installed: mount.exfat-fuse")
@pytest.mark.skipif(foreign.without_fuse() is not None, reason=str(foreign.without_fuse()))
def test_a_target_that_takes_no_discards(place: Workbench, tmp_path: Path) -> None:
    """A file that can have no holes: what is unused is left as it was, and that is said."""
    filled("ext", tmp_path / "image")
    one = place.backup(tmp_path / "image", name="d")
    left_out = one.images[0].blocks_unused
    foreign.make("exfat", tmp_path / "outer", 160 * MIB)
    with foreign.mounted("exfat", tmp_path / "outer") as root:
        target = root / "target"
        fill_with_noise(target, SIZES["ext"])
        noise = target.read_bytes()
        reporter = Silent()
        with place.open(writing=False) as repository:
            options = RestoreOptions(delta=True, overwrite=True)
            plan = restore.plan(repository, "d", str(target), options, reporter)
            summary = restore.execute(repository, plan, reporter)
        raw = target.read_bytes()
    assert (summary.unused, summary.bytes_unused) == ("leave", left_out * 4096)
    assert any("takes no discards" in note for note in reporter.notes)
    assert sum(raw[at : at + 4096] == noise[at : at + 4096] for at in range(0, len(raw), 4096)) == left_out
