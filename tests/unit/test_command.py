"""Programs that are started: their ends, what they say, and what a Ctrl-C does to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from imager import command
from imager.errors import CommandError


def test_a_program_beside_this_one() -> None:
    piped = command.Piped(["sh", "-c", "echo hello >&2; cat; echo last words >&2; exit 3"])
    os.write(piped.stdin, b"round trip")
    assert os.read(piped.stdout, 100) == b"round trip"
    assert piped.wait(0.1) is None
    piped.hang_up()
    assert piped.wait(10) == 3
    assert piped.said() == ["hello", "last words"]
    piped.end()
    piped.end()


def test_only_the_last_of_what_is_said_is_kept() -> None:
    piped = command.Piped(["sh", "-c", "seq 100000 >&2"])
    assert piped.wait(20) == 0
    said = piped.said()
    assert said[-1] == "100000" and sum(map(len, said)) < 10_000
    piped.end()


def test_who_does_not_end_is_ended() -> None:
    piped = command.Piped(["sh", "-c", "trap '' TERM; while :; do sleep 1; done"])
    piped.end(0.2)
    assert not Path(f"/proc/{piped.pid}").exists()


def test_a_program_that_is_missing_or_none(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no-such-program is not installed") as caught:
        command.Piped(["no-such-program"], hint="install it")
    assert caught.value.hint == "install it"
    (tmp_path / "text").write_text("not a program")
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(CommandError, match="cannot be run"):
        command.Piped([str(tmp_path / "text")])


def test_a_ctrl_c_is_for_this_process_alone(tmp_path: Path) -> None:
    """As on a terminal: the signal goes to the whole group, and the program goes on."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, time\n"
        "from imager.command import Piped\n"
        "piped = Piped(['cat'])\n"  # A shell would unblock the signal again; ssh does not.
        "try:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    time.sleep(0.5)\n"
        "    os.write(piped.stdin, b'still there')\n"
        "    print(os.read(piped.stdout, 100).decode(), flush=True)\n"
        "    piped.end()\n"
    )
    process = subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0
    )
    assert process.stdout and process.stdout.readline() == b"ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert out == b"still there\n" and err == b""


def test_its_input_ends_with_this_process() -> None:
    program = (
        "import os; from imager.command import Piped; print(Piped(['cat']).pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    for _ in range(100):
        if not Path(f"/proc/{int(done.stdout)}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("it runs on")
