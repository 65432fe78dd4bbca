"""The global options, standard streams, and how the program ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from imager import errors
from tests.cli.terminal import on_a_terminal


def test_options_before_and_after_the_verb(imager, repository: Path, tmp_path: Path) -> None:
    before = imager.ok("-r", repository, "--json", "list")
    after = imager.ok("list", "--json", "--repo", repository)
    assert before.out == after.out
    # The one nearest to the verb counts.
    assert imager.ok("-r", tmp_path / "wrong", "list", "-r", repository, "--json").out == before.out


def test_options_from_the_environment(imager, repository: Path, tmp_path: Path) -> None:
    by_option = imager.ok("-r", repository, "list", "--json").out
    assert imager.ok("list", env={"IMAGER_REPO": str(repository), "IMAGER_JSON": "1"}).out == by_option
    # An option is stronger than the environment.
    wrong = {"IMAGER_REPO": str(tmp_path / "wrong")}
    assert imager.ok("-r", repository, "list", "--json", env=wrong).out == by_option
    assert imager.ok("list", "-r", repository, "--json", env=wrong).out == by_option


def test_options_of_a_verb_from_the_environment(imager, repository: Path, image: Path) -> None:
    environment = {"IMAGER_BACKUP_STRATEGY": "full", "IMAGER_BACKUP_NAME": "disk"}
    ended = imager.ok("-r", repository, "backup", image, "--json", env=environment)
    assert (ended.messages[-1]["strategy"], ended.messages[-1]["name"]) == ("full", "disk")


def test_an_unknown_compression(imager, repository: Path, image: Path) -> None:
    ended = imager("-r", repository, "backup", image, "--compression", "lzma")
    assert ended.code == errors.EXIT_USAGE
    assert "zstd" in ended.err


def test_quiet_says_nothing(imager, repository: Path, image: Path) -> None:
    assert imager.ok("-q", "-r", repository, "backup", image, "--name", "disk").err == ""


def test_verbose_tells_the_phases(imager, repository: Path) -> None:
    assert "/s" in imager.ok("-v", "-r", repository, "verify", "disk").err


def test_progress_as_json_without_a_json_result(imager, repository: Path) -> None:
    ended = imager.ok("--progress", "json", "-r", repository, "verify", "disk")
    events = [json.loads(line) for line in ended.err.splitlines()]
    assert {event["message_type"] for event in events} == {"progress"}
    last = events[-1]
    assert last["ended"] and (last["total"] is None or last["done"] == last["total"])
    assert not ended.out.startswith("{")


def test_no_colour_off_a_terminal(imager, repository: Path) -> None:
    for verb in (["list"], ["show", "disk"], ["verify", "disk"], ["show", "nowhere"]):
        ended = imager("-r", repository, *verb)
        assert "\033" not in ended.out + ended.err


def test_a_reader_that_leaves_is_no_error(imager) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        imager.argv("completion", "bash"),
        stdout=write,
        stderr=subprocess.PIPE,
        env=imager.environment,
        check=False,
    )
    os.close(write)
    assert done.stderr == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(imager, repository: Path, number: signal.Signals) -> None:
    before = imager.ok("-r", repository, "list", "--json").out
    process = subprocess.Popen(
        imager.argv("-r", repository, "backup", "-", "--name", "stream"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=imager.environment,
    )
    assert process.stdin is not None
    process.stdin.write(b"some data")
    process.stdin.flush()
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == errors.EXIT_INTERRUPTED
    assert out == b""
    assert err.startswith(b"error: interrupted")
    assert imager.ok("-r", repository, "list", "--json").out == before


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(imager, shell: str) -> None:
    assert "_IMAGER_COMPLETE" in imager.ok("completion", shell).out


def test_completion_completes(imager) -> None:
    words = {"_IMAGER_COMPLETE": "bash_complete", "COMP_WORDS": "imager re", "COMP_CWORD": "1"}
    console_script = "import sys; sys.argv = ['imager']; from imager.cli.main import main; main()"
    done = subprocess.run(
        [imager.argv()[0], "-c", console_script],
        env={**imager.environment, **words},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "plain,restore" in done.stdout.split()


def test_colours_on_a_terminal(imager) -> None:
    code, shown = on_a_terminal(imager, "nonsense")
    assert code == errors.EXIT_USAGE
    assert "\033[" in shown
    code, shown = on_a_terminal(imager, "nonsense", env={"NO_COLOR": "1"})
    assert "\033[" not in shown


def test_a_table_on_a_terminal(imager, repository: Path) -> None:
    code, shown = on_a_terminal(imager, "-r", repository, "list")
    assert code == 0
    assert "disk" in shown
