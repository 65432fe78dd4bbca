"""The guard on plain files, and its confirmation; devices are in tests/device."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from imager.device import guard
from imager.device.guard import Request, Verdict, confirm, examine, open_target
from imager.device.identity import Identity, identify
from imager.errors import GuardRefused, NotConfirmed


def codes(verdict: Verdict) -> list[str]:
    return [reason.code for reason in verdict.reasons]


def test_a_new_file_needs_nothing(tmp_path: Path) -> None:
    target = tmp_path / "new.img"
    verdict = examine(target)
    assert verdict.allowed and verdict.identity is None and not target.exists()
    with open_target(confirm(verdict)) as opened:
        assert opened.created and opened.saved_table is None
        os.write(opened.fd, b"x")
        assert Path(opened.proc_path).read_bytes() == b"x"
    assert target.read_bytes() == b"x"
    assert target.stat().st_mode & 0o777 == 0o600


def test_an_empty_file_is_free(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert examine(tmp_path / "empty").allowed


def test_a_full_file_needs_overwrite_and_is_not_truncated(tmp_path: Path) -> None:
    target = tmp_path / "full"
    target.write_bytes(b"precious")
    verdict = examine(target)
    assert codes(verdict) == ["not-empty"]
    with pytest.raises(GuardRefused) as refused:
        confirm(verdict)
    assert refused.value.exit_code == 20 and "--overwrite" in (refused.value.hint or "")
    with open_target(confirm(examine(target, overwrite=True))) as opened:
        assert not opened.created
    assert target.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["same", "hard", "soft", "d/../same"])
def test_the_source_by_any_name(tmp_path: Path, name: str) -> None:
    source = tmp_path / "same"
    source.write_bytes(b"source")
    (tmp_path / "d").mkdir()
    os.link(source, tmp_path / "hard")
    (tmp_path / "soft").symlink_to(source)
    verdict = examine(tmp_path / name, source_identities=[identify(source)], overwrite=True)
    assert codes(verdict) == ["source"]
    assert source.read_bytes() == b"source"


def test_inside_the_repository(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    (repository / "packs").mkdir(parents=True)
    (tmp_path / "alias").symlink_to(repository)
    for name in ("repo/new", "repo/packs/new", "alias/packs/new"):
        assert codes(examine(tmp_path / name, repository_path=repository)) == ["repository"], name
    assert examine(tmp_path / "beside", repository_path=repository).allowed
    assert examine(tmp_path / "beside", repository_path=tmp_path / "none yet").allowed


def test_what_is_no_target(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path, tmp_path / "pipe", "/dev/null"):
        assert codes(examine(target)) == ["not-a-target"]
    assert codes(examine(tmp_path / "no" / "folder")) == ["unusable"]
    assert codes(examine(tmp_path / "pipe" / "x")) == ["unusable"]


def test_a_mistyped_device_is_not_made_a_file() -> None:
    if os.stat("/dev").st_dev == os.stat("/").st_dev:
        pytest.skip("/dev is no filesystem of its own here")
    assert codes(examine("/dev/sdzz9")) == ["no-device"]
    assert not os.path.exists("/dev/sdzz9")


def test_a_dangling_link_leads_to_a_new_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert examine(tmp_path / "link").path == str(tmp_path / "elsewhere")


def test_a_file_that_appears_in_between_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "t"
    confirmed = confirm(examine(target))
    target.write_bytes(b"someone else's")
    with pytest.raises(GuardRefused):
        open_target(confirmed)
    assert target.read_bytes() == b"someone else's"


def test_a_file_that_is_swapped_in_between_is_refused(tmp_path: Path) -> None:
    target, other = tmp_path / "t", tmp_path / "o"
    target.write_bytes(b"")
    other.write_bytes(b"")
    confirmed = confirm(examine(target))
    other.rename(target)
    with pytest.raises(GuardRefused, match="not what was examined"):
        open_target(confirmed)


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    target, other = tmp_path / "t", tmp_path / "o"
    target.write_bytes(b"")
    other.write_bytes(b"")
    confirmed = confirm(examine(target))
    target.unlink()
    target.symlink_to(other)
    with pytest.raises(GuardRefused):
        open_target(confirmed)


def test_a_locked_file_is_busy(tmp_path: Path) -> None:
    target = tmp_path / "t"
    with target.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(GuardRefused, match="locked"):
            open_target(confirm(examine(target)))


def test_all_reasons_are_told(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.write_bytes(b"1")
    verdict = examine(source, source_identities=[identify(source)], repository_path=tmp_path)
    assert codes(verdict) == ["source", "not-empty", "repository"]
    with pytest.raises(GuardRefused) as refused:
        verdict.require()
    assert refused.value.message.count(";") == 2


DISK = Identity(
    "disk", "/dev/sdx", "sdx", "wwn:5000c500a1b2c3d4", size=1, serial="WFN0Z9DN", wwn="naa.5000c500a1b2c3d4",
    ptuuid="D9A1C6F8-1111-4222-8333-444455556666", model="ST4000",
)  # fmt: skip
BARE = Identity("loop", "/dev/loop3", "loop3", "file:/x", size=1)
LV = Identity("dm", "/dev/dm-1", "vg-data", "dm:LVM-x", size=1, stack_uuid="LVM-x")


def verdict(identity: Identity) -> Verdict:
    return Verdict(Request(identity.path), identity.path, identity, ())


@pytest.fixture(autouse=True)
def no_clones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_has_clone", lambda identity: False)


@pytest.mark.parametrize(
    ("identity", "given"),
    [
        (DISK, "WFN0Z9DN"),
        (DISK, "naa.5000c500a1b2c3d4"),
        (DISK, "0x5000C500A1B2C3D4"),
        (DISK, "d9a1c6f8-1111-4222-8333-444455556666"),
        (BARE, "loop3"),
        (BARE, "/dev/loop3"),
        (LV, "vg-data"),
        (LV, "LVM-x"),
        (LV, "/dev/dm-1"),
    ],
)
def test_confirm_device(identity: Identity, given: str) -> None:
    assert confirm(verdict(identity), confirm_device=given).verdict.identity == identity


@pytest.mark.parametrize(
    ("identity", "given"),
    [
        (DISK, "/dev/sdx"),
        (DISK, "sdx"),
        (DISK, "Z9DN"),
        (DISK, "yes"),
        (DISK, ""),
        (DISK, "/dev/disk/by-id/none"),
        (BARE, "loop33"),
        (BARE, "loop"),
        (BARE, "/dev/loop4"),
    ],
)
def test_another_device_is_not_confirmed(identity: Identity, given: str) -> None:
    with pytest.raises(NotConfirmed) as refused:
        confirm(verdict(identity), confirm_device=given)
    assert refused.value.exit_code == 21
    assert "--confirm-device" in (refused.value.hint or "")


def test_a_table_uuid_on_two_disks_names_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_has_clone", lambda identity: True)
    with pytest.raises(NotConfirmed):
        confirm(verdict(DISK), confirm_device=DISK.ptuuid)


def test_typed() -> None:
    confirm(verdict(DISK), typed=" z9dn\n")
    confirm(verdict(BARE), typed="loop3")
    for wrong in ("y", "yes", "", "WFN0Z9DN", "sdx", None):
        with pytest.raises(NotConfirmed):
            confirm(verdict(DISK), typed=wrong)


def test_confirmation_never_outweighs_a_reason() -> None:
    bad = Verdict(Request("x"), "/dev/loop3", BARE, (guard.Reason("mounted", "it is mounted"),))
    with pytest.raises(GuardRefused):
        confirm(bad, confirm_device="loop3")
