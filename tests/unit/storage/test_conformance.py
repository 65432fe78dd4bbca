"""Every storage keeps the promises of `Storage`, alike."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator

import pytest

from imager.errors import Locked, StorageError
from imager.storage.base import Entry, Storage
from imager.storage.errors import AlreadyExists, NotFound
from tests.unit.storage.backends import Place

PACK = "packs/3f/" + "3f" * 32


@pytest.fixture
def storage(place: Place) -> Iterator[Storage]:
    """A storage in which a repository was begun."""
    made = place.connect()
    with made.initializing():
        made.create("config", b"{}")
    yield made
    made.close()


def at_once(count: int, do: Callable[[int], object]) -> list[object]:
    """Run `do` in so many threads, begun together: what each returned or raised."""
    begin = threading.Barrier(count)
    results: list[object] = [None] * count

    def run(number: int) -> None:
        begin.wait()
        try:
            results[number] = do(number)
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def publish(storage: Storage, name: str, data: bytes) -> None:
    staged = storage.stage()
    assert os.write(staged.fd, data) == len(data)
    staged.publish(name)
    staged.discard()


def test_objects_come_back(storage: Storage, place: Place) -> None:
    storage.create("sets/a", b"hello")
    publish(storage, PACK, b"a pack")
    for one in (storage, place.connect()):
        assert one.read("sets/a") == b"hello"
        assert one.read("sets/a", 1, 3) == b"ell"
        assert one.read("sets/a", 2) == b"llo"
        assert one.read("sets/a", 4, 100) == b"o"
        assert one.read("sets/a", 5, 10) == one.read("sets/a", 9, 10) == b""
        assert one.read("sets/a", 2, 0) == b""
        assert one.size(PACK) == 6
        assert one.exists("sets/a") and not one.exists("sets/b")
        assert list(one.list("packs/")) == [Entry(PACK, 6)]
        assert one.list_names("sets/") == ["sets/a"] and one.list_names("index/") == []
        fd = one.open(PACK)
        assert os.pread(fd, 10, 0) == b"a pack" and os.fstat(fd).st_size == 6
        os.close(fd)


def test_an_empty_object_is_one(storage: Storage) -> None:
    storage.create("damaged/missing/00", b"")
    publish(storage, "damaged/missing/01", b"")
    assert sorted(storage.list_names("damaged/")) == ["damaged/missing/00", "damaged/missing/01"]
    for name in ("damaged/missing/00", "damaged/missing/01"):
        assert storage.size(name) == 0 and storage.read(name) == b"" and storage.exists(name)
        os.close(storage.open(name))


def test_a_large_object(storage: Storage) -> None:
    data = random.Random(1).randbytes((9 << 20) + 13)
    staged = storage.stage()
    for at in range(0, len(data), 1 << 20):
        os.pwrite(staged.fd, data[at : at + (1 << 20)], at)
    staged.publish(PACK)
    fd = storage.open(PACK)
    with os.fdopen(fd, "rb") as file:
        assert file.read() == data
    assert storage.read(PACK) == data
    cuts = [(at, 123_457) for at in range(0, len(data), 654_321)]
    parts = at_once(len(cuts), lambda number: storage.read(PACK, *cuts[number]))
    assert parts == [data[at : at + count] for at, count in cuts]


def test_a_name_is_given_once(storage: Storage) -> None:
    storage.create("sets/a", b"first")
    with pytest.raises(AlreadyExists):
        storage.create("sets/a", b"second")
    with pytest.raises(AlreadyExists):
        publish(storage, "sets/a", b"third")
    assert storage.read("sets/a") == b"first"


@pytest.mark.parametrize("way", ["create", "publish"])
def test_one_of_many_writers_wins(storage: Storage, place: Place, way: str) -> None:
    others = [place.connect() for _ in range(4)]
    for turn in range(5):
        name = f"sessions/{turn}"

        def write(number: int, name: str = name) -> int:
            one, data = others[number % 4], bytes([number]) * 70_000
            one.create(name, data) if way == "create" else publish(one, name, data)
            return number

        won = [one for one in at_once(8, write) if not isinstance(one, AlreadyExists)]
        assert len(won) == 1 and isinstance(won[0], int), won
        assert storage.read(name) == bytes([won[0]]) * 70_000


def test_what_is_discarded_leaves_nothing(storage: Storage) -> None:
    staged = storage.stage()
    os.write(staged.fd, b"x")
    staged.discard()
    staged.discard()
    assert storage.list_names("packs/") == [] and storage.strangers() == [] and storage.sweep() == []


def test_move_and_delete(storage: Storage) -> None:
    publish(storage, PACK, b"x" * 5000)
    storage.move(PACK, "damaged/" + PACK)
    assert not storage.exists(PACK)
    assert storage.list_names("damaged/") == ["damaged/" + PACK]
    storage.create(PACK, b"y")
    with pytest.raises(AlreadyExists):
        storage.move(PACK, "damaged/" + PACK)
    assert storage.read("damaged/" + PACK) == b"x" * 5000 and storage.read(PACK) == b"y"
    storage.delete(PACK)
    assert storage.list_names("packs/") == []
    storage.create(PACK, b"again")  # a name that is free may be used, however this repository never does
    assert storage.read(PACK) == b"again"


@pytest.mark.parametrize(
    "use",
    [
        lambda storage: storage.delete("sets/none"),
        lambda storage: storage.read("sets/none"),
        lambda storage: storage.read("sets/none", 3, 5),
        lambda storage: storage.open("sets/none"),
        lambda storage: storage.size("sets/none"),
        lambda storage: storage.move("sets/none", "damaged/sets/none"),
    ],
    ids=["delete", "read", "read a part", "open", "size", "move"],
)
def test_what_is_missing(storage: Storage, use: Callable[[Storage], object]) -> None:
    with pytest.raises(NotFound, match="sets/none"):
        use(storage)
    assert storage.list_names("damaged/") == []


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../x",
        "sets/../../x",
        "sets//a",
        "sets/",
        "sets/a b",
        "sets/é",
        "a\0b",
        "sets/.",
        "-" * 600,
    ],
)
def test_odd_names_are_refused(storage: Storage, name: str) -> None:
    for write in (
        lambda: storage.create(name, b"x"),
        lambda: publish(storage, name, b"x"),
        lambda: storage.move("config", name),
    ):
        with pytest.raises(ValueError, match="object name"):
            write()
    assert storage.read("config") == b"{}"


def test_a_listing_of_thousands(storage: Storage) -> None:
    names = [f"packs/{number % 256:02x}/{number:064x}" for number in range(2100)]
    at_once(6, lambda lane: [storage.create(name, b"x") for name in names[lane::6]])
    storage.create("packs-of-another/kind", b"")
    assert sorted(storage.list_names("packs/")) == sorted(names)
    assert sorted(entry.name for entry in storage.list("packs/")) == sorted(names)
    assert sorted(storage.list_names("packs/3f/")) == sorted(name for name in names if name[6:8] == "3f")


def test_everything_can_be_listed_at_once(storage: Storage) -> None:
    storage.create("sets/a", b"x")
    publish(storage, PACK, b"x")
    staged = storage.stage()
    assert sorted(storage.list_names("")) == ["config", PACK, "sets/a"]
    staged.discard()


def test_a_second_init_meanwhile_is_kept_out(place: Place) -> None:
    first, second = place.connect(), place.connect()
    assert first.strangers() == []
    with first.initializing(), pytest.raises(Locked), second.initializing():
        pass
    with second.initializing():
        second.create("config", b"{}")
    assert second.strangers() == []
    second.create("letter.txt", b"")
    second.create("photos/1", b"")
    assert first.strangers() == ["letter.txt", "photos"]


def test_a_closed_storage(storage: Storage) -> None:
    storage.close()
    storage.close()
    if not storage.local:
        for use in (
            lambda: storage.read("config"),
            lambda: storage.create("sets/a", b""),
            lambda: storage.list_names("sets/"),
            lambda: publish(storage, "sets/b", b"x"),
        ):
            with pytest.raises(StorageError, match="closed"):
                use()


def test_free_space_is_a_number_or_unknown(storage: Storage) -> None:
    free = storage.free_space()
    assert free is None or free > 0
