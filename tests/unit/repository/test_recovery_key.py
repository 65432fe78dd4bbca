"""A recovery key survives paper: what was written is read back, and a typing error is named by its group."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imager import reference
from imager.errors import UsageError
from imager.repository import recovery_key
from imager.repository.recovery_key import ALPHABET, SIZE, decode, encode
from imager.repository.recovery_sheet import FORMATS, Sheet, qr_lines, render

KEYS = st.binary(min_size=SIZE, max_size=SIZE)
CHARACTERS = st.sampled_from(ALPHABET)


@given(KEYS)
def test_what_is_written_is_read_back(key: bytes) -> None:
    text = encode(key)
    assert len(text.split("-")) == 8 and set(text) <= set(ALPHABET) | {"-"}
    assert decode(text) == key == reference.parse_recovery_key(text)
    for typed in (text.lower(), text.replace("-", ""), text.replace("-", " \n"), f"  {text} "):
        assert decode(typed) == key == reference.parse_recovery_key(typed)
    assert decode(text.replace("0", "o").replace("1", "l")) == key
    assert decode(text.replace("0", "O").replace("1", "I")) == key


@given(KEYS, st.integers(0, 39), CHARACTERS)
def test_a_wrong_character_is_named_by_its_group(key: bytes, at: int, other: str) -> None:
    plain = encode(key).replace("-", "")
    if plain[at] == other:
        return
    with pytest.raises(UsageError, match=f"group {at // 5 + 1} of 8") as caught:
        decode(plain[:at] + other + plain[at + 1 :])
    assert plain[:5] not in caught.value.message + str(caught.value.hint), "the key is not repeated"
    with pytest.raises(reference.UsageError, match=f"group {at // 5 + 1} of 8"):
        reference.parse_recovery_key(plain[:at] + other + plain[at + 1 :])


@given(KEYS, st.integers(0, 39), st.integers(0, 39))
def test_exchanged_characters_are_noticed(key: bytes, one: int, two: int) -> None:
    plain = list(encode(key).replace("-", ""))
    plain[one], plain[two] = plain[two], plain[one]
    if plain != list(encode(key).replace("-", "")):
        with pytest.raises(UsageError, match="look at group"):
            decode("".join(plain))


@given(KEYS, st.integers(0, 7), st.integers(0, 7))
def test_exchanged_groups_are_noticed(key: bytes, one: int, two: int) -> None:
    groups = encode(key).split("-")
    groups[one], groups[two] = groups[two], groups[one]
    if groups != encode(key).split("-"):
        with pytest.raises(UsageError, match=f"groups .*{min(one, two) + 1}, {max(one, two) + 1} of 8"):
            decode("-".join(groups))


@pytest.mark.parametrize("text", ["", "0", "0" * 39, "0" * 41, "-" * 40])
def test_another_length_is_told(text: str) -> None:
    with pytest.raises(UsageError, match="40|8 groups of 5"):
        decode(text)


@given(st.text(max_size=60))
def test_garbage_is_a_usage_error(text: str) -> None:
    for parse, error in ((decode, UsageError), (reference.parse_recovery_key, reference.UsageError)):
        try:
            assert len(parse(text)) == SIZE
        except error:
            pass


# --- the sheet -----------------------------------------------------------------------------


SHEET = Sheet(encode(bytes(range(SIZE))), "ab" * 16, "/srv/backup & <more>", "cd" * 16, 1_790_000_000.0)


def scanned(picture: Path) -> str:
    """What an independent decoder reads."""
    done = subprocess.run(
        ["zbarimg", "--quiet", "--raw", "-Sdisable", "-Sqrcode.enable", str(picture)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_the_code_as_a_picture_is_the_key(tmp_path: Path) -> None:
    (tmp_path / "code.png").write_bytes(render(SHEET, "png"))
    assert decode(scanned(tmp_path / "code.png")) == bytes(range(SIZE))


@pytest.mark.parametrize("on_dark", [False, True])
def test_the_code_in_characters_is_the_key(tmp_path: Path, on_dark: bool) -> None:
    """Each half of a character is a module, drawn here as 6 by 6 pixels of a PGM picture."""
    rows: list[str] = []
    for line in qr_lines(SHEET.key, on_dark=on_dark):
        rows.append("".join("1" if c in "█▀" else "0" for c in line))
        rows.append("".join("1" if c in "█▄" else "0" for c in line))
    black = "0" if on_dark else "1"
    pixels = "".join(
        ("".join(("0 " if module == black else "255 ") * 6 for module in row) + "\n") * 6 for row in rows
    )
    (tmp_path / "code.pgm").write_text(f"P2\n{len(rows[0]) * 6} {len(rows) * 6}\n255\n{pixels}")
    assert decode(scanned(tmp_path / "code.pgm")) == bytes(range(SIZE))


@pytest.mark.parametrize("form", ["text", "html"])
def test_the_sheet_can_be_typed_off(form: str) -> None:
    sheet = render(SHEET, form).decode()
    assert SHEET.repository in sheet and SHEET.slot in sheet
    assert ("/srv/backup & <more>" if form == "text" else "/srv/backup &amp; &lt;more&gt;") in sheet
    lines = sheet.replace("<br>", "\n").replace('<p class="key">', "\n").replace("</p>", "\n").splitlines()
    typed = [line.strip() for line in lines if line.strip().count("-") == 3 and len(line.strip()) == 23]
    assert len(typed) == 2 and decode("".join(typed)) == bytes(range(SIZE))


def test_forms() -> None:
    assert render(SHEET, "svg").startswith(b"<?xml") and b"<svg" in render(SHEET, "html")
    assert set(FORMATS) == {"text", "html", "svg", "png"}
    with pytest.raises(UsageError):
        render(SHEET, "pdf")
    assert len({recovery_key.new() for _ in range(10)}) == 10
