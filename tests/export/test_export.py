"""What an export gives is what the set holds: to a client of our own, and to everybody else's."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from imager import command
from tests import nbd
from tests.damage.workshop import flipped, write
from tests.export.conftest import BLOCK, SIZE, Served

Sockets = Callable[..., str]


def uri(path: str, name: str = "") -> str:
    return f"nbd+unix:///{name}?socket={path}"


@pytest.mark.parametrize("structured", [True, False])
def test_any_range(served: Served, socket_of: Sockets, structured: bool) -> None:
    chance, content = random.Random(3), served.content
    with nbd.Client(socket_of()).go(structured=structured) as client:
        assert client.size == SIZE
        for _ in range(300):
            start = chance.randrange(SIZE)
            length = min(SIZE - start, chance.choice([1, 511, BLOCK, 3 * BLOCK + 5, 1 << 20]))
            assert client.read(start, length) == content[start : start + length]
        if structured:  # one piece, where a client asks for it
            answer = client.ask(nbd.READ, 100, 2 << 20, flags=4)
            assert [at for at, _ in answer.data] == [100] and not answer.holes
            assert answer.content(100, 2 << 20) == content[100 : 100 + (2 << 20)]


def test_status(served: Served, socket_of: Sockets) -> None:
    content = served.content
    with nbd.Client(socket_of()).go(contexts=["base:allocation", "imager:changed"]) as client:
        answer = client.ask(nbd.STATUS, 0, SIZE)
        assert not answer.errors
        at = 0
        for length, flags in answer.status[1]:
            part = content[at : at + length]
            assert flags in (0, 3) and (flags == 0 or not any(part))
            at += length
        assert at == SIZE and 1 < len(answer.status[1])
        at = 0
        for length, flags in answer.status[2]:
            if not flags:
                assert content[at : at + length] == served.before[at : at + length]
            at += length
        assert at == SIZE
        changed = sum(length for length, flags in answer.status[2] if flags)
        assert changed == 3 * BLOCK
        one = client.ask(nbd.STATUS, 5, SIZE - 5, flags=8).status
        assert {key: len(runs) for key, runs in one.items()} == {1: 1, 2: 1}


def test_many_requests_at_once(served: Served, socket_of: Sockets) -> None:
    """Answers come in any order, each to its own question, on several connections."""
    path, content = socket_of(), served.content
    errors: list[BaseException] = []

    def ask(seed: int) -> None:
        chance = random.Random(seed)
        try:
            with nbd.Client(path).go() as client:
                assert client.flags & 256  # many connections see the same
                reads = {}
                for _ in range(200):
                    start = chance.randrange(SIZE - 9000)
                    reads[client.send(nbd.READ, start, 9000)] = (start, 9000)
                for _ in range(200):
                    cookie, answer = client.answer(reads)
                    start, length = reads.pop(cookie)
                    assert answer.content(start, length) == content[start : start + length]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def test_reading_in_order(served: Served, socket_of: Sockets) -> None:
    """What is made ready in advance is what is asked for next."""
    with nbd.Client(socket_of()).go() as client:
        content = served.content
        assert b"".join(client.read(at, min(1500, SIZE - at)) for at in range(0, SIZE, 1500)) == content


def test_what_is_refused(served: Served, socket_of: Sockets) -> None:
    with nbd.Client(socket_of()).go() as client:
        for ask in (nbd.WRITE, nbd.TRIM, nbd.ZEROES):
            more = bytes(512) if ask == nbd.WRITE else b""
            assert client.ask(ask, 0, 512, more=more).errors == [(nbd.EPERM, None)]
        assert client.ask(nbd.READ, SIZE - 1, 2).errors == [(nbd.EINVAL, None)]
        assert client.ask(nbd.READ, (1 << 64) - 1, 2).errors == [(nbd.EINVAL, None)]
        assert client.ask(nbd.STATUS, 0, 512).errors == [(nbd.EINVAL, None)]  # no context was agreed on
        assert client.ask(99).errors == client.ask(nbd.FLUSH, flags=64).errors == [(nbd.EINVAL, None)]
        assert client.ask(nbd.FLUSH).errors == client.ask(nbd.CACHE, 0, SIZE).errors == []
        assert client.read(0, 10) == served.content[:10]


def test_a_damaged_block(served: Served) -> None:
    """EIO for exactly its range, and a word about it; all else can be read."""
    content = served.content
    hurt = damage(served, served.place.manifest_ids()[-1])
    with served.serving() as path, nbd.Client(path).go() as client:
        for at in range(0, SIZE, BLOCK):
            length = min(BLOCK, SIZE - at)
            answer = client.ask(nbd.READ, at, length)
            if at == hurt:
                assert answer.errors == [(nbd.EIO, at)] and not answer.data
            else:
                assert answer.content(at, length) == content[at : at + length]
        wide = client.ask(nbd.READ, hurt - 10 if hurt else 0, 3 * BLOCK)
        assert wide.errors == [(nbd.EIO, hurt)]
        start = hurt - 10 if hurt else 0
        for at, part in wide.data:
            assert content[at : at + len(part)] == part
        told = sum(len(part) for _, part in wide.data) + sum(length for _, length in wide.holes)
        assert told == 3 * BLOCK - BLOCK and start <= hurt
    assert len([text for text in served.reporter.warnings if f"{BLOCK} bytes at {hurt}" in text]) == 1
    with served.serving() as path, nbd.Client(path).go(structured=False) as client:
        assert client.ask(nbd.READ, hurt, BLOCK).errors == [(nbd.EIO, None)]
        assert client.read(hurt + BLOCK, BLOCK) == content[hurt + BLOCK : hurt + 2 * BLOCK]


def damage(served: Served, set_id: str) -> int:
    """Flip a bit in the record of a block of a set, wherever it is; where the block begins."""
    with served.place.reading(set_id) as (repository, _, reader):
        slots = reader.leaf(0)
        kind, identity, pack, offset, length = slots.get(7)
        assert kind == 3 and identity
        name = repository.names.name(pack)
        assert name is not None
    (path,) = [one for one in served.place.root.glob("packs/*/*") if one.name == name.hex()]
    write(path, flipped(path.read_bytes(), offset + length - 5))
    return 7 * BLOCK


def test_a_damaged_map(served: Served, socket_of: Sockets) -> None:
    """A page that is gone takes its own blocks with it, and no others."""
    content = served.content
    with served.place.reading(served.place.manifest_ids()[-1]) as (repository, _, reader):
        page = reader.find(0, 1)
        assert page is not None and not isinstance(page, int)
        name = repository.names.name(page.pack)
        assert name is not None
    (path,) = [one for one in served.place.root.glob("maps/*/*") if one.name == name.hex()]
    write(path, flipped(path.read_bytes(), page.offset + page.length - 3))
    with nbd.Client(socket_of()).go(contexts=["base:allocation"]) as client:
        assert client.ask(nbd.READ, 300 * BLOCK, 10).errors == [(nbd.EIO, 300 * BLOCK)]
        assert client.ask(nbd.STATUS, 0, SIZE).errors == [(nbd.EIO, None)]
        assert client.read(255 * BLOCK, BLOCK) == content[255 * BLOCK : 256 * BLOCK]
        assert client.read(600 * BLOCK, BLOCK) == content[600 * BLOCK : 601 * BLOCK]


# --- other clients ------------------------------------------------------------------------------


def test_nbdcopy_and_qemu(served: Served, socket_of: Sockets, tmp_path: Path) -> None:
    path = socket_of()
    out = tmp_path / "out"
    command.run(["nbdcopy", uri(path), str(out)])
    assert out.read_bytes() == served.content
    assert (
        b"identical" in command.run(["qemu-img", "compare", "-f", "raw", str(served.image), uri(path)]).stdout
    )
    command.run(["qemu-img", "convert", "-O", "qcow2", uri(path), str(tmp_path / "q")])
    command.run(["qemu-img", "compare", str(tmp_path / "q"), str(served.image)])
    read = command.text(
        ["qemu-io", "-r", "-f", "raw", "-c", f"read -v {SIZE // 512 * 512 - 512} 512", uri(path)]
    )
    assert "read 512/512" in read


def test_nbdinfo(served: Served, socket_of: Sockets) -> None:
    path = socket_of()
    told = json.loads(command.text(["nbdinfo", "--json", uri(path)]))["exports"][0]
    assert (told["export-size"], told["is_read_only"], told["can_multi_conn"]) == (SIZE, True, True)
    assert told["contexts"] == ["base:allocation", "imager:changed"]
    ranges = json.loads(command.text(["nbdinfo", "--json", "--map=imager:changed", uri(path)]))
    assert sum(one["length"] for one in ranges if one["type"] == 1) == 3 * BLOCK
    listed = json.loads(command.text(["nbdinfo", "--json", "--list", uri(path)]))["exports"]
    assert [one["export-name"] for one in listed] == ["disk"]


def test_the_first_set_has_no_changes(served: Served, socket_of: Sockets) -> None:
    first = served.place.manifest_ids()[0]
    path = socket_of(first)
    told = json.loads(command.text(["nbdinfo", "--json", uri(path, "disk")]))["exports"][0]
    assert told["contexts"] == ["base:allocation"]
    with nbd.Client(path).go() as client:
        assert client.read(0, SIZE) == served.before


# --- the command -----------------------------------------------------------------------------------


def imager(served: Served, *words: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "IMAGER_KEYFILE": str(served.place.folder / "key")}
    argv = ["imager", "-r", str(served.place.root), *words]
    return subprocess.run(argv, capture_output=True, env=environment, check=False, timeout=60)


def test_with_a_command(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = imager(served, "map", "d:disk", "--", "nbdcopy", "{}", str(out))
    assert (done.returncode, out.read_bytes() == served.content) == (0, True), done
    assert imager(served, "map", "d", "--", "sh", "-c", "exit 7").returncode == 7
    missing = imager(served, "map", "d", "--", "no-such-program-here")
    assert missing.returncode == 1 and b"no-such-program-here" in missing.stderr
    assert imager(served, "map", "d:other").returncode == 2
    assert imager(served, "map", "d:disk:1").returncode == 2


def test_the_socket_is_this_users_alone(served: Served, tmp_path: Path) -> None:
    place = tmp_path / "socket"
    with served.serving(path=str(place)) as path:
        assert path == str(place) and stat.S_IMODE(place.stat().st_mode) == 0o600
        again = imager(served, "map", "d", "--socket", path)
        assert again.returncode == 2 and b"cannot listen" in again.stderr
    assert not place.exists()


def test_it_serves_until_it_is_interrupted(served: Served, tmp_path: Path) -> None:
    import signal

    environment = {**os.environ, "IMAGER_KEYFILE": str(served.place.folder / "key")}
    place = tmp_path / "socket"
    argv = ["imager", "-r", str(served.place.root), "--json", "map", "d", "--socket", str(place)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=environment) as running:
        assert running.stdout is not None
        told = json.loads(running.stdout.readline())
        assert told["exports"] == {"disk": uri(str(place), "disk")}
        with nbd.Client(str(place)).go() as client:  # a client that stays does not hold it up
            assert client.read(0, 100) == served.content[:100]
            running.send_signal(signal.SIGTERM)
            assert running.wait(30) == 0
    assert not place.exists()
