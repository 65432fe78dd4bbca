"""Every command that the documentation shows is run, and prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.docs import pages
from tests.sshd import Sshd, script

ROOT = Path(__file__).parents[2]
WITH_COMMANDS = [p for p in pages.pages(ROOT) if pages.steps(p.read_text())]
MARK = "\x01"
HOME = "/home/you"

# These start this very test run, and a rehearsal that the tests of the lab run.
RUN_ELSEWHERE = ("./dev ", "git clone ", "cd imager")


@contextmanager
def loop_device(path: Path, size: str) -> Iterator[str]:
    """A loop device over a new file, detached again by its own name."""
    subprocess.run(["truncate", "-s", size, str(path)], check=True)
    argv = ["losetup", "--find", "--show", str(path)]
    name = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield name
    finally:
        subprocess.run(["losetup", "--detach", name], check=True)


@contextmanager
def ssh_server(folder: Path, home: Path, host: str, place: str) -> Iterator[dict[str, str]]:
    """A server in the place of `host`: what stands in for the page's names. `home` gets an `ssh` for it."""
    server = Sshd(folder / "sshd")
    try:
        backups = folder / Path(place).name
        backups.mkdir()
        client = server.client("you")
        own = client.config.read_text()
        client.config.write_text(f"Include {home}/.ssh/config\n{own}  Port {server.port}\n")
        (home / "bin").mkdir()
        (home / ".ssh").mkdir()
        script(home / "bin/ssh", f'exec /usr/bin/ssh -F "{client.config}" "$@"')
        yield {
            host: "127.0.0.1",
            place: str(backups),
            "~/.ssh/authorized_keys": str(server.authorized),
        }
    finally:
        server.stop()


def run_page(page: str, folder: Path, stand_ins: dict[str, str]) -> list[tuple[pages.Step, int, list[str]]]:
    """Run all of a page in one shell: for each step its exit code and what it printed."""
    steps = [step for step in pages.steps(page) if not step.command.startswith(RUN_ELSEWHERE)]
    lines = list(pages.setup(page))
    for number, step in enumerate(steps):
        command = step.command
        lines += [f"printf '{MARK}%s\\n' 'begin {number}'", "(exit ${code:-0})", command]
        lines += ["code=$?", f"printf '{MARK}%s\\n' \"end {number} $code\""]
    script = "\n".join(lines)
    for name, device in stand_ins.items():
        script = script.replace(name, device)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("IMAGER_")}
    environment |= {
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
        "IMAGER_STATE_DIR": str(folder / ".state"),
        "IMAGER_CACHE_DIR": str(folder / ".cache"),
        "HOME": str(folder),
        "TERM": "dumb",
        "COLUMNS": "110",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    for name, device in stand_ins.items():
        done.stdout = done.stdout.replace(device, name).replace(Path(device).name, Path(name).name)
    # What a page shows stands for whoever reads it.
    done.stdout = done.stdout.replace(str(folder), HOME).replace(
        f"from {os.uname().nodename}\n", "from debian\n"
    )
    results: list[tuple[pages.Step, int, list[str]]] = []
    for number, step in enumerate(steps):
        _, begun, after = done.stdout.partition(f"{MARK}begin {number}\n")
        printed, ended, rest = after.partition(f"{MARK}end {number} ")
        assert begun and ended, f"the page stopped at: {step.command}\n{done.stdout}"
        results.append((step, int(rest.split("\n", 1)[0]), printed.splitlines()))
    return results


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command(page: Path, tmp_path: Path) -> None:
    text = page.read_text()
    wanted = pages.devices(text)
    if wanted and os.geteuid() != 0:
        pytest.skip("this page needs a loop device, and so root")
    with ExitStack() as stack:
        stand_ins = {
            name: stack.enter_context(loop_device(tmp_path / f"stand-in-{i}", size))
            for i, (name, size) in enumerate(wanted)
        }
        folder = tmp_path / "page"
        folder.mkdir()
        for host, place in pages.servers(text):
            stand_ins |= stack.enter_context(ssh_server(tmp_path, folder, host, place))
        results = run_page(text, folder, stand_ins)
    for i, (step, code, printed) in enumerate(results):
        followed = results[i + 1][0].command if i + 1 < len(results) else ""
        shown = f"$ {step.command}\n" + "\n".join(printed)
        assert code == 0 or followed == "echo $?", f"exit {code}:\n{shown}"
        assert pages.agrees(step.expected, printed), (
            f"the page shows:\n{chr(10).join(step.expected)}\n\n{shown}"
        )


def test_links_lead_somewhere() -> None:
    for page in pages.pages(ROOT):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
