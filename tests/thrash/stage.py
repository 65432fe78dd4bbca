"""Processes that run `imager`, one storage call at a time, in an order that a seed decides.

Each command is a forked process. Its storage asks before every call and tells when the call is done, so
that the director knows what everybody is about to do, and lets one of them go on: calls of
different processes interleave as the seed says and not as the machine's load has it. A process
is killed (SIGKILL) before, within or after a call; one that is seldom chosen sleeps for what is
days to the others. What a process draws by lot (ids) the seed decides too; threads within a process, and
the nonces of the native core, may still differ the next time.
"""

from __future__ import annotations

import importlib
import os
import random
import select
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imager.cli import main
from imager.cli.main import VERBS
from imager.storage.base import Staged, Storage

# Once here, and not in each of hundreds of processes.
for _module in (
    *(f"cli.verbs.{verb}" for verb in VERBS), "engine.backup", "engine.restore", "engine.verify",
    "repository.check", "repository.forgetting", "repository.keyless", "repository.prune", "repository.sync",
    "storage.cached", "storage.object_store", "storage.retry", "storage.ssh",
):  # fmt: skip
    importlib.import_module(f"imager.{_module}")

_CALLS = (
    "read", "open", "size", "exists", "create", "stage", "list_names", "list", "move", "delete", "sweep",
)  # fmt: skip
_PATIENCE = 5.0
"Seconds that the director waits for a process that computes."
_ENDLESS = 180.0
"Seconds after which a call that has no end is a failure of the test."


class _Channel:
    """A process's side: one call at a time, each when it may."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._lock = threading.Lock()

    def step(self, what: str, name: str, call: Callable[[], Any]) -> Any:
        with self._lock:
            self._end.send(f"c{what} {name}".encode())
            if not self._end.recv(1):
                os._exit(96)  # The director is gone.
            try:
                return call()
            finally:
                self._end.send(b"d")


class _SteppingStaged:
    def __init__(self, inner: Staged, channel: _Channel) -> None:
        self._inner = inner
        self._channel = channel

    @property
    def fd(self) -> int:
        return self._inner.fd

    def publish(self, name: str) -> None:
        self._channel.step("publish", name, lambda: self._inner.publish(name))

    def discard(self) -> None:
        self._inner.discard()


class SteppingStorage:
    """A storage each of whose calls waits until it may be made."""

    def __init__(self, inner: Storage, channel: _Channel) -> None:
        self._inner = inner
        self._channel = channel

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in _CALLS:
            return value

        def call(*arguments: Any, **more: Any) -> Any:
            what = str(arguments[0]) if arguments else ""
            if name == "stage":
                return _SteppingStaged(self._channel.step(name, what, value), self._channel)
            if name == "list":
                return self._channel.step(name, what, lambda: list(value(*arguments, **more)))
            return self._channel.step(name, what, lambda: value(*arguments, **more))

        return call


@dataclass(frozen=True, slots=True)
class Kill:
    """When a process is killed: at the `count`th of its calls, or of one kind of them."""

    count: int
    how: str
    "before, within or after the call"
    call: str = ""
    prefix: str = ""

    def fits(self, pending: str) -> bool:
        """Whether a call counts; it is told as `create sets/...`."""
        return not self.call or pending.startswith(f"{self.call} {self.prefix}")


@dataclass(slots=True)
class Actor:
    """A command that runs."""

    number: int
    arguments: list[str]
    pid: int
    end: socket.socket
    out: Path
    weight: float
    kill: Kill | None
    calls: int = 0
    fitting: int = 0
    "Calls that counted for the kill."
    pending: str = ""
    "The call that it wants to make."
    last: str = ""
    code: int | None = None
    then: Callable[[Actor], None] = field(default=lambda actor: None)

    @property
    def verb(self) -> str:
        return next(word for word in self.arguments if word in VERBS)

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Director:
    """Starts processes and says who goes on."""

    def __init__(self, chance: random.Random, folder: Path) -> None:
        self._chance = chance
        self._folder = folder
        self._lot = chance.random()
        self.actors: list[Actor] = []
        self._number = 0
        self.log: list[str] = []
        self.kills: Counter[str] = Counter()
        "Kills by the verb, the call and the part of the repository: `prune delete packs/`."

    def start(
        self,
        arguments: list[str],
        *,
        then: Callable[[Actor], None],
        kill: Kill | None = None,
        weight: float = 1.0,
    ) -> Actor:
        """Run a command; `then` is called when it has ended."""
        self._number += 1
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        out = self._folder / f"out{self._number}"
        pid = os.fork()
        if not pid:
            mine.close()
            for other in self.actors:
                other.end.close()
            _run(arguments, its, out, random.Random(f"{self._lot}/{self._number}"))
        its.close()
        actor = Actor(self._number, arguments, pid, mine, out, weight, kill, then=then)
        self.actors.append(actor)
        self.log.append(f"{actor.number}: imager {' '.join(arguments)}")
        return actor

    def turn(self) -> bool:
        """Let one process make one call; False where none runs."""
        self._gather()
        ready = [actor for actor in self.actors if actor.pending]
        if not ready:
            return bool(self.actors)
        actor = self._chance.choices(ready, [one.weight for one in ready])[0]
        actor.calls += 1
        actor.last, actor.pending = actor.pending, ""
        kill = actor.kill
        actor.fitting += kill is not None and kill.fits(actor.last)
        fatal = kill is not None and kill.fits(actor.last) and actor.fitting == kill.count
        self.log.append(f"{actor.number}: {actor.last}")
        if fatal and kill.how == "before":
            self._kill(actor)
            return True
        actor.end.send(b"g")
        if fatal and kill.how == "within":
            self._kill(actor)
            return True
        if self._receive(actor) and fatal:
            self._kill(actor)
        return True

    def drain(self, *, spare: bool = True) -> None:
        """Let all end; nobody is killed any more, unless they are not to be spared."""
        for actor in self.actors if spare else ():
            actor.kill = None
        while self.turn():
            pass

    def _gather(self) -> None:
        """Wait until every process wants to make a call, or has ended."""
        while busy := [actor for actor in self.actors if not actor.pending]:
            readable, _, _ = select.select([actor.end for actor in busy], [], [], _PATIENCE)
            if not readable:
                return
            for actor in busy:
                if actor.end in readable:
                    self._receive(actor)

    def _receive(self, actor: Actor) -> bool:
        """What a process says next; False where it has ended."""
        if not select.select([actor.end], [], [], _ENDLESS)[0]:
            raise AssertionError(f"{actor.arguments}: a call has no end: {actor.last}")
        try:
            word = actor.end.recv(4096).decode()
        except ConnectionError:
            word = ""
        if word.startswith("c"):
            actor.pending = word[1:]
        if word:
            return True
        self._end(actor)
        return False

    def _kill(self, actor: Actor) -> None:
        self.log.append(
            f"{actor.number}: killed {actor.kill and actor.kill.how} call {actor.calls}: {actor.last}"
        )
        if actor.kill is not None:
            call, _, name = actor.last.partition(" ")
            self.kills[f"{actor.verb} {call} {name.partition('/')[0]}"] += 1
        os.kill(actor.pid, signal.SIGKILL)
        self._end(actor)

    def _end(self, actor: Actor) -> None:
        actor.code = os.waitstatus_to_exitcode(os.waitpid(actor.pid, 0)[1])
        actor.end.close()
        self.actors.remove(actor)
        self.log.append(f"{actor.number}: ended with {actor.code} after {actor.calls} calls")
        actor.then(actor)

    def stop(self) -> None:
        """Kill what still runs."""
        for actor in list(self.actors):
            actor.then = lambda actor: None
            self._kill(actor)


def _run(arguments: list[str], end: socket.socket, out: Path, chance: random.Random) -> None:
    """The child: the command as the console script runs it, on a storage that asks before each call."""
    try:
        import imager.storage.location as opening

        channel = _Channel(end)
        os.urandom = chance.randbytes
        usual = opening.open_storage
        opening.open_storage = lambda *place, **how: SteppingStorage(usual(*place, **how), channel)  # type: ignore[assignment, arg-type, return-value]
        quiet = os.open(os.devnull, os.O_RDONLY)
        written = os.open(out, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(quiet, 0)
        os.dup2(written, 1)
        os.dup2(written, 2)
        code = main.run(arguments)
        import sys

        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(98)
