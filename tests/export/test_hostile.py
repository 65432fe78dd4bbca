"""Clients that break the protocol, send garbage, ask for too much, or come in hundreds."""

from __future__ import annotations

import os
import random
import socket
import struct
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import nbd
from tests.export.conftest import SIZE, Served

Sockets = Callable[..., str]
GIVEN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def still_serves(served: Served, path: str) -> None:
    with nbd.Client(path).go() as client:
        assert client.read(0, 5000) == served.content[:5000]


def drained(client: nbd.Client) -> None:
    """Read what comes until the server hangs up."""
    client.socket.shutdown(socket.SHUT_WR)
    while client.socket.recv(1 << 16):
        pass


@pytest.mark.parametrize("served", ["none"], indirect=True)
def test_garbage(served: Served, socket_of: Sockets) -> None:
    path = socket_of()

    @GIVEN
    @given(
        st.integers(0, 7),
        st.lists(
            st.tuples(
                st.one_of(st.integers(0, 12), st.integers(0, (1 << 32) - 1)),
                st.one_of(
                    st.binary(max_size=60), st.builds(lambda n: nbd.text(n) + b"\0\0", st.text(max_size=5))
                ),
                st.one_of(st.none(), st.integers(0, (1 << 32) - 1)),
            ),
            max_size=6,
        ),
        st.binary(max_size=80),
    )
    def handshakes(flags: int, options: list[tuple[int, bytes, int | None]], rest: bytes) -> None:
        with nbd.Client(path) as client:
            try:
                client.hello(flags)
                for option, data, length in options:
                    said = len(data) if length is None else length
                    client.socket.sendall(nbd.OPTION.pack(nbd.IHAVEOPT, option, said) + data)
                client.socket.sendall(rest)
                drained(client)
            except (BrokenPipeError, ConnectionResetError):
                pass

    @GIVEN
    @given(
        st.lists(st.tuples(*(st.integers(0, (1 << bits) - 1) for bits in (4, 4, 64, 64, 32))), max_size=8),
        st.binary(max_size=60),
    )
    def requests(asked: list[tuple[int, int, int, int, int]], rest: bytes) -> None:
        with nbd.Client(path).go(contexts=["base:allocation"]) as client:
            try:
                for flags, command, cookie, offset, length in asked:
                    client.socket.sendall(
                        nbd.REQUEST.pack(0x25609513, flags, command, cookie, offset, length)
                    )
                client.socket.sendall(rest)
                drained(client)
            except (BrokenPipeError, ConnectionResetError):
                pass

    handshakes()
    requests()
    still_serves(served, path)


@pytest.mark.parametrize("served", ["none"], indirect=True)
def test_what_an_option_may_carry(served: Served, socket_of: Sockets) -> None:
    with nbd.Client(socket_of()) as client:
        client.hello()
        assert client.option(nbd.LIST, bytes(100_000))[0][0] & 0xFFFF == 9  # too big, and passed over
        assert client.option(nbd.STARTTLS)[0][0] & 0xFFFF == 1  # not known
        assert client.option(nbd.GO, nbd.text("no such") + b"\0\0")[0][0] & 0xFFFF == 6
        assert client.option(nbd.GO, b"\xff\xff\xff\xff")[0][0] & 0xFFFF == 3
        queries = struct.pack(">I", 1) + nbd.text("base:allocation")
        assert client.option(nbd.SET_META, nbd.text("") + queries)[0][0] & 0xFFFF == 3  # not structured yet
        assert client.option(nbd.STRUCTURED) == [(nbd.ACK, b"")]
        assert len(client.option(nbd.LIST_META, nbd.text("") + struct.pack(">I", 0))) == 3
        assert client.option(nbd.SET_META, nbd.text("") + struct.pack(">I", 1) + nbd.text("qemu:x")) == [
            (nbd.ACK, b"")
        ]
        assert client.option(nbd.SET_META, nbd.text("") + struct.pack(">I", 1 << 31))[0][0] & 0xFFFF == 3
        assert client.option(nbd.ABORT) == [(nbd.ACK, b"")]


@pytest.mark.parametrize("served", ["none"], indirect=True)
def test_hundreds_of_clients_and_slow_ones(served: Served, socket_of: Sockets) -> None:
    """Those beyond the limit are turned away, those that take nothing hold nobody up."""
    path = socket_of()
    lazy = [nbd.Client(path).go() for _ in range(8)]
    for client in lazy:
        for _ in range(40):
            client.send(nbd.READ, 0, SIZE)  # more than anyone would buffer, and never read
    still_serves(served, path)
    many, refused = [], 0
    for _ in range(300):
        try:
            many.append(nbd.Client(path))
        except (EOFError, ConnectionError):
            refused += 1
    assert len(many) + refused == 300 and refused >= 200
    for client in [*many, *lazy]:
        client.socket.close()
    for _ in range(100):
        try:
            still_serves(served, path)
            break
        except (EOFError, ConnectionError):
            continue
    else:
        pytest.fail("it serves nobody any more")


@pytest.mark.parametrize("served", ["none"], indirect=True)
def test_clients_that_vanish(served: Served, socket_of: Sockets) -> None:
    path, chance = socket_of(), random.Random(8)
    with nbd.Client(path).go() as client:
        client.read(0, SIZE)  # whatever packs are opened for this stay open
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(60):
        client = nbd.Client(path).go()
        for _ in range(chance.randrange(4)):
            client.send(nbd.READ, chance.randrange(SIZE - 70_000), 70_000)
        if chance.random() < 0.5:
            client.socket.sendall(
                nbd.REQUEST.pack(0x25609513, 0, nbd.WRITE, 1, 0, 4096)[: chance.randrange(28)]
            )
        client.socket.close()
    still_serves(served, path)
    with nbd.Client(path).go() as client:
        client.send(nbd.WRITE, 0, (1 << 32) - 1)  # a payload that nobody wants to see
        with pytest.raises((EOFError, ConnectionError)):
            client.take(1)
    for _ in range(200):
        if len(os.listdir("/proc/self/fd")) <= descriptors + 4:
            break
        still_serves(served, path)
    else:
        pytest.fail("descriptors of clients stay open")
