"""Commands and their output, taken from the documentation.

A page is run from top to bottom in one shell and one folder. A line that
begins with `$ ` in a ```console block is a command (`\\` at its end goes on
in the next line), the lines after it are what it printed. `...` stands for
any lines. Numbers, units, ids and times need not agree; words do. A command
must succeed unless the next one is `echo $?`.

Comments in a page speak to the test: `<!-- setup: COMMAND -->` runs
before all; `<!-- device: /dev/sdb 64M -->` puts a loop device of that
size in the place of /dev/sdb, which makes the page one for root; and
`<!-- ssh: HOST FOLDER -->` has an ssh server on loopback stand in for HOST,
with a folder of its own in the place of FOLDER there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SETUP = re.compile(r"<!-- setup:\s*(.*?)\s*-->", re.DOTALL)
_DEVICE = re.compile(r"<!-- device:\s*(\S+)\s+(\S+)\s*-->")

_SSH = re.compile(r"<!-- ssh:\s*(\S+)\s+(\S+)\s*-->")

_LOOSE = (
    (re.compile(r"\x1b\[[0-9;]*m"), ""),
    (re.compile(r"\b(packs|maps)/[0-9a-f]{2}/"), r"\1/"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}"), "TIME"),
    (re.compile(r"\b[0-9a-f]{8,64}\b"), "ID"),
    (re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"), "ID"),
    (re.compile(r"\d+ (min|h|d) \d+ (s|min|h)\b"), "N U"),
    (re.compile(r"\d[\d.,]*"), "N"),
    (re.compile(r"N (B|[KMGT]iB|s|min)\b"), "N U"),
    (re.compile(r"[─━┄]+"), "-"),
    (re.compile(r"\s+"), " "),
)


@dataclass(frozen=True, slots=True)
class Step:
    """A command of a page, and what the page says it prints."""

    command: str
    expected: tuple[str, ...]


def setup(page: str) -> list[str]:
    """Commands that the page needs before its first one."""
    return _SETUP.findall(page)


def devices(page: str) -> list[tuple[str, str]]:
    """(path as the page names it, size) of each device that stands in for a real one."""
    return _DEVICE.findall(page)


def servers(page: str) -> list[tuple[str, str]]:
    """(host, folder) of each machine that is reached by ssh: at most one."""
    return _SSH.findall(page)


def steps(page: str) -> list[Step]:
    """All commands of a page, in order."""
    found: list[Step] = []
    for block in _BLOCK.findall(page):
        command: str | None = None
        expected: list[str] = []
        goes_on = False
        for line in block.splitlines():
            if goes_on:
                command = f"{command}\n{line}"
            elif line.startswith("$ "):
                if command is not None:
                    found.append(Step(command, tuple(expected)))
                command, expected = line[2:], []
            else:
                expected.append(line)
            goes_on = command is not None and command.endswith("\\")
        if command is not None:
            found.append(Step(command, tuple(expected)))
    return found


def loose(line: str) -> str:
    """`line` without what differs from run to run."""
    for pattern, instead in _LOOSE:
        line = pattern.sub(instead, line)
    return line.strip()


def agrees(expected: tuple[str, ...], printed: list[str]) -> bool:
    """Whether `printed` is what the page shows."""
    want = [loose(line) for line in expected if line.strip()]
    have = [loose(line) for line in printed if line.strip()]
    pattern = "".join("(?:.*\n)*" if line == "..." else re.escape(line) + "\n" for line in want)
    return re.fullmatch(pattern, "".join(line + "\n" for line in have)) is not None


def pages(root: Path) -> list[Path]:
    """Every page that may hold commands."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
