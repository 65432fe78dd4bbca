"""Restore into files: bit for bit, whatever was there, whatever is damaged."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest

from imager._native import UNREADABLE, UNUSED, Slots
from imager.engine import restore, restore_plan, stream, windows
from imager.engine.restore import RestoreOptions
from imager.engine.target import HEAD, Target
from imager.errors import GuardRefused, IntegrityError, Interrupted, StorageError, TargetError, UsageError
from imager.events import Silent
from imager.repository.manifest import Manifest
from imager.repository.repository import Repository
from tests.unit.engine.conftest import Writer, content

MIB = 1 << 20


def go(
    repository: Repository, text: str, target: Path, reporter: Silent | None = None, **options: Any
) -> restore.RestoreSummary:
    reporter = reporter or Silent()
    plan = restore.plan(repository, text, str(target), RestoreOptions(**options), reporter)
    return restore.execute(repository, plan, reporter)


@pytest.mark.parametrize("size", [0, 1, 511, 4096, 4097, MIB, MIB + 1, 3 * MIB + 700, 9 * MIB])
def test_bit_for_bit(repository: Repository, writer: Writer, tmp_path: Path, size: int) -> None:
    data = content(size)
    writer.store({"sda": data})
    out = tmp_path / "out.img"
    summary = go(repository, "disk", out)
    assert out.read_bytes() == data
    assert summary.verified and summary.size == size and summary.mode == "full"
    assert not list((tmp_path / "state" / "restores").glob("*"))
    with pytest.raises(GuardRefused) if size else no_error():
        go(repository, "disk", out)


def test_a_repository_that_vanishes(
    plain: Repository, plain_writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(4 * MIB)
    plain_writer.store({"sda": data})
    out = tmp_path / "out.img"
    plan = restore.plan(plain, "disk", str(out), RestoreOptions(), Silent())
    plain.close()
    os.rename(tmp_path / "repo", tmp_path / "gone")
    reporter = Silent()
    with pytest.raises(StorageError) as caught:
        restore.execute(plain, plan, reporter)
    assert caught.value.exit_code == 1 and str(tmp_path / "repo") in caught.value.message
    assert any("incomplete" in text for text in reporter.warnings)
    assert not any(out.read_bytes())
    os.rename(tmp_path / "gone", tmp_path / "repo")
    go(plain, "disk", out, resume=True)
    assert out.read_bytes() == data


class no_error:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("block_size", [4096, 65536, 1 << 20, 4 << 20])
def test_every_block_size(plain: Repository, plain_writer: Writer, tmp_path: Path, block_size: int) -> None:
    data = content(13 * MIB + 5000, density=0.1)
    plain_writer.store({"sda": data}, block_size=block_size)
    out = tmp_path / "out.img"
    go(plain, "disk", out)
    assert out.read_bytes() == data


def test_several_windows(
    plain: Repository, plain_writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows.windows, "__defaults__", (600,))
    data = content(12 * MIB)
    plain_writer.store({"sda": data})
    out = tmp_path / "out.img"
    out.write_bytes(content(15 * MIB, seed=9, density=0.9))
    for options in ({"overwrite": True}, {"overwrite": True, "delta": True}):
        go(plain, "disk", out, **options)
        assert out.read_bytes() == data


def test_a_sparse_image_stays_sparse(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    source = tmp_path / "sparse"
    with open(source, "wb") as file:
        file.truncate(400 * MIB)
        file.seek(300 * MIB)
        file.write(b"x" * 10000)
    plain_writer.store({"sda": source}, block_size=65536)
    out = tmp_path / "out.img"
    summary = go(plain, "disk", out)
    assert os.stat(out).st_size == 400 * MIB
    assert os.stat(out).st_blocks * 512 <= 1 * MIB
    assert summary.bytes_written <= 2 * 65536
    assert subprocess.run(["cmp", source, out], check=False).returncode == 0


def test_delta_writes_what_differs(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    data = bytearray(content(8 * MIB))
    plain_writer.store({"sda": bytes(data)})
    out = tmp_path / "out.img"
    out.write_bytes(data)
    before = out.stat()
    summary = go(plain, "disk", out, delta=True, overwrite=True)
    assert (summary.bytes_written, summary.bytes_zeroed, summary.mode) == (0, 0, "delta")
    assert summary.bytes_kept == len(data)
    assert out.stat().st_mtime_ns == before.st_mtime_ns

    chance = random.Random(3)
    changed = bytearray(data)
    for _ in range(20):
        at = chance.randrange(2 * MIB, 8 * MIB)
        changed[at] ^= 0xFF
    changed[5] ^= 1
    out.write_bytes(changed)
    summary = go(plain, "disk", out, delta=True, overwrite=True)
    assert out.read_bytes() == data
    assert summary.bytes_written + summary.bytes_zeroed <= 20 * 4096 + MIB

    # only the head differs: nothing else is written
    out.write_bytes(bytes(4096) + data[4096:])
    summary = go(plain, "disk", out, delta=True, overwrite=True)
    assert out.read_bytes() == data
    assert summary.bytes_written + summary.bytes_zeroed <= MIB


@pytest.mark.parametrize("size", [0, 100, 3 * MIB, 20 * MIB])
@pytest.mark.parametrize("delta", [False, True])
def test_over_a_file_of_another_size(
    plain: Repository, plain_writer: Writer, tmp_path: Path, size: int, delta: bool
) -> None:
    data = content(8 * MIB + 100)
    plain_writer.store({"sda": data})
    out = tmp_path / "out.img"
    out.write_bytes(os.urandom(size))
    reporter = Silent()
    go(plain, "disk", out, reporter, overwrite=True, delta=delta)
    assert out.read_bytes() == data
    assert any("is cut to" in text for text in reporter.warnings) == (size > len(data))


def test_unused_and_unreadable_come_back_as_zeroes(
    plain: Repository, plain_writer: Writer, tmp_path: Path
) -> None:
    data = bytearray(os.urandom(4 * MIB))

    def mark(slots: Slots) -> None:
        slots.fill(300, 310, UNREADABLE)
        slots.fill(500, 900, UNUSED)
        slots.fill(0, 3, UNUSED)

    plain_writer.store({"sda": bytes(data)}, unreadable=mark, lost=((300 * 4096, 10 * 4096),))
    for start, end in ((300, 310), (500, 900), (0, 3)):
        data[start * 4096 : end * 4096] = bytes((end - start) * 4096)
    out = tmp_path / "out.img"
    summary = go(plain, "disk", out)
    assert out.read_bytes() == data
    assert summary.unreadable == ((300 * 4096, 10 * 4096),)
    out.write_bytes(os.urandom(4 * MIB))
    go(plain, "disk", out, delta=True, overwrite=True)
    assert out.read_bytes() == data


class Counting(Silent):
    """Holds every phase to its total."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[Any] | None = None
        self.names: list[str] = []

    def phase(self, name: str, total: int | None) -> None:
        assert self.open is None
        self.open = [name, total, 0]
        self.names.append(name)

    def advance(self, done: int, *, stored: int = 0) -> None:
        if self.open is not None:
            self.open[2] += done
            assert self.open[2] <= self.open[1]

    def end(self) -> None:
        assert self.open is not None
        assert self.open[1] == self.open[2], self.open
        self.open = None


def test_totals_are_true(
    plain: Repository, plain_writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imager.engine import verify

    monkeypatch.setattr(windows.windows, "__defaults__", (600,))
    data = content(9 * MIB + 123)
    plain_writer.store({"sda": data})
    out = tmp_path / "out.img"
    reporter = Counting()
    go(plain, "disk", out, reporter)
    assert reporter.names == ["writing", "reading back"]
    go(plain, "disk", out, reporter, delta=True, overwrite=True)
    out.write_bytes(data[: 5 * MIB] + os.urandom(MIB))
    go(plain, "disk", out, reporter, delta=True, overwrite=True)
    with monkeypatch.context() as patch:
        Broken(patch, 30, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            go(plain, "disk", out, overwrite=True)
    monkeypatch.setattr(windows.windows, "__defaults__", (300,))
    go(plain, "disk", out, reporter, resume=True)
    assert reporter.names[-2:] == ["writing the rest", "reading back"]
    verify.verify(plain, "disk", reporter, against=str(out))
    assert out.read_bytes() == data


def test_several_disks(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    a, b = content(MIB, seed=1), content(2 * MIB, seed=2)
    plain_writer.store({"sda": a, "sdb": b})
    out = tmp_path / "out.img"
    with pytest.raises(UsageError, match="2 disks"):
        go(plain, "disk", out)
    go(plain, "disk:sdb", out)
    assert out.read_bytes() == b
    go(plain, "disk", out, disk="sda", overwrite=True)
    assert out.read_bytes() == a
    with pytest.raises(UsageError, match="sdc"):
        go(plain, "disk:sdc", out, overwrite=True)
    with pytest.raises(UsageError, match="partition"):
        go(plain, "disk:sda:1", out, overwrite=True)


def test_no_verify_says_so(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    data = content(3 * MIB)
    plain_writer.store({"sda": data})
    reporter = Silent()
    summary = go(plain, "disk", tmp_path / "out.img", reporter, verify=False)
    assert not summary.verified
    assert any("NOT be read back" in text for text in reporter.warnings)
    assert (tmp_path / "out.img").read_bytes() == data
    with pytest.raises(UsageError):
        go(plain, "disk", tmp_path / "b.img", verify=False, resume=True)


def test_the_plan_prints_and_encodes(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    plain_writer.store({"sda": content(3 * MIB)}, lost=((4096, 100),))
    out = tmp_path / "out.img"
    plan = restore.plan(plain, "disk", str(out), RestoreOptions(), Silent())
    text = "\n".join(plan.describe())
    assert "new file" in text and "100 bytes at 4096" in text
    fields = msgspec.to_builtins(plan)
    assert fields["data"] + fields["zero"] == 3 * MIB
    assert "image" not in fields
    assert not plan.needs_confirmation
    assert not out.exists()
    # Where the set is another machine's, that is told: it may have the same name, and be the newest.
    assert ("of the machine" in text) == (fields["host"] != os.uname().nodename)
    other = dataclasses.replace(plan, host="db1")
    assert "disk sda, of the machine db1" in "\n".join(other.describe())
    own = dataclasses.replace(plan, host=os.uname().nodename)
    assert "of the machine" not in "\n".join(own.describe())


def damage(repository: Repository, manifest: Manifest, writer: Writer, block: int) -> None:
    """Flip a bit in the record that holds a block."""
    from imager.engine import images

    image = images.select_one(repository, manifest.id)
    for window in image.windows():
        kind, _, pack, offset, length = window.slots.get(block)
        assert kind == 3
        name = repository.names.name(pack)
        assert name is not None
        path = Path(repository.storage.url, "packs", name.hex()[:2], name.hex())
        path.chmod(0o600)
        with open(path, "r+b") as file:
            file.seek(offset + length - 1)
            byte = file.read(1)[0]
            file.seek(offset + length - 1)
            file.write(bytes([byte ^ 1]))


def test_damage_is_named_and_never_written(repository: Repository, writer: Writer, tmp_path: Path) -> None:
    data = os.urandom(4 * MIB)
    manifest = writer.store({"sda": data})
    damage(repository, manifest, writer, 700)
    out = tmp_path / "out.img"
    with pytest.raises(IntegrityError) as caught:
        go(repository, "disk", out)
    assert f"4096 bytes at {700 * 4096}" in caught.value.message
    assert "incomplete" in caught.value.message
    assert caught.value.hint and "verify" in caught.value.hint
    got = out.read_bytes()
    assert not any(got[:HEAD])
    assert not any(got[700 * 4096 : 701 * 4096])


def test_damage_in_the_head(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    manifest = plain_writer.store({"sda": os.urandom(2 * MIB)})
    damage(plain, manifest, plain_writer, 3)
    with pytest.raises(IntegrityError, match=f"4096 bytes at {3 * 4096}"):
        go(plain, "disk", tmp_path / "out.img")


def test_a_missing_pack(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    plain_writer.store({"sda": os.urandom(2 * MIB)})
    name = plain_writer.packs[0]
    Path(plain.storage.url, "packs", name[:2], name).unlink()
    with pytest.raises(IntegrityError, match=f"pack {name} is missing"):
        go(plain, "disk", tmp_path / "out.img")


def test_a_damaged_map_is_known_before_the_target_is_touched(
    plain: Repository, plain_writer: Writer, tmp_path: Path
) -> None:
    manifest = plain_writer.store({"sda": os.urandom(4 * MIB)})
    root = manifest.images[0].root
    assert root is not None
    path = Path(plain.storage.url, "maps", root.pack[:2], root.pack)
    path.chmod(0o600)
    raw = bytearray(path.read_bytes())
    raw[200] ^= 1
    path.write_bytes(raw)
    plain.close()
    out = tmp_path / "out.img"
    with pytest.raises(IntegrityError, match="block map of sda is damaged"):
        go(plain, "disk", out)
    assert not out.exists()


class Broken:
    """Makes the core's fetch end with an exception at its n-th call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException) -> None:
        from imager.engine import fetching

        real = fetching.fetch
        calls = 0

        def fetch(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error
            return real(*args, **options)

        monkeypatch.setattr(fetching, "fetch", fetch)
        monkeypatch.setattr(fetching, "SLICE_BYTES", 64 << 10)
        monkeypatch.setattr(windows.windows, "__defaults__", (300,))


@pytest.mark.parametrize("at", [1, 5, 30, 60])
@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_and_resumed(
    plain: Repository,
    plain_writer: Writer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    existing: bool,
) -> None:
    data = content(8 * MIB, density=0.6)
    plain_writer.store({"sda": data})
    out = tmp_path / "out.img"
    if existing:
        out.write_bytes(os.urandom(8 * MIB))
    with monkeypatch.context() as patch:
        Broken(patch, at, KeyboardInterrupt())
        with pytest.raises(Interrupted) as caught:
            go(plain, "disk", out, overwrite=existing)
        assert caught.value.hint and "--resume" in caught.value.hint
        assert not any(out.read_bytes()[:HEAD])
    with monkeypatch.context() as patch:
        patch.setattr(windows.windows, "__defaults__", (300,))
        reporter = Silent()
        plan = restore.plan(plain, "disk", str(out), RestoreOptions(resume=True), reporter)
        assert plan.mode == "resume"
        assert plan.resumed < len(data)
        if at == 60:
            assert plan.resumed > 0
        summary = restore.execute(plain, plan, reporter)
    assert out.read_bytes() == data
    if plan.resumed:
        assert summary.bytes_kept > 0
    assert not reporter.warnings


def test_resume_finds_what_was_spoiled_meanwhile(
    plain: Repository, plain_writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(8 * MIB)
    plain_writer.store({"sda": data})
    out = tmp_path / "out.img"
    with monkeypatch.context() as patch:
        Broken(patch, 100, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            go(plain, "disk", out)
    with open(out, "r+b") as file:
        file.seek(MIB + 20000)
        file.write(b"spoiled")
    with monkeypatch.context() as patch:
        patch.setattr(windows.windows, "__defaults__", (300,))
        with pytest.raises(TargetError, match=f"4096 bytes at {MIB + 16384}"):
            go(plain, "disk", out, resume=True)
        assert not any(out.read_bytes()[:HEAD])
        go(plain, "disk", out, delta=True, overwrite=True)
    assert out.read_bytes() == data


def test_resume_without_an_earlier_run(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    data = content(2 * MIB)
    plain_writer.store({"sda": data})
    reporter = Silent()
    go(plain, "disk", tmp_path / "out.img", reporter, resume=True)
    assert any("begins anew" in text for text in reporter.warnings)
    assert (tmp_path / "out.img").read_bytes() == data
    (tmp_path / "other.img").write_bytes(b"something")
    with pytest.raises(GuardRefused):
        go(plain, "disk", tmp_path / "other.img", resume=True)


def test_a_target_that_forgets_is_found_out(
    plain: Repository, plain_writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(4 * MIB)
    plain_writer.store({"sda": data})
    out = tmp_path / "out.img"
    real = Target.forget

    def forget(self: Target) -> None:
        os.pwrite(self.fd, b"oops", 2 * MIB + 5)
        real(self)

    monkeypatch.setattr(Target, "forget", forget)
    with pytest.raises(TargetError, match=f"4096 bytes at {2 * MIB}"):
        go(plain, "disk", out)
    assert not any(out.read_bytes()[:HEAD])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_full_filesystem(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    plain_writer.store({"sda": os.urandom(8 * MIB)})
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", small], check=True)
    try:
        reporter = Silent()
        with pytest.raises(TargetError, match="cannot be written at byte") as caught:
            go(plain, "disk", small / "out.img", reporter)
        assert caught.value.exit_code == 1
        assert caught.value.hint and "room" in caught.value.hint
        assert any("are free" in text for text in reporter.warnings)
    finally:
        subprocess.run(["umount", small], check=True)


def test_stream(
    repository: Repository, writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "STEP", MIB + 4096)
    for size in (0, 1, 5 * MIB + 77):
        data = content(size)
        manifest = writer.store({"db": data}, block_size=65536)
        out = tmp_path / f"out{size}"
        fd = os.open(out, os.O_WRONLY | os.O_CREAT)
        try:
            summary = stream.stream(repository, manifest.id, Silent(), out=fd)
        finally:
            os.close(fd)
        assert out.read_bytes() == data
        assert summary.bytes_written == size and not summary.verified


def test_stream_into_a_pipe_and_append(plain: Repository, plain_writer: Writer, tmp_path: Path) -> None:
    data = content(3 * MIB + 5)
    manifest = plain_writer.store({"db": data})
    cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert cat.stdin and cat.stdout
    import threading

    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(cat.stdout.read()))  # type: ignore[union-attr]
    reader.start()
    stream.stream(plain, manifest.id, Silent(), out=cat.stdin.fileno())
    cat.stdin.close()
    reader.join()
    assert cat.wait() == 0 and got == [data]
    fd = os.open(tmp_path / "appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    stream.stream(plain, manifest.id, Silent(), out=fd)
    os.close(fd)
    assert (tmp_path / "appended").read_bytes() == data


def test_a_damaged_stream_ends_before_the_damage(
    plain: Repository, plain_writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "STEP", MIB)
    data = os.urandom(4 * MIB)
    manifest = plain_writer.store({"db": data})
    damage(plain, manifest, plain_writer, 600)
    fd = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    with pytest.raises(IntegrityError, match=f"4096 bytes at {600 * 4096}"):
        stream.stream(plain, manifest.id, Silent(), out=fd)
    os.close(fd)
    assert (tmp_path / "out").read_bytes() == data[: 2 * MIB]


def test_shown_extents_are_bounded() -> None:
    from imager.extents import Extents

    text = restore._listed(Extents.of((at, at + 1) for at in range(0, 100, 2)))
    assert text.endswith("and 42 more extents")
    assert text.count("bytes at") == restore_plan.SHOWN
