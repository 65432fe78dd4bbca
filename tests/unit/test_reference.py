"""The reference reader reads what the format page describes, and nothing else.

The repositories come from `tests/reference_writer.py`, so no part of the tool
itself takes part.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from imager import reference
from imager.reference import Config, Damaged, NoRepository, Repository, Secrets, UsageError, WrongKey
from tests import reference_vectors
from tests import reference_writer as w

KEYFILE = bytes(range(64))
RECOVERY = bytes(range(20))
PASSPHRASE = "na\u0308ive"  # not in NFC
SEALED = (("passphrase", PASSPHRASE.encode()), ("keyfile", KEYFILE))


def content(seed: int, blocks: int = 40, block_size: int = 4096, tail: int = 0) -> bytes:
    """Random blocks, repetitive blocks and zero blocks."""
    rng = random.Random(seed)
    parts = [
        rng.choice([bytes(block_size), rng.randbytes(block_size), rng.randbytes(16) * (block_size // 16)])
        for _ in range(blocks)
    ]
    return b"".join(parts) + rng.randbytes(tail)


def read_all(repository: Repository, text: str) -> dict[str, dict[int, bytes]]:
    """The blocks of every disk of a set."""
    images = repository.images(repository.resolve(text))
    return {image.disk: dict(repository.blocks(image)) for image in images}


def run(
    root: Path, text: str, out: Path, *more: str, environ: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run the command as a person does: its exit code and standard error."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("IMAGER_")}
    line = [sys.executable, "-m", "imager.reference", str(root), text, str(out), *more]
    done = subprocess.run(line, env=clean | (environ or {}), capture_output=True, text=True, timeout=60)
    assert done.stdout == ""
    return done.returncode, done.stderr


# The reader by itself -------------------------------------------------------------------------------


def test_imports_nothing_else_of_the_project() -> None:
    """Reading needs no native code, and nothing that the page does not name."""
    line = "import sys, imager.reference; print(*sorted(m for m in sys.modules if m.startswith('imager')))"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["imager", "imager.reference"]


@pytest.mark.parametrize("codec", [w.STORED, w.LZ4, w.ZSTD])
@pytest.mark.parametrize(
    ("slots", "cipher"),
    [((), w.AES), (SEALED[:1], w.AES), (SEALED[1:], w.CHACHA), ((("recovery", RECOVERY),), w.AES)],
)
def test_reads_back(tmp_path: Path, codec: int, slots: tuple[tuple[str, bytes], ...], cipher: int) -> None:
    data, later = content(1, tail=100), bytearray(content(1, tail=100))
    later[10_000:10_010] = b"0123456789"
    writer = w.Writer(tmp_path / "r", *slots)
    one = writer.write_set("d", [w.Disk.of(data)], codec=codec, cipher=cipher)
    two = writer.write_set("d", [w.Disk.of(bytes(later))], codec=codec, cipher=cipher, pack_bytes=1)
    repository = Repository(str(tmp_path / "r"), PASSPHRASE, KEYFILE, RECOVERY)
    for text, expected in ((one, data), (two, bytes(later)), ("d", bytes(later)), ("latest", bytes(later))):
        manifest = repository.resolve(text)
        out = tmp_path / f"{text}.img"
        reference.write_image(repository, repository.images(manifest)[0], str(out))
        assert out.read_bytes() == expected


def test_deep_map_and_small_packs(tmp_path: Path) -> None:
    """Two levels above the leaves, pages in many packs, all kinds of runs, several disks in a set."""
    rng = random.Random(2)
    numbers = [0, 1, 255, 256, 65535, 65536, 70000, (1 << 24) - 1]
    size = 1 << 36
    blocks = {number: rng.randbytes(4096) for number in numbers}
    unused = frozenset(range(300, 1000)) | frozenset(range(131072, 131072 + 65536)) | {2}
    big = w.Disk("big", size, 4096, blocks, unused, frozenset({3, 4, 65537}))
    small, empty = w.Disk.of(content(3, 3, tail=1), "small"), w.Disk("empty", 0, 65536, {})
    zero = w.Disk("zero", 5 << 20, 65536, {})
    for slots, limit in (((), 1), (SEALED, 9000), (SEALED, 1 << 20)):
        root = tmp_path / f"{len(slots)}-{limit}"
        set_id = w.Writer(root, *slots).write_set("m", [big, small, empty, zero], pack_bytes=limit)
        got = read_all(Repository(str(root), PASSPHRASE), set_id)
        assert got["big"] == {number * 4096: part for number, part in blocks.items()}
        assert got["small"] == {number * 4096: part for number, part in small.blocks.items()}
        assert got["empty"] == got["zero"] == {}
        assert [i.unreadable for i in Repository(str(root), None, KEYFILE).images(
            Repository(str(root), None, KEYFILE).resolve("m"))] == [3 * 4096, 0, 0, 0]  # fmt: skip


def test_self_references_are_written(tmp_path: Path) -> None:
    """The writer does make pages that refer to their own pack: a test of the test."""
    writer = w.Writer(tmp_path)
    writer.write_set("d", [w.Disk.of(content(4, 600))])
    (pack,) = (tmp_path / "maps").rglob("*/*")
    assert w.SELF in pack.read_bytes()[80:]


def test_output_is_sparse(tmp_path: Path) -> None:
    w.Writer(tmp_path / "r").write_set("d", [w.Disk("d", 1 << 30, 4096, {200_000: b"x" * 4096})])
    code, _ = run(tmp_path / "r", "d", tmp_path / "out")
    status = (tmp_path / "out").stat()
    assert (code, status.st_size) == (0, 1 << 30)
    assert status.st_blocks * 512 <= 64 << 10


# Sets, keys, exit codes -----------------------------------------------------------------------------


def test_names_of_sets(tmp_path: Path) -> None:
    writer = w.Writer(tmp_path)
    first = writer.write_set("a", [w.Disk.of(b"1" * 4096)])
    second = writer.write_set("a", [w.Disk.of(b"2" * 4096)])
    third = writer.write_set("b", [w.Disk.of(b"3" * 4096)])
    aborted = writer.abort()
    repository = Repository(str(tmp_path))
    known = {"a": second, "b": third, "latest": third, first: first, first[:8]: first, third[:9]: third}
    for text, expected in known.items():
        assert repository.resolve(text).set.hex() == expected
    for text in ("", "c", "0" * 32, aborted, aborted[:12], "A", first.upper(), "../config"):
        with pytest.raises(UsageError):
            repository.resolve(text)
    for n in range(40):
        writer.write_set(f"more{n}", [])
    with pytest.raises(UsageError, match="several"):  # 43 sets: two begin with the same digit
        digits = [entry.name[0] for entry in (tmp_path / "sets").iterdir()]
        repository.resolve(max(set(digits) - {"a", "b"}, key=digits.count))


def test_a_damaged_set_hides_no_later_one(tmp_path: Path) -> None:
    """`latest` is not quietly an older set because the newest cannot be read."""
    writer = w.Writer(tmp_path)
    first, second = (writer.write_set("a", [w.Disk.of(part * 4096)]) for part in (b"1", b"2"))
    flip(tmp_path / "sets" / second, 40)
    repository = Repository(str(tmp_path))
    for text in ("latest", "a", second):
        with pytest.raises(Damaged, match=second):
            repository.resolve(text)
    assert repository.resolve(first).set.hex() == first


def test_keys(tmp_path: Path) -> None:
    writer = w.Writer(tmp_path / "r", *SEALED)
    writer.write_set("old", [w.Disk.of(b"1" * 4096)])
    writer.add_slot("keyfile", b"W" * 32, role="write")
    (tmp_path / "key").write_bytes(KEYFILE)
    (tmp_path / "write").write_bytes(b"W" * 32)
    (tmp_path / "short").write_bytes(b"W" * 31)
    for code, environ in (
        (0, {"IMAGER_PASSPHRASE": PASSPHRASE}),
        (0, {"IMAGER_PASSPHRASE": "n\u00e4ive"}),  # the same in NFC
        (0, {"IMAGER_KEYFILE": str(tmp_path / "key")}),
        (0, {"IMAGER_KEYFILE": str(tmp_path / "key"), "IMAGER_PASSPHRASE": "wrong"}),
        (12, {}),
        (12, {"IMAGER_PASSPHRASE": ""}),
        (12, {"IMAGER_PASSPHRASE": "wrong"}),
        (12, {"IMAGER_KEYFILE": str(tmp_path / "write")}),  # opens, and cannot read
        (2, {"IMAGER_KEYFILE": str(tmp_path / "short")}),
        (1, {"IMAGER_KEYFILE": str(tmp_path / "absent")}),
    ):
        out = tmp_path / "out"
        out.unlink(missing_ok=True)
        found, error = run(tmp_path / "r", "old", out, environ=environ)
        assert (found, error.count("\n")) == (code, 1), error
        assert out.exists() == (code == 0)
        assert code == 0 or error.startswith("error: ")


def test_a_key_of_an_old_epoch(tmp_path: Path) -> None:
    """A slot that was made before an epoch began does not open what was written in it, and one after does."""
    writer = w.Writer(tmp_path, ("keyfile", b"1" * 32))
    old = writer.write_set("a", [w.Disk.of(b"1" * 4096)])
    writer.add_epoch()
    writer.add_slot("keyfile", b"2" * 32)
    new = writer.write_set("b", [w.Disk.of(b"1" * 4096 + b"2" * 4096)])  # its first block is of the old epoch
    with pytest.raises(WrongKey, match="epoch 2"):
        read_all(Repository(str(tmp_path), None, b"1" * 32), new)
    assert read_all(Repository(str(tmp_path), None, b"1" * 32), old)["disk"] == {0: b"1" * 4096}
    assert len(read_all(Repository(str(tmp_path), None, b"2" * 32), new)["disk"]) == 2


def test_command_line(tmp_path: Path) -> None:
    writer = w.Writer(tmp_path / "r")
    writer.write_set("two", [w.Disk.of(b"1" * 4096, "sda"), w.Disk.of(b"2" * 4096, "sdb")])
    assert run(tmp_path / "r", "two", tmp_path / "out", "--disk", "sdb")[0] == 0
    assert (tmp_path / "out").read_bytes() == b"2" * 4096
    for code, arguments in (
        (2, (tmp_path / "r", "two", tmp_path / "new")),  # which disk?
        (2, (tmp_path / "r", "two", tmp_path / "new", "--disk", "sdc")),
        (2, (tmp_path / "r", "three", tmp_path / "new")),
        (2, (tmp_path / "r", "two", tmp_path / "new", "--nonsense")),
        (2, (tmp_path / "r", "two", tmp_path / "out", "--disk", "sda")),  # exists
        (10, (tmp_path, "two", tmp_path / "new")),
        (10, (tmp_path / "absent", "two", tmp_path / "new")),
        (1, (tmp_path / "r", "two", tmp_path / "absent" / "new", "--disk", "sda")),
    ):
        root, text, out, *more = arguments
        found, error = run(Path(root), str(text), Path(out), *map(str, more))
        assert (found, error.count("\n"), error[:7]) == (code, 1, "error: "), error
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "out").read_bytes() == b"2" * 4096
    flip(next((tmp_path / "r/packs").rglob("*/*")), 80)
    found, error = run(tmp_path / "r", "two", tmp_path / "new", "--disk", "sda")
    assert (found, error.count("\n")) == (30, 1) and "is lost" in error
    assert not (tmp_path / "new").exists()


def test_zstandard_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w.Writer(tmp_path).write_set("d", [w.Disk.of(b"1" * 4096)], codec=w.ZSTD)
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(reference.ReadError, match="install the package 'zstandard'") as caught:
        read_all(Repository(str(tmp_path)), "d")
    assert caught.value.code == 1


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    """Versions and features of the future: exit code 10, not damage."""
    writer = w.Writer(tmp_path)
    path = tmp_path / "config"
    obj = json.loads(path.read_bytes())
    del obj["seal"]
    good = path.read_bytes()
    for change in ({"version": 2}, {"format": "other"}, {"features": {"read": ["patch"], "write": []}}):
        path.write_bytes(w.seal_config(obj | change, None))
        with pytest.raises(NoRepository):
            Repository(str(tmp_path))
    path.write_bytes(w.seal_config(obj | {"features": {"read": [], "write": ["x"]}, "comment": "y"}, None))
    Repository(str(tmp_path))  # what only a writer must know, and keys of no consequence
    path.write_bytes(good)
    set_id = writer.write_set("d", [])
    public = Repository(str(tmp_path)).resolve(set_id).public
    body = Repository(str(tmp_path)).resolve(set_id).body
    for more in ({"version": 2}, {"features": ["patch"]}):
        (tmp_path / "sets" / set_id).write_bytes(w.manifest(public | more, body, None))
        with pytest.raises(NoRepository):
            Repository(str(tmp_path)).resolve(set_id)


# Damage ---------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def replace_by_folder(path: Path) -> None:
    """Put a folder where the file was."""
    path.unlink()
    path.mkdir()


def damages(path: Path, others: list[Path], rng: random.Random) -> list[tuple[str, Callable[[], object]]]:
    """Ways to damage a file."""
    data = path.read_bytes()
    cut = rng.randrange(len(data))
    made: list[tuple[str, Callable[[], object]]] = [
        ("missing", path.unlink),
        ("empty", lambda: path.write_bytes(b"")),
        ("cut", lambda: path.write_bytes(data[:cut])),
        ("cut by one", lambda: path.write_bytes(data[:-1])),
        ("longer", lambda: path.write_bytes(data + b"\0")),
        ("garbage", lambda: path.write_bytes(rng.randbytes(len(data)))),
        ("a folder", partial(replace_by_folder, path)),
    ]
    made += [(f"swapped with {other}", partial(path.write_bytes, other.read_bytes())) for other in others]
    for at in {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(6))}:
        made.append((f"bit at {at}", partial(flip, path, at)))
    return made


@pytest.mark.parametrize("slots", [(), SEALED[1:]], ids=["none", "sealed"])
def test_damage_is_never_read_as_good(tmp_path: Path, slots: tuple[tuple[str, bytes], ...]) -> None:
    """Every object, damaged in every way: the image is read exactly, or the reader says what is wrong."""
    root, rng = tmp_path / "r", random.Random(5)
    data = content(6, 12)
    writer = w.Writer(root, *slots)
    writer.write_set("old", [w.Disk.of(content(7, 8))])
    set_id = writer.write_set("d", [w.Disk.of(data)], pack_bytes=9000)
    needed = ("config", "sets", "packs", "maps", "slots")
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    harmed: set[str] = set()
    for path in paths:
        kind = path.relative_to(root).parts[0]
        others = [o for o in paths if o != path and o.relative_to(root).parts[0] == kind][:2]
        good = path.read_bytes()
        for _, damage in damages(path, others, rng):
            damage()
            try:
                got = read_all(Repository(str(root), None, KEYFILE), set_id)["disk"]
            except reference.ReadError as error:
                assert kind in needed
                assert error.code in (30, 12, 10, 2)
                harmed.add(kind)
            else:
                assert all(data[at : at + len(part)] == part for at, part in got.items())
                assert sum(map(len, got.values())) == len(w.Disk.of(data).blocks) * 4096
            if path.is_dir():
                path.rmdir()
            path.write_bytes(good)
    assert harmed == {kind for kind in needed if slots or kind != "slots"}
    assert read_all(Repository(str(root), None, KEYFILE), set_id)


def test_replayed_and_foreign_objects(tmp_path: Path) -> None:
    """A set, a slot, a config of another place are refused, though each is whole in its own."""
    roots = [tmp_path / "1", tmp_path / "2"]
    writers = [w.Writer(root, ("keyfile", KEYFILE), seed=n) for n, root in enumerate(roots)]
    sets = [writer.write_set("d", [w.Disk.of(b"1" * 4096)]) for writer in writers]
    older = writers[0].write_set("d", [w.Disk.of(b"2" * 4096)])
    good = (roots[0] / "sets" / sets[0]).read_bytes()
    (roots[0] / "sets" / sets[0]).write_bytes((roots[0] / "sets" / older).read_bytes())
    with pytest.raises(Damaged, match="of another place"):
        Repository(str(roots[0]), None, KEYFILE).resolve(sets[0])
    (roots[0] / "sets" / sets[0]).write_bytes(good)
    shutil.copy(roots[1] / "sets" / sets[1], roots[0] / "sets" / sets[1])
    with pytest.raises(Damaged, match="do not fit"):
        Repository(str(roots[0]), None, KEYFILE).resolve(sets[1])
    # A config that is whole, signed by a stranger's key, over this repository's own slots.
    obj = json.loads((roots[0] / "config").read_bytes())
    del obj["seal"]
    obj["verify_key"] = w.public_of(b"x" * 32).hex()
    (roots[0] / "config").write_bytes(w.seal_config(obj, b"x" * 32))
    with pytest.raises(Damaged, match="verify_key"):
        Repository(str(roots[0]), None, KEYFILE)


def move(writer: w.Writer, kind: int, pack: Path, *, keep: bool = False) -> Path:
    """Do what a prune does: put a pack's records, in another order, into a new one, and delete the old."""
    data = pack.read_bytes()
    header = data[: reference.header_length(data[:64])]
    envelopes = reference.parse_header(header, kind, writer.repository)
    start = int.from_bytes(data[-16:-8], "little")
    listed = reference.parse_trailer(header, data[start:], bytes.fromhex(pack.name))
    records = [data[at : at + 64 + head.payload_length] for at, head, _ in reversed(listed)]
    name, new = w.pack(w.pack_header(kind, writer.repository, bytes(16), 0, envelopes), records)
    if not keep:
        pack.unlink()
    folder = "packs" if kind == w.BLOCK else "maps"
    writer.put(f"{folder}/{name.hex()[:2]}/{name.hex()}", new)
    return writer.root / folder / name.hex()[:2] / name.hex()


@pytest.mark.parametrize("slots", [(), SEALED[1:]], ids=["none", "sealed"])
def test_location_is_a_hint(tmp_path: Path, slots: tuple[tuple[str, bytes], ...]) -> None:
    """Records that a prune has moved are found by their ids, pages with self references too."""
    writer, disk = w.Writer(tmp_path, *slots), w.Disk.of(content(8, 600))
    set_id = writer.write_set("d", [disk], pack_bytes=200_000)
    for kind, folder in ((w.BLOCK, "packs"), (w.PAGE, "maps")):
        for pack in list((tmp_path / folder).rglob("*/*")):
            move(writer, kind, pack)
        got = read_all(Repository(str(tmp_path), None, KEYFILE), set_id)["disk"]
        assert got == {n * 4096: part for n, part in disk.blocks.items()}


def test_another_copy_serves(tmp_path: Path) -> None:
    """A damaged record is read from another pack that has it whole; without one, it is named."""
    writer = w.Writer(tmp_path)
    set_id = writer.write_set("d", [w.Disk.of(b"1" * 4096 + b"2" * 4096)])
    (pack,) = (tmp_path / "packs").rglob("*/*")
    copy = move(writer, w.BLOCK, pack, keep=True)
    flip(pack, 72 + 70)
    assert len(read_all(Repository(str(tmp_path)), set_id)["disk"]) == 2
    copy.unlink()
    with pytest.raises(Damaged, match=f"block [0-9a-f]* is lost: pack {pack.name} at 72"):
        read_all(Repository(str(tmp_path)), set_id)


# Vectors --------------------------------------------------------------------------------------------


def test_vectors_are_current() -> None:
    assert reference_vectors.FILE.read_text(encoding="utf-8") == reference_vectors.render()


def test_reader_agrees_with_the_vectors() -> None:
    vectors = json.loads(reference_vectors.FILE.read_text(encoding="utf-8"))
    secret, hexed = vectors["secrets"], bytes.fromhex
    config = reference.parse_config(hexed(secret["config"]["sealed"]))
    plain = reference.parse_config(hexed(secret["config"]["none"]))
    assert plain == Config(config.repository, False, 65536, hexed(secret["config"]["id_key"]))
    full = Secrets(hexed(secret["config"]["id_key"]), {1: hexed(secret["epoch"]["private"])})
    for one in secret["slots"]:
        key = hexed(one["secret"])
        opened = reference.open_slot(hexed(one["file"]), hexed(one["slot"]), config, key, key, key)
        assert opened == (full if one["role"] != "write" else Secrets(full.id_key, {}))
    recovery = secret["recovery_key"]
    assert reference.parse_recovery_key(recovery["text"]) == hexed(recovery["key"])
    revocation, writer = hexed(secret["writer"]["revocation"]), reference_vectors.WRITER
    kept = reference.parse_revocation(revocation, writer, config)
    assert kept == {bytes(range(3, 35)), bytes(range(4, 36))}
    for one in secret["envelopes"]:
        opened_key = reference.open_envelope(hexed(one["envelope"]), config, full)
        assert opened_key == (one["cipher"], hexed(one["session_key"]), hexed(one["session"]))
    for one in vectors["records"]:
        head = reference.parse_head(hexed(one["head"]))
        assert (head.id.hex(), head.plain_length) == (one["id"], one["plain_length"])
        if one["codec"] == w.LZ4:
            assert len(reference.decode(head.codec, hexed(one["coded"]), head.plain_length)) == 512
    for one in vectors["packs"]:
        envelopes = reference.parse_header(hexed(one["header"]), one["kind"], config.repository)
        assert [e.hex() for e in envelopes] == one["envelopes"]
        tail = hexed(one["trailer_and_footer"])
        listed = reference.parse_trailer(hexed(one["header"]), tail, hexed(one["name"]))
        assert len(listed) == len(one["records"])
    for one in vectors["pages"]:
        public, sealed, slots = hexed(one["public"]), hexed(one["sealed"]), len(one["slots"])
        runs = reference.parse_page(public, sealed, one["level"], one["first"], slots, b"\7" * 32)
        assert sum(length for length, _ in runs) == slots
    for one in vectors["manifests"]:
        where = config if one["signing_seed"] else plain
        manifest = reference.parse_manifest(hexed(one["file"]), reference_vectors.SESSION, where)
        assert reference.open_body(manifest, where, full) == {"name": "db", "host": "höst"}
