"""A set's disks as a picture: SVG, to scale.

Invariant: what is drawn is well-formed XML whatever a disk calls itself; its size is
bounded by the number of columns, not by the disk; and nothing is told by colour alone: every
figure stands beside the picture as text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from msgspec import Struct

from imager.capture.layout import Layout, Volume, partition_of
from imager.engine.layouts import Occupied
from imager.extents import Extents
from imager.units import format_size

WIDTH = 1040
_LEFT, _BAR = 40, 960
_HEIGHT, _STRIP = 72, 12
_ROW = 20
_MOST_ROWS = 64
_PALETTE = ("#2f6f9f", "#3c8d5a", "#8a5fb0", "#b0713a", "#a8485f", "#4d7f86", "#74802f", "#6b6f8f")
_CHANGED, _LOST, _INK, _PALE = "#e07b00", "#c3002f", "#1d2733", "#5b6875"


class Disk(Struct, frozen=True):
    """One disk of a set. `base`: what it is compared with, in words; None where with nothing."""

    name: str
    size: int
    layout: Layout | None
    occupied: Occupied
    base: str | None


class _Row(Struct):
    colour: str | None
    cells: tuple[str, str, str, str]
    indent: int = 0


def draw(title: str, subtitle: str, disks: Sequence[Disk]) -> str:
    """The picture as the text of an SVG file."""
    body: list[str] = []
    top = 84
    for disk in disks:
        top = _disk(body, disk, top)
    top = _legend(body, top, disks)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}"'
        ' font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12">'
    )
    return "\n".join(
        (
            head,
            f"<title>{text(title)}</title>",
            f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>',
            '<defs><pattern id="unused" width="6" height="6" patternUnits="userSpaceOnUse"'
            ' patternTransform="rotate(45)"><rect width="6" height="6" fill="#f4f6f8"/>'
            '<path d="M0 0V6" stroke="#cdd5dc" stroke-width="2"/></pattern></defs>',
            _text(_LEFT, 36, title, size=20, weight="600"),
            _text(_LEFT, 58, subtitle, colour=_PALE),
            *body,
            "</svg>",
            "",
        )
    )


def text(value: str) -> str:
    """Text for XML: what it forbids is shown as a question mark."""
    kept = (c if c.isprintable() or c == " " else "?" for c in value)
    return escape("".join(kept).encode("utf-8", "replace").decode(), {'"': "&quot;"})


def _text(
    x: float, y: float, value: str, *, colour: str = _INK, size: int = 12, weight: str = "", anchor: str = ""
) -> str:
    more = f' font-weight="{weight}"' if weight else ""
    more += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}"{more}>{text(value)}</text>'


# --- a disk ---------------------------------------------------------------------------


def _disk(out: list[str], disk: Disk, top: int) -> int:
    layout, occupied = disk.layout, disk.occupied
    told = [format_size(disk.size)]
    if layout is not None and layout.table is not None:
        table = layout.table
        kind = "GPT" if table.scheme == "gpt" else "MBR"
        told += [f"{kind} {table.uuid or ''}".strip(), f"sectors of {table.sector} bytes"]
    if layout is not None and layout.boot:
        told.append("starts by " + " and ".join(word.upper() for word in layout.boot))
    out.append(_text(_LEFT, top + 14, disk.name, size=15, weight="600"))
    out.append(_text(_LEFT + _BAR, top + 14, ", ".join(told), colour=_PALE, anchor="end"))
    bar = top + 42
    out.append(
        f'<rect x="{_LEFT}" y="{bar}" width="{_BAR}" height="{_HEIGHT}" fill="#ffffff" stroke="#b8c2cc"/>'
    )
    volumes = list(layout.volumes) if layout is not None else []
    scale = _BAR / max(1, disk.size)
    rows: list[_Row] = []
    columns = _fractions(occupied.data, disk.size)
    zeroes = _fractions(occupied.zero, disk.size)
    colours = ["#8794a1"] * _BAR
    # Ends of labels: one that would stand on another is left to the table below.
    label_end = float(_LEFT)
    for index, volume in enumerate(volumes):
        colour = _PALETTE[index % len(_PALETTE)]
        start = volume.start or 0
        first, last = start * scale, min(disk.size, start + volume.size) * scale
        for column in range(int(first), min(_BAR, max(int(last), int(first) + 1))):
            colours[column] = colour
        rows += _rows(volume, colour, layout, occupied)
        name = volume.name or volume.kind
        x = _LEFT + first
        if x >= label_end:
            shown = f"{name}  {_what(volume)}"
            if 8 * len(shown) > last - first:
                shown = name
            out.append(_text(x + 1, bar - 6, shown, colour=colour, weight="600"))
            label_end = x + 6 + 8 * len(shown)
    filled = [a + b for a, b in zip(columns, zeroes, strict=True)]
    unused = _fractions(occupied.unused, disk.size)
    _density(out, unused, ["url(#unused)"] * _BAR, bar, opacity="1", above=filled)
    _density(out, zeroes, colours, bar, opacity="0.25", above=columns)
    _density(out, columns, colours, bar, opacity="1")
    for volume in volumes:
        x = _LEFT + (volume.start or 0) * scale
        wide = max(1.0, volume.size * scale)
        out.append(
            f'<rect x="{x:.1f}" y="{bar}" width="{wide:.1f}" height="{_HEIGHT}" fill="none"'
            f' stroke="{_INK}" stroke-width="0.8"/>'
        )
    _ticks(out, occupied.unreadable, disk.size, bar, _HEIGHT, _LOST)
    y = bar + _HEIGHT + 4
    if occupied.changed is not None:
        out.append(f'<rect x="{_LEFT}" y="{y}" width="{_BAR}" height="{_STRIP}" fill="#f4f6f8"/>')
        _ticks(out, occupied.changed, disk.size, y, _STRIP, _CHANGED)
        y += _STRIP + 4
    y = _axis(out, disk.size, y)
    y = _table(out, rows, y)
    for line in _sums(disk):
        y += _ROW
        out.append(_text(_LEFT, y, line, colour=_PALE))
    return y + 36


def _fractions(extents: Extents, size: int) -> list[float]:
    """What part of each column's bytes the extents cover."""
    out = [0.0] * _BAR
    if size <= 0:
        return out
    per = size / _BAR
    for start, end in extents:
        first, last = int(start / per), min(_BAR - 1, int((end - 1) / per))
        for column in range(max(0, first), last + 1):
            low, high = max(start, column * per), min(end, (column + 1) * per)
            out[column] = min(1.0, out[column] + max(0.0, high - low) / per)
    return out


def _density(
    out: list[str],
    columns: list[float],
    colours: list[str],
    bar: int,
    *,
    opacity: str,
    above: list[float] | None = None,
) -> None:
    """Columns as high as they are full, from the bottom or upon others; neighbours of one height are one."""
    paths: dict[str, list[str]] = {}
    at = 0
    base = bar + _HEIGHT

    def shape(column: int) -> tuple[int, int, str]:
        high = columns[column] * _HEIGHT
        low = above[column] * _HEIGHT if above else 0.0
        # What is there at all is seen.
        return (max(1, round(high)) if high else 0), round(low), colours[column]

    while at < _BAR:
        high, low, colour = shape(at)
        end = at + 1
        while end < _BAR and shape(end) == (high, low, colour):
            end += 1
        if high:
            low = min(low, _HEIGHT - high)
            paths.setdefault(colour, []).append(
                f"M{_LEFT + at} {base - low}V{base - low - high}H{_LEFT + end}V{base - low}Z"
            )
        at = end
    for colour, parts in paths.items():
        out.append(f'<path d="{"".join(parts)}" fill="{colour}" fill-opacity="{opacity}"/>')


def _ticks(out: list[str], extents: Extents, size: int, y: int, height: int, colour: str) -> None:
    parts = []
    columns = _fractions(extents, size)
    at = 0
    while at < _BAR:
        end = at
        while end < _BAR and columns[end]:
            end += 1
        if end > at:
            parts.append(f"M{_LEFT + at} {y}H{_LEFT + end}V{y + height}H{_LEFT + at}Z")
        at = max(end, at + 1)
    if parts:
        out.append(f'<path d="{"".join(parts)}" fill="{colour}"/>')


def _axis(out: list[str], size: int, y: int) -> int:
    for tenth in range(0, 11, 2):
        x = _LEFT + _BAR * tenth / 10
        anchor = "start" if tenth == 0 else "end" if tenth == 10 else "middle"
        out.append(f'<path d="M{x:g} {y}v5" stroke="{_PALE}"/>')
        out.append(_text(x, y + 17, format_size(size * tenth / 10), colour=_PALE, size=10, anchor=anchor))
    return y + 26


# --- the words below it -----------------------------------------------------------------


def _what(volume: Volume) -> str:
    filesystem = volume.filesystem
    label = filesystem.label if filesystem else volume.luks.label if volume.luks else None
    return f"{volume.kind or 'nothing known'}{f' {label!r}' if label else ''}"


def _rows(volume: Volume, colour: str, layout: Layout | None, occupied: Occupied) -> Iterator[_Row]:
    entry = partition_of(layout, volume.name) if layout is not None else None
    name = entry.name if entry and entry.name else ""
    place = Extents.of([(volume.start or 0, (volume.start or 0) + volume.size)])
    data = (occupied.data & place).total
    said = f"{format_size(data)} of data"
    if occupied.unused & place:
        said += f", {format_size((occupied.unused & place).total)} unused"
    if occupied.changed is not None:
        said += f", {format_size((occupied.changed & place).total)} changed"
    yield _Row(colour, (f"{volume.name} {name}".strip(), _what(volume), format_size(volume.size), said))
    for inner in volume.volumes:
        yield _Row(None, (inner.name, _what(inner), format_size(inner.size), inner.why), 1)


def _table(out: list[str], rows: list[_Row], y: int) -> int:
    for row in rows[:_MOST_ROWS]:
        y += _ROW
        x = _LEFT + 18 * row.indent
        if row.colour:
            out.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{row.colour}"/>')
        for at, cell, most in zip((18, 260, 500, 600), row.cells, (32, 32, 12, 52), strict=True):
            shown = cell if len(cell) <= most else cell[: most - 1] + "…"
            if at == 500:
                out.append(_text(_LEFT + at + 60, y, shown, anchor="end"))
            else:
                out.append(_text(_LEFT + at + (18 * row.indent if at == 18 else 0), y, shown))
    if len(rows) > _MOST_ROWS:
        y += _ROW
        out.append(_text(_LEFT, y, f"and {len(rows) - _MOST_ROWS} more", colour=_PALE))
    return y


def _sums(disk: Disk) -> Iterator[str]:
    occupied = disk.occupied
    words = [f"{format_size(occupied.data.total)} of data", f"{format_size(occupied.zero.total)} of zeroes"]
    if occupied.unused:
        words.append(f"{format_size(occupied.unused.total)} unused")
    if occupied.unreadable:
        words.append(f"{format_size(occupied.unreadable.total)} UNREADABLE when taken")
    if occupied.changed is not None:
        words.append(f"{format_size(occupied.changed.total)} changed since {disk.base}")
    yield "In all: " + ", ".join(words)


def _legend(out: list[str], top: int, disks: Sequence[Disk]) -> int:
    x = _LEFT
    samples = [("data, as high as the place is full", _PALETTE[0], "1"), ("zeroes", _PALETTE[0], "0.25")]
    if any(disk.occupied.unused for disk in disks):
        samples.append(("unused, not imaged", "url(#unused)", "1"))
    if any(disk.occupied.changed is not None for disk in disks):
        samples.append(("changed since the base set", _CHANGED, "1"))
    if any(disk.occupied.unreadable for disk in disks):
        samples.append(("unreadable when taken", _LOST, "1"))
    for words, fill, opacity in samples:
        out.append(
            f'<rect x="{x}" y="{top - 11}" width="14" height="12" fill="{fill}" fill-opacity="{opacity}"'
            ' stroke="#b8c2cc" stroke-width="0.6"/>'
        )
        out.append(_text(x + 20, top, words, colour=_PALE))
        x += 44 + int(6.6 * len(words))
    return top + 24
