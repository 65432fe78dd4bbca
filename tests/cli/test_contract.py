"""What every verb owes its user, whatever it does: help, exit codes, errors, JSON."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from imager import errors
from imager.cli.main import group

# Arguments that are right in form, for the verbs that open a repository.
NEEDS_REPOSITORY: dict[str, tuple[str, ...]] = {
    "backup": ("IMAGE", "--name", "x"),
    "list": (),
    "show": ("latest",),
    "diff": ("latest", "latest"),
    "verify": ("latest",),
    "check": (),
    "restore": ("latest", "OUT"),
    "forget": ("--keep-last", "1"),
    "pin": (),
    "prune": (),
    "key list": (),
    "key add": ("--new-keyfile", "KEY"),
    "key remove": ("0123abcd",),
    "key passwd": ("--new-keyfile", "KEY"),
    "key export": (),
    "key rotate": (),
}
VERBS = [" ".join(words) for words in group.leaves(click.Context(group))]
KEYS = [verb for verb in NEEDS_REPOSITORY if verb.startswith("key ")]
with_repository = pytest.mark.parametrize("verb", list(NEEDS_REPOSITORY))
every_verb = pytest.mark.parametrize("verb", VERBS)
both_forms = pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])


@pytest.fixture
def arguments(image: Path, tmp_path: Path):
    """The verb with arguments that name real files."""
    names = {"IMAGE": str(image), "OUT": str(tmp_path / "out.img"), "KEY": str(tmp_path / "new-key")}
    return lambda verb: [*verb.split(), *(names.get(word, word) for word in NEEDS_REPOSITORY[verb])]


def refused(ended, code: int, *, as_json: bool, kind: str | None = None) -> str:
    """The message of a command that ended with `code`, said well."""
    assert ended.code == code, f"exit {ended.code}: {ended.out}{ended.err}"
    assert ended.out == ""
    if as_json:
        document = ended.error
        assert document["exit_code"] == code
        assert kind is None or document["kind"] == kind
        message = document["message"]
        assert isinstance(message, str)
    else:
        first, *rest = ended.err.rstrip("\n").split("\n")
        assert first.startswith("error: ")
        assert not rest or (rest[0] == "" and rest[1].startswith("hint: ")), ended.err
        message = first.removeprefix("error: ")
    assert message and not message.endswith(".") and not message.startswith("<")
    return message


@every_verb
def test_help(imager, verb: str) -> None:
    ended = imager.ok(*verb.split(), "--help")
    assert ended.out.startswith(f"Usage: imager {verb} ")
    assert ended.err == ""
    assert imager.ok(*verb.split(), "-h").out == ended.out


@every_verb
def test_every_option_is_described(verb: str) -> None:
    command = group.leaf(click.Context(group), verb.split())
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help and parameter.help.endswith(tuple(".):")), parameter.name


def test_help_names_every_verb(imager) -> None:
    text = imager.ok("--help").out
    for first, *more in (verb.split() for verb in VERBS):
        assert f"\n  {first} " in text
        for below in more:
            assert f"\n  {below} " in imager.ok(first, "--help").out


def test_a_group_without_a_verb_shows_what_there_is(imager) -> None:
    ended = imager("key")
    assert ended.code == errors.EXIT_USAGE and "rotate" in ended.err + ended.out


@both_forms
def test_unknown_verb_of_a_group(imager, as_json: bool) -> None:
    ended = imager(*(["--json"] if as_json else []), "key", "rotat")
    message = refused(ended, errors.EXIT_USAGE, as_json=as_json, kind="usage")
    assert "key rotat" in message and "rotate" in message


def test_version(imager) -> None:
    assert imager.ok("--version").out.split()[0] == "imager"


@both_forms
@every_verb
def test_unknown_option(imager, verb: str, as_json: bool) -> None:
    ended = imager(*verb.split(), "--no-such-option", *(["--json"] if as_json else []))
    refused(ended, errors.EXIT_USAGE, as_json=as_json, kind="usage")


@both_forms
def test_unknown_verb(imager, as_json: bool) -> None:
    ended = imager(*(["--json"] if as_json else []), "bakcup")
    assert "backup" in refused(ended, errors.EXIT_USAGE, as_json=as_json, kind="usage")


@both_forms
@with_repository
def test_no_repository_named(imager, arguments, verb: str, as_json: bool) -> None:
    ended = imager(*arguments(verb), *(["--json"] if as_json else []))
    refused(ended, errors.EXIT_USAGE, as_json=as_json, kind="usage")


@both_forms
@with_repository
@pytest.mark.parametrize("what", ["nothing", "an empty folder", "a file", "another folder"])
def test_no_repository_there(imager, arguments, tmp_path: Path, verb: str, as_json: bool, what: str) -> None:
    place = tmp_path / "place"
    if what == "a file":
        place.write_bytes(b"hello")
    elif what != "nothing":
        place.mkdir()
        if what == "another folder":
            (place / "letter.txt").write_text("dear reader")
    before = sorted(place.rglob("*")) if place.is_dir() else None
    ended = imager("-r", place, *arguments(verb), *(["--json"] if as_json else []))
    message = refused(ended, errors.EXIT_NO_REPOSITORY, as_json=as_json, kind="no-repository")
    assert str(place) in message
    assert before is None or sorted(place.rglob("*")) == before


@both_forms
@with_repository
@pytest.mark.parametrize(
    "config", [b"", b"\0" * 512, b"{", b"[]", b'{"format":"imager","version":1}', b"\xff" * 99]
)
def test_garbage_repository(
    imager, arguments, tmp_path: Path, verb: str, as_json: bool, config: bytes
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (place / "config").write_bytes(config)
    ended = imager("-r", place, *arguments(verb), *(["--json"] if as_json else []))
    assert ended.code in (errors.EXIT_NO_REPOSITORY, errors.EXIT_INTEGRITY)
    refused(ended, ended.code, as_json=as_json)


@both_forms
@pytest.mark.parametrize("verb", ["show", "verify", "diff", "restore"])
def test_no_such_set(imager, arguments, repository: Path, tmp_path: Path, verb: str, as_json: bool) -> None:
    words = ["nowhere" if word == "latest" else word for word in arguments(verb)]
    ended = imager("-r", repository, *words, *(["--json"] if as_json else []))
    assert "nowhere" in refused(ended, ended.code, as_json=as_json)
    assert ended.code in (errors.EXIT_FAILED, errors.EXIT_USAGE)
    assert not (tmp_path / "out.img").exists()


@both_forms
@pytest.mark.parametrize("source", ["no-such-file.img", "folder"])
def test_a_source_that_is_none(imager, repository: Path, tmp_path: Path, source: str, as_json: bool) -> None:
    (tmp_path / "folder").mkdir()
    ended = imager("-r", repository, "backup", tmp_path / source, *(["--json"] if as_json else []))
    assert source in refused(ended, ended.code, as_json=as_json)
    assert ended.code in (errors.EXIT_FAILED, errors.EXIT_USAGE)


@both_forms
def test_a_folder_as_target(imager, repository: Path, tmp_path: Path, as_json: bool) -> None:
    ended = imager("-r", repository, "restore", "disk", tmp_path, *(["--json"] if as_json else []))
    refused(ended, errors.EXIT_GUARD, as_json=as_json, kind="guard")


@pytest.mark.parametrize("verb", ["list", "show", "devices", "diff", "pin"])
def test_a_query_is_one_document(imager, arguments, repository: Path, verb: str) -> None:
    words = arguments(verb) if verb in NEEDS_REPOSITORY else [verb]
    ended = imager.ok("-r", repository, *words, "--json")
    assert isinstance(ended.document, dict)
    assert ended.err == ""


@pytest.mark.parametrize("verb", ["backup", "verify", "check", "restore", "forget", "prune"])
def test_a_long_job_is_a_stream_that_ends_in_its_summary(
    imager, arguments, repository: Path, verb: str
) -> None:
    ended = imager.ok("-r", repository, *arguments(verb), "--json")
    kinds = [message["message_type"] for message in ended.messages]
    assert kinds[-1] == "summary" and "summary" not in kinds[:-1]
    assert set(kinds) <= {"progress", "note", "warning", "summary"}
    assert ended.err == ""


@pytest.mark.parametrize("verb", ["backup", "restore", "forget", "prune"])
@both_forms
def test_a_dry_run_changes_nothing(
    imager, arguments, repository: Path, tmp_path: Path, verb, as_json
) -> None:
    before = sorted(repository.rglob("*"))
    form = ["--json"] if as_json else []
    ended = imager.ok("-r", repository, *arguments(verb), "--dry-run", *form)
    assert ended.out
    if as_json:
        assert ended.messages[-1]["message_type"] == "plan"
    assert sorted(repository.rglob("*")) == before
    assert not (tmp_path / "out.img").exists()


def test_every_exit_code_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/exit-codes.md").read_text()
    for name, code in vars(errors).items():
        if name.startswith("EXIT_"):
            assert f"| {code} |" in page, name


def test_the_reference_page_is_current() -> None:
    from imager.cli.manual import page

    path = Path(__file__).parents[2] / "docs/reference/commands.md"
    assert path.read_text() == page(), "run: python -m imager.cli.manual > docs/reference/commands.md"


def field_names(value: object) -> set[str]:
    """Every name in a JSON document, but those of `source` and `stats`, which are free."""
    if isinstance(value, list):
        return set().union(*map(field_names, value))
    if not isinstance(value, dict):
        return set()
    below = [field_names(one) for key, one in value.items() if key not in ("source", "stats", "root")]
    return set(value).union(*below)


@pytest.mark.parametrize(
    "verb",
    ["list", "show", "devices", "diff", "backup", "verify", "check", "restore", "forget", "pin", "prune"],
)
def test_every_field_is_documented(imager, arguments, repository: Path, verb: str) -> None:
    page = (Path(__file__).parents[2] / "docs/reference/json.md").read_text()
    words = arguments(verb) if verb in NEEDS_REPOSITORY else [verb]
    dry = [["--dry-run"]] if verb in ("forget", "prune") else []
    messages = [imager.ok("-r", repository, *words, "--json", *more).messages for more in ([], *dry)]
    for name in field_names(messages):
        assert f"`{name}`" in page, name
