"""The tables that the benchmark prints, plain or as Markdown, and the file of all figures.

Invariant: each figure in a table is a median with its smallest and largest value beside it, and the
machine, the date and the tools' versions stand with the tables.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from limits import Limits
from measure import Spread
from memory import Sparse
from peer_tools import TOOLS
from rounds import Result
from targets import Target

TITLES = {
    "full": "full backup",
    "same": "again, nothing changed",
    "changed": "again, 1 % changed",
    "restore": "restore",
    "verify": "verify",
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> str:
    """Rows under a header, aligned; with pipes if it is to be Markdown."""
    widths = [max(len(row[at]) for row in [header, *rows]) for at in range(len(header))]
    mark = " | " if markdown else "  "

    def line(cells: Sequence[str]) -> str:
        text = mark.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return f"| {text} |" if markdown else text.rstrip()

    rule = line(["-" * width for width in widths])
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def jobs(results: dict[str, Result], markdown: bool) -> str:
    """Seconds per job and tool, with how many times imager is faster."""
    shown = list(TITLES)
    ours = results.get("imager")
    rows = []
    for name, result in results.items():
        cells = [name]
        for job in shown:
            taken = result.seconds(job)
            own = ours.seconds(job) if ours else None
            ratio = f" {taken.median / own.median:.1f}x" if taken and own and result is not ours else ""
            cells.append(f"{taken}{ratio}" if taken else "")
        cells.append(f"{result.stored[-1] / 1e6:.0f}" if result.stored else "")
        cells.append(f"{result.added[-1] / 1e6:.0f}" if result.added else "")
        cells.append(f"{max((result.peak(job) for job in result.runs), default=0) >> 20}")
        rows.append(cells)
    header = ["seconds", *(TITLES[job] for job in shown), "stored MB", "+1 % MB", "peak MiB"]
    return table(header, rows, markdown)


def limit_lines(limits: Limits) -> list[str]:
    """The machine's limits in words."""
    if not limits.backup:
        return ["limits: not measured (needs gcc and liblz4-dev)"]
    rate = limits.bytes_in / 1e6
    backup, whole, restore = (Spread(tuple(v)) for v in (limits.backup, limits.backup_whole, limits.restore))
    return [
        f"limit, backup:  {whole} s whole process, {backup} s inside, {rate / backup.median:.0f} MB/s"
        f" ({limits.bytes_in / 1e6:.0f} MB read, {limits.bytes_out / 1e6:.0f} MB after lz4)",
        f"limit, restore: {restore} s inside, {rate / restore.median:.0f} MB/s",
    ]


def target_table(targets: list[Target], markdown: bool) -> str:
    """The issue's table."""
    rows = [[t.work, t.at_least, t.shown, t.verdict] for t in targets]
    return table(["work", "target", "measured", "met"], rows, markdown)


def peaks(results: dict[str, Result], sparse: Sparse | None, markdown: bool) -> str:
    """Peak memory of imager per job, and the sparse image's figures."""
    ours = results.get("imager")
    rows = [[TITLES[job], f"{ours.peak(job) >> 20}"] for job in ours.runs] if ours else []
    if sparse:
        rows += [[f"sparse 1 TiB, {job}", f"{peak >> 20}"] for job, peak in sparse.peak.items()]
    return table(["imager", "peak MiB"], rows, markdown) if rows else ""


def machine() -> dict[str, object]:
    """What this was measured on, and when."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / (1 << 30)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def versions(names: Sequence[str]) -> dict[str, str]:
    """Each tool's version and how it was run."""
    return {tool.name: f"{tool.version()}: {tool.describe()}" for tool in TOOLS if tool.name in names}
