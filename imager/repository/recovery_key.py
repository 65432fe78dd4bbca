"""A recovery key as text that a person can copy from paper without a mistake going unnoticed.

Invariant: each group checks itself and its place, so that of a text that was
typed wrong the wrong group is named; what is read back is the key that was written.

A key of 160 random bits is 8 groups of 4 characters of Crockford's base 32 (no I, L, O,
U), each followed by a check character: a sum over GF(32) that changes with every single
character, with every exchange of two, and with the number of the group.
"""

from __future__ import annotations

import os

from imager.errors import UsageError

ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
SIZE = 20
"Bytes of a recovery key."
GROUPS, DATA = 8, 4
_VALUES = {character: value for value, character in enumerate(ALPHABET)}
# What people write for what was printed.
_VALUES |= {character.lower(): value for character, value in _VALUES.items()}
_VALUES |= dict.fromkeys("Oo", 0) | dict.fromkeys("IiLl", 1)
_IGNORED = frozenset("-–—_ \t\r\n")


def new() -> bytes:
    """A random recovery key."""
    return os.urandom(SIZE)


def _times_two(value: int) -> int:
    """Multiplication by x in GF(32), modulo x^5 + x^2 + 1."""
    value <<= 1
    return value ^ 0b100101 if value & 32 else value


def _check(group: int, values: list[int]) -> int:
    total = group + 1
    for value in values:
        total = _times_two(total) ^ value
    return _times_two(total)


def encode(key: bytes) -> str:
    """The text of a key of 20 bytes: eight groups of five characters."""
    if len(key) != SIZE:
        raise ValueError(f"a recovery key has {SIZE} bytes")
    number = int.from_bytes(key, "big")
    digits = [number >> shift & 31 for shift in range(155, -1, -5)]
    groups = []
    for group in range(GROUPS):
        values = digits[group * DATA : (group + 1) * DATA]
        groups.append("".join(ALPHABET[value] for value in (*values, _check(group, values))))
    return "-".join(groups)


def decode(text: str) -> bytes:
    """The key of a text as `encode` writes it; case, spaces and dashes do not matter.

    Raises `UsageError` that names the groups that cannot be right; never with what was typed.
    """
    characters = [character for character in text if character not in _IGNORED]
    size = DATA + 1
    if len(characters) != GROUPS * size:
        raise UsageError(
            f"a recovery key has {GROUPS} groups of {size} characters;"
            f" this one has {len(characters)} characters",
            hint="look for a group that is missing, or typed twice",
        )
    wrong: list[int] = []
    number = 0
    for group in range(GROUPS):
        values = [_VALUES.get(one, -1) for one in characters[group * size : (group + 1) * size]]
        if -1 in values or _check(group, values[:DATA]) != values[DATA]:
            wrong.append(group + 1)
            continue
        for value in values[:DATA]:
            number = number << 5 | value
    if wrong:
        named = f"group {wrong[0]}" if len(wrong) == 1 else f"groups {', '.join(map(str, wrong))}"
        raise UsageError(
            f"the recovery key is typed wrong: look at {named} of {GROUPS}",
            hint="compare with the sheet, character by character; 0 and O, 1, I and L are the same",
        )
    return number.to_bytes(SIZE, "big")
