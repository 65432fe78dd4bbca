"""A pseudo-terminal: what a person sees, and types."""

from __future__ import annotations

import os
import pty
import select
import signal
from pathlib import Path
from typing import Any


def on_a_terminal(
    imager: Any, *arguments: str | Path, typed: bytes = b"", env: dict[str, str] | None = None
) -> tuple[int, str]:
    """Run on a pseudo-terminal; (exit code, all that it showed). `typed` is sent when something is asked."""
    process, terminal = pty.fork()
    if process == 0:
        os.execve(
            imager.argv()[0], imager.argv(*arguments), {**imager.environment, "TERM": "xterm", **(env or {})}
        )
    shown = b""
    sent = not typed
    ready = select.poll()  # select() refuses descriptors past 1023
    ready.register(terminal, select.POLLIN)
    while True:
        if not ready.poll(60_000):
            os.kill(process, signal.SIGKILL)
            break
        try:
            data = os.read(terminal, 65536)
        except OSError:
            break
        if not data:
            break
        shown += data
        if not sent and shown.endswith(b"): "):
            os.write(terminal, typed + b"\n")
            sent = True
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), shown.decode()
