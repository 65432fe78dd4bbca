"""The damage table: what is done to which object, who tells of it, and what it costs. Data only.

Each row: the object (and the part of it), what happens to it, the kind of problem that
`check --read-data` names, whether `check` alone finds it too, and the cost. Costs:

    nothing      every set can still be restored, bit for bit
    record       the blocks whose one record was hit, in every set that shares it
    rest         the records of the second half of the pack
    pack         all records of the pack
    both         all records of two packs that were exchanged
    page         the blocks below one map page
    pages        the blocks below every page of the map pack
    set          the image set as a whole; the others are not touched
    two sets     both sets that were exchanged
    gone         the set is not there any more; the others are not touched
    all 10       the repository does not open; every command ends with this code
    all 12
    all 30
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from imager import reference
from imager.repository import keys
from imager.repository.format import canonical, now
from tests.damage import workshop
from tests.damage.workshop import (
    Place,
    World,
    flipped,
    pack_path,
    patched,
    trailer_at,
    with_footer_sum,
    with_head_sum,
    with_header_sum,
    write,
)

HUGE = b"\xff\xff\xff\xff"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `only`: for sealed repositories, or for those without encryption."""

    thing: str
    damage: str
    kind: str
    quick: bool
    cost: str
    do: Callable[[Place, World], None]
    only: str = ""

    def __str__(self) -> str:
        return f"{self.thing}: {self.damage}".replace(" ", "-")


# --- what can be done to any object --------------------------------------------------------

Find = Callable[[Place, World], Path]
Do = Callable[[Place, World], None]


def missing(find: Find) -> Do:
    return lambda place, world: find(place, world).unlink()


def changed(find: Find, change: Callable[[bytes], bytes]) -> Do:
    def do(place: Place, world: World) -> None:
        path = find(place, world)
        old = path.read_bytes()
        new = change(old)
        assert new != old
        write(path, new)

    return do


def garbage(data: bytes) -> bytes:
    """As many bytes that mean nothing, the same in every run."""
    return hashlib.shake_128(b"garbage").digest(len(data))


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(data: bytes) -> bytes:
    return b""


def longer(data: bytes) -> bytes:
    return data + b"\0"


def flip(at: float) -> Callable[[bytes], bytes]:
    """Turn a bit at a share of the length."""
    return lambda data: flipped(data, int(at * (len(data) - 1)), 1)


def exchanged(one: Find, other: Find) -> Do:
    def do(place: Place, world: World) -> None:
        a, b = one(place, world), other(place, world)
        first, second = a.read_bytes(), b.read_bytes()
        write(a, second)
        write(b, first)

    return do


def replayed(newer: Find, older: Find) -> Do:
    """The older object's bytes in the newer one's place."""
    return lambda place, world: write(newer(place, world), older(place, world).read_bytes())


# --- which object ---------------------------------------------------------------------------


def named(folder: str, name: str) -> Find:
    return lambda place, world: place.root / folder / world.sets[name]


def pack(name: str, number: int = 0) -> Find:
    return lambda place, world: pack_path(place.root, "packs", world.packs[name][number])


def map_pack(name: str, number: int = 0) -> Find:
    return lambda place, world: pack_path(place.root, "maps", world.maps[name][number])


def segment(name: str) -> Find:
    return lambda place, world: place.root / "index" / world.index[name][0]


def config(place: Place, world: World) -> Path:
    return place.root / "config"


def slot(place: Place, world: World) -> Path:
    return place.files("slots")[0]


def epoch(place: Place, world: World) -> Path:
    return place.root / "epochs" / "00000001"


def twin(place: Place) -> Place:
    """Another repository of the same keyfile."""
    other = Place(place.folder / "twin")
    if not other.folder.exists():
        other.folder.mkdir()
        shutil.copy(place.folder / "key", other.folder / "key")
        encryption = "keyfile" if (place.root / "epochs" / "00000001").exists() else "none"
        assert other.imager("init", other.root, "--encryption", encryption).code == 0
    return other


def foreign(find: Find) -> Do:
    """The same object of another repository in its place."""
    return lambda place, world: write(find(place, world), find(twin(place), world).read_bytes())


def second_slot(then: Callable[[Path], None]) -> Do:
    """A second way in, which is damaged: the first one still opens."""

    def do(place: Place, world: World) -> None:
        opened = place.reference()
        raw = (place.root / "slots").iterdir().__next__().read_bytes()
        secret = keys.Secret("keyfile", (place.folder / "key").read_bytes())
        slot_id = next((place.root / "slots").iterdir()).name
        secrets = keys.open_slot(keys.parse_slot(raw, slot_id, opened.config.repository), secret)
        assert secrets is not None
        name, content = keys.new_slot(
            opened.config.repository, secrets, keys.keyfile(bytes(range(64))), label="another"
        )
        path = place.root / "slots" / name
        path.write_bytes(content)
        then(path)

    return do


# --- parts of packs ---------------------------------------------------------------------------

RECORD = 4
"Which record of a data pack is hit."


def record_at(data: bytes, number: int = RECORD) -> int:
    """Offset of a record, by the heads before it."""
    at = workshop.header_length(data)
    for _ in range(number):
        at += workshop.HEAD + int.from_bytes(data[at + 12 : at + 16], "little")
    return at


def leaf_at(data: bytes) -> int:
    """Offset of the first record of a map pack: a leaf, for leaves are written first."""
    return workshop.header_length(data)


def leaf_public(data: bytes) -> bytes:
    return flipped(data, leaf_at(data) + workshop.HEAD + 4 + 8 + 3)


def leaf_sealed(data: bytes) -> bytes:
    at = leaf_at(data)
    public = int.from_bytes(data[at + 64 : at + 68], "little")
    return flipped(data, at + 64 + 4 + public + 5)


def huge_public(data: bytes) -> bytes:
    return patched(data, leaf_at(data) + workshop.HEAD, HUGE)


def huge_header(data: bytes) -> bytes:
    return with_header_sum(patched(data, 12, HUGE))


def many_envelopes(data: bytes) -> bytes:
    return patched(patched(data, 12, (72 + 104 * 1024).to_bytes(4, "little")), 56, b"\0\4")


def huge_payload(at: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    return lambda data: with_head_sum(patched(data, at(data) + 12, HUGE), at(data))


def huge_plain(at: Callable[[bytes], int]) -> Callable[[bytes], bytes]:
    return lambda data: with_head_sum(patched(data, at(data) + 8, HUGE), at(data))


def huge_trailer(data: bytes) -> bytes:
    return with_footer_sum(patched(data, len(data) - 24, HUGE))


def far_trailer(data: bytes) -> bytes:
    return with_footer_sum(patched(data, len(data) - 16, HUGE + HUGE))


# --- manifests -----------------------------------------------------------------------------------


def in_public(data: bytes) -> bytes:
    """A digit of the creation time: it still is canonical JSON."""
    at = data.index(b'"created":') + 12
    return patched(data, at, b"1" if data[at : at + 1] != b"1" else b"2")


def in_frame(data: bytes) -> bytes:
    return flipped(data, 9)


def in_body(data: bytes) -> bytes:
    return flipped(data, 16 + int.from_bytes(data[8:12], "little") + 20)


def in_signature(data: bytes) -> bytes:
    return flipped(data, len(data) - 60)


def huge_lengths(data: bytes) -> bytes:
    return patched(data, 8, HUGE + HUGE)


def abort_mark(place: Place, world: World) -> None:
    """A healthy set is called dead: marks carry no signature."""
    path = named("sets", "third")(place, world)
    write(path, b"IMGRABRT" + canonical({"session": path.name, "created": now(), "reason": "none"}))


def rolled_back(place: Place, world: World) -> None:
    """The whole repository as it was before the third set."""
    for path in (named("sets", "third"), named("sessions", "third")):
        path(place, world).unlink()
    for name in world.packs["third"]:
        pack_path(place.root, "packs", name).unlink()
    for name in world.maps["third"]:
        pack_path(place.root, "maps", name).unlink()
    for name in world.index["third"]:
        (place.root / "index" / name).unlink()


def shifted_config(data: bytes) -> bytes:
    at = data.index(b'"created":') + 12
    return patched(data, at, b"1" if data[at : at + 1] != b"1" else b"2")


def future(data: bytes) -> bytes:
    return data.replace(b'"version":1', b'"version":2')


def no_format(data: bytes) -> bytes:
    return data.replace(b'"format":"imager"', b'"format":"imagez"')


def in_sealed(data: bytes) -> bytes:
    """A digit of the slot's sealed secrets."""
    at = data.index(b'"sealed":"') + 30
    return patched(data, at, b"1" if data[at : at + 1] != b"1" else b"2")


def other_kind(data: bytes) -> bytes:
    """A slot that asks for a passphrase, where a keyfile is given."""
    return data.replace(b'"kind":"keyfile"', b'"kind":"recovery"')


# --- the table -------------------------------------------------------------------------------------

M, D = map_pack("first"), pack("first")
THIRD = named("sets", "third")
SECOND = named("sets", "second")

# fmt: off
TABLE: tuple[Row, ...] = (
    #   object                  damage                           kind      check? cost
    Row("config",               "missing",                       "",        True, "all 10", missing(config)),
    Row("config",               "empty",                         "",        True, "all 30", changed(config, empty)),
    Row("config",               "truncated",                     "",        True, "all 30", changed(config, half)),
    Row("config",               "a digit changed",               "",        True, "all 30", changed(config, shifted_config)),
    Row("config",               "bit flipped",                   "",        True, "all 30", changed(config, flip(0.5))),
    Row("config",               "garbage",                       "",        True, "all 30", changed(config, garbage)),
    Row("config",               "of a future version",           "",        True, "all 10", changed(config, future)),
    Row("config",               "of another format",             "",        True, "all 10", changed(config, no_format)),
    Row("config",               "of another repository",         "",        True, "all 30", foreign(config), only="sealed"),

    Row("slot",                 "missing",                       "",        True, "all 30", missing(slot), only="sealed"),
    Row("slot",                 "empty",                         "",        True, "all 30", changed(slot, empty), only="sealed"),
    Row("slot",                 "truncated",                     "",        True, "all 30", changed(slot, half), only="sealed"),
    Row("slot",                 "bit flipped",                   "",        True, "all 12", changed(slot, in_sealed), only="sealed"),
    Row("slot",                 "garbage",                       "",        True, "all 30", changed(slot, garbage), only="sealed"),
    Row("slot",                 "of another kind",               "",        True, "all 12", changed(slot, other_kind), only="sealed"),
    Row("slot",                 "of another repository",         "",        True, "all 30",
        lambda place, world: write(slot(place, world), slot(twin(place), world).read_bytes()), only="sealed"),
    Row("second slot",          "truncated",                     "slot",    True, "nothing",
        second_slot(lambda path: write(path, half(path.read_bytes()))), only="sealed"),
    Row("second slot",          "has the content of the first",  "slot",    True, "nothing",
        second_slot(lambda path: write(path, next(p for p in path.parent.iterdir() if p != path).read_bytes())),
        only="sealed"),

    Row("epoch",                "missing",                       "epoch",   True, "nothing", missing(epoch), only="sealed"),
    Row("epoch",                "empty",                         "epoch",   True, "nothing", changed(epoch, empty), only="sealed"),
    Row("epoch",                "truncated",                     "epoch",   True, "nothing", changed(epoch, half), only="sealed"),
    Row("epoch",                "bit flipped",                   "epoch",   True, "nothing", changed(epoch, flip(0.5)), only="sealed"),
    Row("epoch",                "garbage",                       "epoch",   True, "nothing", changed(epoch, garbage), only="sealed"),
    Row("epoch",                "of another repository",         "epoch",   True, "nothing", foreign(epoch), only="sealed"),

    Row("session",              "missing",                       "session", True, "nothing", missing(named("sessions", "second"))),
    Row("session",              "empty",                         "session", True, "nothing", changed(named("sessions", "second"), empty)),
    Row("session",              "truncated",                     "session", True, "nothing", changed(named("sessions", "second"), half)),
    Row("session",              "bit flipped",                   "session", True, "nothing", changed(named("sessions", "second"), flip(0.2))),
    Row("session",              "garbage",                       "session", True, "nothing", changed(named("sessions", "second"), garbage)),
    Row("session",              "swapped",                       "session", True, "nothing",
        exchanged(named("sessions", "first"), named("sessions", "second"))),
    Row("session",              "replayed",                      "session", True, "nothing",
        replayed(named("sessions", "third"), named("sessions", "second"))),

    Row("data pack",            "missing",                       "pack",    True,  "pack", missing(D)),
    Row("data pack",            "empty",                         "pack",    True,  "pack", changed(D, empty)),
    Row("data pack",            "truncated",                     "pack",    True,  "rest", changed(D, half)),
    Row("data pack",            "a byte longer",                 "pack",    True,  "nothing", changed(D, longer)),
    Row("data pack",            "garbage",                       "pack",    True,  "pack", changed(D, garbage)),
    Row("data pack",            "swapped",                       "pack",    False, "both", exchanged(D, pack("other"))),
    Row("data pack",            "replayed",                      "pack",    False, "pack", replayed(pack("third"), D)),
    Row("data pack",            "a map pack in its place",       "pack",    True,  "pack", replayed(D, M)),
    Row("data pack: header",    "bit flipped",                   "pack",    True,  "pack", changed(D, lambda d: flipped(d, 40))),
    Row("data pack: header",    "huge length",                   "pack",    True,  "pack", changed(D, huge_header)),
    Row("data pack: header",    "1024 envelopes",                "pack",    True,  "pack", changed(D, many_envelopes)),
    Row("data pack: envelope",  "bit flipped",                   "pack",    False, "pack",
        changed(D, lambda d: with_header_sum(flipped(d, 64 + 60))), only="sealed"),
    Row("data pack: head",      "bit flipped",                   "pack",    False, "record", changed(D, lambda d: flipped(d, record_at(d) + 20))),
    Row("data pack: head",      "huge payload length",           "pack",    False, "record", changed(D, huge_payload(record_at))),
    Row("data pack: head",      "huge plain length",             "pack",    False, "record", changed(D, huge_plain(record_at))),
    Row("data pack: payload",   "bit flipped",                   "pack",    False, "record", changed(D, lambda d: flipped(d, record_at(d) + 64 + 2000))),
    Row("data pack: payload",   "last bit flipped",              "pack",    False, "record", changed(D, lambda d: flipped(d, record_at(d, RECORD + 1) - 1, 7))),
    Row("data pack: records",   "two exchanged",                 "pack",    False, "two records",
        changed(D, lambda d: (lambda a, b, c: d[:a] + d[b:c] + d[a:b] + d[c:])(
            record_at(d), record_at(d, RECORD + 1), record_at(d, RECORD + 2)))),
    Row("data pack: trailer",   "bit flipped",                   "pack",    False, "nothing", changed(D, lambda d: flipped(d, trailer_at(d) + 200))),
    Row("data pack: footer",    "bit flipped",                   "pack",    True,  "nothing", changed(D, lambda d: flipped(d, len(d) - 20))),
    Row("data pack: footer",    "huge number of records",        "pack",    True,  "nothing", changed(D, huge_trailer)),
    Row("data pack: footer",    "trailer far away",              "pack",    True,  "nothing", changed(D, far_trailer)),

    Row("map pack",             "missing",                       "map",     True,  "pages", missing(M)),
    Row("map pack",             "empty",                         "map",     True,  "pages", changed(M, empty)),
    Row("map pack",             "cut to its header",             "map",     True,  "pages", changed(M, lambda d: d[:workshop.header_length(d)])),
    Row("map pack",             "garbage",                       "map",     True,  "pages", changed(M, garbage)),
    Row("map pack",             "swapped",                       "map",     True,  "both maps", exchanged(M, map_pack("other"))),
    Row("map pack",             "replayed",                      "map",     True,  "newest pages", replayed(map_pack("third"), M)),
    Row("map pack: header",     "bit flipped",                   "map",     True,  "pages", changed(M, lambda d: flipped(d, 40))),
    Row("map pack: header",     "huge length",                   "map",     True,  "pages", changed(M, huge_header)),
    Row("map pack: head",       "bit flipped",                   "map",     True,  "page", changed(M, lambda d: flipped(d, leaf_at(d) + 20))),
    Row("map pack: head",       "huge payload length",           "map",     True,  "page", changed(M, huge_payload(leaf_at))),
    Row("map pack: public",     "bit flipped",                   "map",     True,  "page", changed(M, leaf_public)),
    Row("map pack: public",     "huge length",                   "map",     True,  "page", changed(M, huge_public)),
    Row("map pack: sealed",     "bit flipped",                   "map",     True,  "page", changed(M, leaf_sealed)),
    Row("map pack: trailer",    "bit flipped",                   "map",     False, "nothing", changed(M, lambda d: flipped(d, trailer_at(d) + 70))),
    Row("map pack: footer",     "bit flipped",                   "map",     True,  "nothing", changed(M, lambda d: flipped(d, len(d) - 20))),
    Row("map pack: footer",     "trailer far away",              "map",     True,  "nothing", changed(M, far_trailer)),

    Row("index segment",        "missing",                       "index",   False, "nothing", missing(segment("first"))),
    Row("index segment",        "empty",                         "index",   True,  "nothing", changed(segment("first"), empty)),
    Row("index segment",        "truncated",                     "index",   True,  "nothing", changed(segment("first"), half)),
    Row("index segment",        "garbage",                       "index",   True,  "nothing", changed(segment("first"), garbage)),
    Row("index segment",        "swapped",                       "index",   False, "nothing", exchanged(segment("first"), segment("other"))),
    Row("index segment",        "replayed",                      "index",   False, "nothing", replayed(segment("third"), segment("first"))),
    Row("index segment: header", "bit flipped",                  "index",   True,  "nothing", changed(segment("first"), lambda d: flipped(d, 24))),
    Row("index segment: header", "a bit of its padding",         "index",   False, "nothing", changed(segment("first"), lambda d: flipped(d, 3000))),
    Row("index segment: header", "huge number of packs",         "index",   True,  "nothing",
        changed(segment("first"), lambda d: (lambda e: e[:64] + workshop.xxhash.xxh3_64_digest(e[:64])[::-1] + e[72:])(
            patched(d, 12, HUGE)))),
    Row("index segment: names", "bit flipped",                   "index",   True,  "nothing", changed(segment("first"), lambda d: flipped(d, 4096 + 9))),
    Row("index segment: page",  "bit flipped",                   "index",   False, "nothing", changed(segment("first"), lambda d: flipped(d, 8192 + 100))),

    Row("manifest, the newest", "missing",                       "history", True,  "gone", missing(THIRD)),
    Row("manifest, the newest", "called aborted",                "history", True,  "gone", abort_mark),
    Row("manifest, the newest", "rolled back with all it needs", "history", True,  "gone", rolled_back),
    Row("manifest, in between", "missing",                       "chain",   True,  "second gone", missing(SECOND)),
    Row("manifest",             "empty",                         "set",     True,  "set", changed(THIRD, empty)),
    Row("manifest",             "truncated",                     "set",     True,  "set", changed(THIRD, half)),
    Row("manifest",             "a byte longer",                 "set",     True,  "set", changed(THIRD, longer)),
    Row("manifest",             "garbage",                       "set",     True,  "set", changed(THIRD, garbage)),
    Row("manifest",             "huge lengths",                  "set",     True,  "set", changed(THIRD, huge_lengths)),
    Row("manifest",             "swapped",                       "set",     True,  "two sets", exchanged(THIRD, named("sets", "other"))),
    Row("manifest",             "replayed",                      "set",     True,  "set", replayed(THIRD, SECOND)),
    Row("manifest: frame",      "bit flipped",                   "set",     True,  "set", changed(THIRD, in_frame)),
    Row("manifest: public",     "a digit changed",               "set",     True,  "set", changed(THIRD, in_public)),
    Row("manifest: body",       "bit flipped",                   "set",     True,  "set", changed(THIRD, in_body)),
    Row("manifest: signature",  "bit flipped",                   "set",     True,  "set", changed(THIRD, in_signature)),
)
# fmt: on


def lost_records(row: Row, world: World) -> set[tuple[bytes, int]]:
    """The records, (pack, offset), that a row's cost comes to."""
    first, first_map = world.packs["first"][0], world.maps["first"][0]

    def all_of(pack: bytes, kind: int = reference.BLOCK) -> set[tuple[bytes, int]]:
        return {(pack, record.offset) for record in world.records(pack, kind)}

    if row.cost == "pack":
        return all_of(world.packs["third"][0] if row.damage == "replayed" else first)
    if row.cost == "both":
        return all_of(first) | all_of(world.packs["other"][0])
    if row.cost == "rest":
        size = pack_path(world.place.root, "packs", first).stat().st_size // 2
        return {
            (first, record.offset) for record in world.records(first) if record.offset + record.length > size
        }
    if row.cost in ("record", "two records"):
        records = world.records(first)[RECORD : RECORD + (1 if row.cost == "record" else 2)]
        return {(first, record.offset) for record in records}
    if row.cost == "page":
        return {(first_map, world.records(first_map, reference.PAGE)[0].offset)}
    if row.cost == "pages":
        return all_of(first_map, reference.PAGE)
    if row.cost == "both maps":
        return all_of(first_map, reference.PAGE) | all_of(world.maps["other"][0], reference.PAGE)
    if row.cost == "newest pages":
        return all_of(world.maps["third"][0], reference.PAGE)
    return set()


def lost_sets(row: Row) -> tuple[str, ...]:
    """The sets, by their names in the tests, that are not to be had at all."""
    costs = {
        "set": ("third",),
        "two sets": ("third", "other"),
        "gone": ("third",),
        "second gone": ("second",),
    }
    return costs.get(row.cost, ())


os.environ.setdefault("IMAGER_PROGRESS", "none")
