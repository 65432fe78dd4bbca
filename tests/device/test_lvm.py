"""LVM as its own tools see it, and its used extents. Nothing here needs device-mapper: `--driverloaded n`."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from imager import command
from imager.capture.layout import Volume, read_layout
from imager.device import lvm
from imager.device.loop import attach
from imager.device.window import Window
from imager.extents import Extents
from imager.filesystem import maps
from imager.filesystem.lvm import from_metadata
from imager.filesystem.used import Unknown, Used
from imager.lab import rig
from tests.workbench import MEMORY

MIB = 1 << 20
SIZE = 64 * MIB
KINDS = Path(__file__).parents[2] / "fixtures" / "tool-output" / "lvm-kinds.vg"
IDS = ("000000-0000-0000-0000-0000-0000-000000", "111111-1111-1111-1111-1111-1111-111111")
WITHOUT = rig.without_devices()
TOOLS = ["pvcreate", "vgcreate", "lvcreate", "vgcfgrestore", "pvs", "lvs"]
MISSING = [tool for tool in TOOLS if command.find(tool) is None]

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT)),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]


class Rig:
    """Two devices that LVM may see, and nothing else."""

    def __init__(self, images: list[Path], paths: list[str]) -> None:
        self.images = images
        self.paths = paths
        allowed = ", ".join(f'"a|^{path}$|"' for path in paths)
        self.config = (
            f'devices {{ filter=[{allowed}, "r|.*|"] use_devicesfile=0 }} backup {{ backup=0 archive=0 }}'
            " activation { monitoring=0 } global { use_lvmpolld=0 }"
        )

    def run(self, *argv: str) -> str:
        return command.text([*argv, "--driverloaded", "n", "--config", self.config])

    def report(self, verb: str, fields: str) -> list[dict[str, str]]:
        said = self.run(verb, "--reportformat", "json", "--units", "b", "--nosuffix", "-a", "-o", fields)
        [report] = json.loads(said)["report"]
        rows: list[dict[str, str]] = report[verb.removesuffix("s")]
        return rows


@pytest.fixture
def lvm_rig(tmp_path: Path) -> Iterator[Rig]:
    import tempfile

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, ExitStack() as stack:
        images = [Path(folder) / name for name in ("one", "two")]
        for image in images:
            with image.open("wb") as file:
                file.truncate(SIZE)
        yield Rig(images, [stack.enter_context(attach(image)).path for image in images])


def physical(image: Path) -> lvm.PhysicalVolume:
    with image.open("rb") as file:
        found = lvm.read_physical(Window(file.fileno(), 0, SIZE).read, SIZE)
    assert found is not None
    return found


def used(image: Path) -> Used | Unknown:
    with image.open("rb") as file:
        return maps.used_blocks(file.fileno(), 0, SIZE)


def flush(rig: Rig) -> None:
    for path in rig.paths:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def test_what_lvm_made(lvm_rig: Rig) -> None:
    for path in lvm_rig.paths:
        lvm_rig.run("pvcreate", "-q", "--metadatacopies", "2", path)
    lvm_rig.run("vgcreate", "-q", "-s", "1M", "vg", *lvm_rig.paths)
    chance = random.Random(3)
    for number in range(8):
        striped = ["-i", "2"] if number % 3 == 1 else []
        size = f"{chance.randrange(2, 7)}M"
        lvm_rig.run("lvcreate", "-an", "-Zn", "-y", "-n", f"v{number}", *striped, "-L", size, "vg")
    for number in (2, 4, 5):
        lvm_rig.run("lvremove", "-fq", f"vg/v{number}")
    lvm_rig.run("lvcreate", "-an", "-Zn", "-y", "-n", "scattered", "-L", "20M", "vg")
    flush(lvm_rig)
    theirs: dict[str, Any] = {row["lv_name"]: row for row in lvm_rig.report("lvs", "lv_name,lv_uuid,lv_size")}
    for index, image in enumerate(lvm_rig.images):
        own = lvm_rig.report("pvs", "pv_name,pv_uuid,pe_start,pv_pe_count,pv_pe_alloc_count,pv_mda_count")[
            index
        ]
        found = physical(image)
        assert not found.problems and found.group is not None
        member = found.member()
        assert member is not None
        assert (found.uuid, member.data_at, member.extents) == (
            own["pv_uuid"], int(own["pe_start"]), int(own["pv_pe_count"]),
        )  # fmt: skip
        assert len(found.metadata) == int(own["pv_mda_count"]) == 2
        assert {v.name: (v.uuid, v.size) for v in found.group.volumes} == {
            name: (row["lv_uuid"], int(row["lv_size"])) for name, row in theirs.items()
        }
        answer = used(image)
        assert isinstance(answer, Used)
        area = Extents.of([(member.data_at, member.data_at + member.extents * MIB)])
        assert (answer.extents & area).total == int(own["pv_pe_alloc_count"]) * MIB
        segments = lvm_rig.report("pvs", "pv_name,pvseg_start,pvseg_size,lv_name")
        taken = Extents.of(
            (int(row["pvseg_start"]), int(row["pvseg_start"]) + int(row["pvseg_size"]))
            for row in segments
            if row["pv_name"] == own["pv_name"] and row["lv_name"]
        )
        assert answer.extents & area == Extents.of(
            (member.data_at + a * MIB, member.data_at + b * MIB) for a, b in taken
        )


def test_a_volume_restored_from_used_extents(lvm_rig: Rig) -> None:
    """What LVM says of a volume group is the same when all unused extents hold noise."""
    for path in lvm_rig.paths:
        lvm_rig.run("pvcreate", "-q", "--metadatacopies", "2", path)
    lvm_rig.run("vgcreate", "-q", "-s", "1M", "vg", *lvm_rig.paths)
    lvm_rig.run("lvcreate", "-an", "-Zn", "-y", "-n", "some", "-L", "9M", "vg")
    flush(lvm_rig)
    before = lvm_rig.report("lvs", "lv_name,lv_uuid,lv_size,seg_pe_ranges")
    for image, path in zip(lvm_rig.images, lvm_rig.paths, strict=True):
        answer = used(image)
        assert isinstance(answer, Used)
        with open(path, "r+b") as device:
            for start, end in answer.extents.complement(SIZE):
                device.seek(start)
                device.write(random.Random(start).randbytes(end - start))
    lvm_rig.run("vgck", "vg")
    assert lvm_rig.report("lvs", "lv_name,lv_uuid,lv_size,seg_pe_ranges") == before


def test_every_kind_by_vgcfgrestore(lvm_rig: Rig) -> None:
    """LVM itself takes the golden text, and counts the same extents."""
    for path, uuid in zip(lvm_rig.paths, IDS, strict=True):
        lvm_rig.run("pvcreate", "-q", "-ff", "-y", "--uuid", uuid, "--norestorefile", path)
    lvm_rig.run("vgcfgrestore", "--force", "-f", str(KINDS), "kinds")
    flush(lvm_rig)
    rows = lvm_rig.report("lvs", "lv_name,segtype")
    own = lvm_rig.report("pvs", "pv_pe_alloc_count")
    for index, image in enumerate(lvm_rig.images):
        found = physical(image)
        assert found.group is not None and not found.problems
        kinds = {volume.name: volume.kind for volume in found.group.volumes}
        assert kinds == {row["lv_name"].strip("[]"): row["segtype"] for row in rows}
        answer = used(image)
        member = found.member()
        assert isinstance(answer, Used) and member is not None
        area = Extents.of([(member.data_at, member.data_at + member.extents * MIB)])
        assert (answer.extents & area).total == int(own[index]["pv_pe_alloc_count"]) * MIB


def _layout(image: Path) -> Volume:
    with image.open("rb") as file:
        [volume] = read_layout(file.fileno(), SIZE, None, maps=True, look=True).volumes
    return volume


def test_what_logical_volumes_hold(lvm_rig: Rig) -> None:
    for path, uuid in zip(lvm_rig.paths, IDS, strict=True):
        lvm_rig.run("pvcreate", "-q", "-ff", "-y", "--uuid", uuid, "--norestorefile", path)
    lvm_rig.run("vgcfgrestore", "--force", "-f", str(KINDS), "kinds")
    flush(lvm_rig)
    inner = lvm_rig.images[0].with_name("inner")
    with inner.open("wb") as file:
        file.truncate(12 * MIB)
    command.run(["mkfs.ext4", "-q", "-F", "-L", "in pieces", str(inner)])
    content = inner.read_bytes()
    with open(lvm_rig.paths[0], "r+b") as device:  # root: 8 extents from 0, 4 from 20
        device.seek(MIB)
        device.write(content[: 8 * MIB])
        device.seek(21 * MIB)
        device.write(content[8 * MIB :])
    flush(lvm_rig)
    volume = _layout(lvm_rig.images[0])
    assert volume.kind == "LVM2_member" and volume.used is not None and not volume.problems
    found = {one.name: one for one in volume.volumes}
    assert set(found) == {f"kinds/{name}" for name in ("root", "fast", "safe", "old", "pool", "home")}
    root = found["kinds/root"]
    assert root.kind == "ext4" and root.filesystem is not None and root.filesystem.label == "in pieces"
    assert root.start is None and root.size == 12 * MIB
    assert "thin" in found["kinds/home"].why


# --- what is not believed ---------------------------------------------------------------


def reason(image: Path) -> str:
    answer = used(image)
    assert isinstance(answer, Unknown), answer
    return answer.reason


def test_doubts(lvm_rig: Rig) -> None:
    image, path = lvm_rig.images[0], lvm_rig.paths[0]
    lvm_rig.run("pvcreate", "-q", path)
    flush(lvm_rig)
    assert "no volume group" in reason(image)
    lvm_rig.run("vgcreate", "-q", "vg", path)
    flush(lvm_rig)
    whole = image.read_bytes()
    header = 4096

    def with_header(at: int, value: bytes) -> str:
        raw = bytearray(whole)
        raw[header + at : header + at + len(value)] = value
        struct.pack_into("<I", raw, header, lvm.checksum(bytes(raw[header + 4 : header + 512])))
        image.write_bytes(raw)
        return reason(image)

    assert "ignored" in with_header(60, struct.pack("<I", 1))
    assert "not committed" in with_header(64, struct.pack("<QQ", 1024, 10))
    assert "outside" in with_header(40, struct.pack("<Q", 1 << 60))
    assert "outside" in with_header(48, struct.pack("<Q", 1 << 60))
    raw = bytearray(whole)
    raw[header + 30] ^= 1
    image.write_bytes(raw)
    assert "damaged header" in reason(image)
    raw = bytearray(whole)
    offset = struct.unpack_from("<Q", raw, header + 40)[0]
    raw[header + offset + 5] ^= 1
    image.write_bytes(raw)
    assert "wrong checksum" in reason(image)


def test_unknown_segments() -> None:
    group = lvm.parse_group(KINDS.read_text().replace('type = "thin-pool"', 'type = "new-kind"'))
    volume = lvm.PhysicalVolume(IDS[0], SIZE, (), (), (), group, "pv0", "")
    answer = from_metadata(volume, SIZE)
    assert isinstance(answer, Unknown) and "new-kind" in answer.reason
