"""The write guard on real devices: refused, with the right code, and not one byte changed."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from imager import command
from imager.device import guard, rescue_table
from imager.device.guard import Verdict, confirm, examine, open_target
from imager.device.identity import identify
from imager.device.loop import LoopDevice, attach
from imager.errors import GuardRefused, ImagerError, NotConfirmed

MIB = 1 << 20
SIZE = 32 * MIB

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="needs loop devices"),
]

TABLE = b"label: gpt\nstart=1MiB,size=12MiB\nsize=12MiB\n"
Attach = Callable[..., LoopDevice]


@pytest.fixture
def undo() -> Iterator[ExitStack]:
    """Undoes in reverse order, whatever fails."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def disk(tmp_path: Path, undo: ExitStack) -> Attach:
    """Makes a disk image with recognisable bytes and attaches it."""

    def make(name: str = "disk", *, table: bool = False, size: int = SIZE, **options: bool) -> LoopDevice:
        image = tmp_path / name
        if not image.exists():
            with image.open("wb") as file:
                file.write(os.urandom(MIB) * (size // MIB))
        if table:
            command.run(["sfdisk", "-q", "--wipe", "always", str(image)], stdin=TABLE)
        device = undo.enter_context(attach(image, **options))
        if table:
            device.add_partitions()
        return device

    return make


def digest(path: str | os.PathLike[str]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def refused(target: str, *codes: str, **request: object) -> Verdict:
    """`target` is refused for each of `codes`, by exit code 20, and nothing on it changed."""
    before = digest(target) if os.path.exists(target) and not os.path.isdir(target) else None
    verdict = examine(target, **request)  # type: ignore[arg-type]
    assert set(codes) <= {r.code for r in verdict.reasons}, verdict.reasons
    name = verdict.identity.name if verdict.identity else None
    with pytest.raises(GuardRefused) as error:
        open_target(confirm(verdict, confirm_device=name))
    assert error.value.exit_code == 20
    assert before is None or digest(target) == before
    return verdict


def mount(source: str, folder: Path, undo: ExitStack, *inside: str) -> None:
    """Mount, make folders inside, and go read-only: the kernel writes nothing while hashes are compared."""
    folder.mkdir()
    command.run(["mount", source, str(folder)])
    undo.callback(command.run, ["umount", str(folder)])
    for name in inside:
        (folder / name).mkdir()
    command.run(["mount", "-o", "remount,ro", str(folder)])


def ext4(device: str) -> None:
    command.run(["mkfs.ext4", "-q", "-F", device])


def test_a_free_device_is_allowed_and_claimed(disk: Attach, tmp_path: Path) -> None:
    device = disk(table=True)
    before = digest(device.backing)
    verdict = examine(device.path, required_size=SIZE)
    assert verdict.allowed, verdict.reasons
    confirmed = confirm(verdict, confirm_device=device.name)
    with open_target(confirmed, state_folder=tmp_path / "state") as target:
        assert target.size == SIZE
        assert target.saved_table is not None
        assert "label: gpt" in (target.saved_table / "table.sfdisk").read_text()
        assert {r.code for r in examine(device.path).reasons} == {"busy"}
        with pytest.raises(GuardRefused, match="exclusive"):
            open_target(confirmed, state_folder=tmp_path / "state")
        assert digest(device.backing) == before
        os.pwrite(target.fd, bytes(MIB), 0)
        os.pwrite(target.fd, bytes(MIB), SIZE - MIB)
        os.fsync(target.fd)
    assert digest(device.backing) != before
    for line in rescue_table.undo(target.saved_table):
        subprocess.run(line.split(), check=True, capture_output=True)
    assert digest(device.backing) == before


def test_mounted(disk: Attach, tmp_path: Path, undo: ExitStack) -> None:
    device = disk()
    ext4(device.path)
    mount(device.path, tmp_path / "mnt", undo)
    verdict = refused(device.path, "mounted")
    assert str(tmp_path / "mnt") in verdict.reasons[0].text


def test_mounted_twice_names_both(disk: Attach, tmp_path: Path, undo: ExitStack) -> None:
    device = disk()
    ext4(device.path)
    mount(device.path, tmp_path / "mnt", undo, "sub")
    (tmp_path / "bound").mkdir()
    command.run(["mount", "--bind", str(tmp_path / "mnt" / "sub"), str(tmp_path / "bound")])
    undo.callback(command.run, ["umount", str(tmp_path / "bound")])
    verdict = refused(device.path, "mounted")
    assert sum(r.code == "mounted" for r in verdict.reasons) == 2


def test_mounted_partition(disk: Attach, tmp_path: Path, undo: ExitStack) -> None:
    device = disk(table=True)
    ext4(f"{device.path}p1")
    mount(f"{device.path}p1", tmp_path / "mnt", undo)
    refused(device.path, "mounted")
    refused(f"{device.path}p1", "mounted")
    assert examine(f"{device.path}p2").allowed, "the partition beside it is free"


def test_swap(disk: Attach, undo: ExitStack) -> None:
    device = disk(table=True)
    swap = f"{device.path}p2"
    command.run(["mkswap", swap])
    try:
        command.run(["swapon", swap])
    except ImagerError as error:
        pytest.skip(f"no swap here: {error}")
    undo.callback(command.run, ["swapoff", swap])
    refused(device.path, "swap")
    refused(swap, "swap")


def test_loop_over_a_device(disk: Attach, undo: ExitStack) -> None:
    device = disk()
    undo.enter_context(attach(device.path))
    refused(device.path, "held")


def test_loop_over_a_partition_with_a_mount(disk: Attach, tmp_path: Path, undo: ExitStack) -> None:
    device = disk(table=True)
    over = undo.enter_context(attach(f"{device.path}p1"))
    ext4(over.path)
    mount(over.path, tmp_path / "mnt", undo)
    refused(f"{device.path}p1", "held", "mounted")
    refused(device.path, "held", "mounted")
    refused(over.path, "mounted")


def test_two_loops_over_one_file(disk: Attach) -> None:
    one, other = disk("same"), disk("same")
    refused(one.path, "shared")
    refused(other.path, "shared")


def test_the_source(disk: Attach, tmp_path: Path) -> None:
    device = disk(table=True)
    whole, part = identify(device.path), identify(f"{device.path}p1")
    refused(device.path, "source", source_identities=[whole])
    refused(device.path, "source", source_identities=[part])
    refused(f"{device.path}p1", "source", source_identities=[whole])
    assert examine(f"{device.path}p2", source_identities=[part]).allowed
    os.link(device.backing, tmp_path / "hard link")
    file = identify(tmp_path / "hard link")
    refused(device.path, "source", source_identities=[file])
    refused(str(tmp_path / "hard link"), "source", "held", source_identities=[whole], overwrite=True)


def test_a_btrfs_on_two_devices(disk: Attach, tmp_path: Path, undo: ExitStack) -> None:
    if command.find("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs is not installed")
    one, other = disk("one", size=160 * MIB), disk("two", size=160 * MIB)
    command.run(["mkfs.btrfs", "-q", "-f", "-d", "single", "-m", "raid1", one.path, other.path])
    (tmp_path / "mnt").mkdir()
    try:
        command.run(["mount", "-o", f"ro,device={other.path}", one.path, str(tmp_path / "mnt")])
    except ImagerError as error:
        pytest.skip(f"no btrfs here: {error}")
    undo.callback(command.run, ["umount", str(tmp_path / "mnt")])
    refused(one.path, "mounted")
    refused(other.path, "mounted")


def system_disk() -> str:
    """The disk under /, as sysfs sees it, found without the code under test."""
    dev = os.stat("/").st_dev
    link = os.path.realpath(f"/sys/dev/block/{os.major(dev)}:{os.minor(dev)}")
    if not os.path.exists(link):
        pytest.skip("/ is on no block device")
    name = os.path.basename(os.path.dirname(link) if os.path.exists(f"{link}/partition") else link)
    return f"/dev/{name}"


def test_the_disk_of_the_running_system() -> None:
    """Examined only: this test opens nothing of it for writing."""
    verdict = examine(system_disk())
    assert {"mounted", "system"} <= {r.code for r in verdict.reasons}
    with pytest.raises(GuardRefused) as error:
        confirm(verdict, confirm_device=verdict.identity.serial if verdict.identity else None)
    assert error.value.exit_code == 20


def test_the_disk_of_the_repository(disk: Attach, tmp_path: Path, undo: ExitStack) -> None:
    device = disk(table=True)
    ext4(f"{device.path}p1")
    mount(f"{device.path}p1", tmp_path / "mnt", undo, "repo")
    repository = tmp_path / "mnt" / "repo"
    refused(device.path, "repository", repository_path=repository)
    refused(f"{device.path}p2", "repository", repository_path=repository)
    refused(f"{device.path}p2", "repository", repository_path=repository / "not yet")


def test_a_loop_device_over_a_file_in_the_repository(disk: Attach, tmp_path: Path) -> None:
    device = disk()
    refused(device.path, "repository", repository_path=tmp_path)


def test_too_small_with_the_numbers(disk: Attach) -> None:
    device = disk()
    verdict = refused(device.path, "too-small", required_size=SIZE + 1)
    text = verdict.reasons[0].text
    assert str(SIZE) in text and str(SIZE + 1) in text and "1 too few" in text


def test_read_only(disk: Attach) -> None:
    refused(disk(read_only=True).path, "read-only")


def test_an_unattached_loop_device(disk: Attach) -> None:
    device = disk()
    device.detach()
    verdict = examine(device.path)
    assert verdict.allowed is False


def test_a_folder(tmp_path: Path) -> None:
    refused(str(tmp_path), "not-a-target")


@pytest.mark.parametrize("given", ["yes", "", "loop", "/dev/null", "SERIAL"])
def test_wrong_confirmation(disk: Attach, given: str) -> None:
    device = disk()
    before = digest(device.path)
    with pytest.raises(NotConfirmed) as error:
        confirm(examine(device.path), confirm_device=given)
    assert error.value.exit_code == 21
    with pytest.raises(NotConfirmed):
        confirm(examine(device.path), typed=given)
    assert digest(device.path) == before


def test_a_clones_table_uuid_confirms_neither(disk: Attach, tmp_path: Path) -> None:
    one = disk("one", table=True)
    uuid = identify(one.path).ptuuid
    assert uuid
    confirm(examine(one.path), confirm_device=uuid)
    (tmp_path / "two").write_bytes((tmp_path / "one").read_bytes())
    disk("two")
    with pytest.raises(NotConfirmed):
        confirm(examine(one.path), confirm_device=uuid)


def test_mounted_after_it_was_confirmed(disk: Attach, tmp_path: Path, undo: ExitStack) -> None:
    device = disk()
    ext4(device.path)
    confirmed = confirm(examine(device.path), confirm_device=device.name)
    mount(device.path, tmp_path / "mnt", undo)
    before = digest(device.path)
    with pytest.raises(GuardRefused, match="in use"):
        open_target(confirmed, state_folder=tmp_path / "state")
    assert digest(device.path) == before
    assert not (tmp_path / "state").exists()


def test_a_loop_attached_over_it_after_it_was_confirmed(
    disk: Attach, tmp_path: Path, undo: ExitStack
) -> None:
    """O_EXCL does not see this one: the second examination does."""
    device = disk()
    confirmed = confirm(examine(device.path), confirm_device=device.name)
    undo.enter_context(attach(device.path))
    with pytest.raises(GuardRefused, match="held by"):
        open_target(confirmed, state_folder=tmp_path / "state")


def test_another_disk_under_the_same_name(
    disk: Attach, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop device is taken over by another file between confirmation and write."""
    one, two = disk("one"), disk("two")
    confirmed = confirm(examine(one.path), confirm_device=one.name)
    monkeypatch.setattr(guard, "_open", lambda verdict: (os.open(two.path, os.O_RDWR | os.O_EXCL), False))
    before = digest(two.path)
    with pytest.raises(GuardRefused, match="not what was examined"):
        open_target(confirmed, state_folder=tmp_path / "state")
    assert digest(two.path) == before
    assert not (tmp_path / "state").exists()
