"""Crash consistency: disks copied at a random moment of random work, imaged by used blocks, restored.

Invariant: what was fsynced before the moment, and not touched since, is there byte for byte; a restore is,
entry for entry, what the kernel makes of the copy with all its blocks. Anything less ends with exit code 1.
The same copies go through partclone, whose losses are told but change no exit code.

    python tests/bench/crash_consistency.py                    40 trials of each filesystem (root)
    python tests/bench/crash_consistency.py --trials 200 --kinds ext,xfs --seed 7
    python tests/bench/crash_consistency.py --smeared          copies as dd makes them, a MiB at a time

A copy is made at one instant by cloning the disk's file on a filesystem that shares blocks: what a crash
leaves. With --smeared there is no such instant, and nothing can be promised of it; then only the comparison
with the copy itself counts.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__)
sys.path.insert(0, str(HERE.parents[2]))

from report import table  # noqa: E402

from imager.lab import rig  # noqa: E402
from tests.crash import trial as trials  # noqa: E402
from tests.crash.trial import Outcome, Trial  # noqa: E402


def outcomes(trial: Trial) -> dict[str, Outcome | None]:
    """By the name of the tool."""
    return {"imager": trial.imager, "partclone": trial.partclone, "partclone -F": trial.forced}


def told(trial: Trial) -> str:
    """One line for one trial."""
    parts = [
        f"{trial.kind:5} seed {trial.seed:<5} {trial.operations:4} operations {trial.promised:4} promised"
    ]
    for name, out in outcomes(trial).items():
        if out is not None:
            parts.append(f"{name}: {_word(out)}")
    if trial.kernel_lost:
        parts.append(f"lost by the kernel: {len(trial.kernel_lost)}")
    return ", ".join(parts) + (f"  [{trial.options}]" if trial.options else "")


def _word(out: Outcome) -> str:
    if out.code:
        return f"refuses (exit {out.code})"
    if not out.mounts:
        return "exit 0, does not mount"
    if out.lost or out.differing:
        return f"exit 0, {len(out.lost)} fsynced files lost, {len(out.differing)} entries differ"
    return out.problem or ("every block" if out.note else f"whole, {out.fraction:.0%} imaged")


def summary(done: list[Trial]) -> str:
    """A row for each filesystem and tool."""
    rows = []
    for kind in sorted({trial.kind for trial in done}):
        own = [trial for trial in done if trial.kind == kind and trial.reference]
        for name in ("imager", "partclone", "partclone -F"):
            pairs = [(trial, out) for trial in own if (out := outcomes(trial)[name]) is not None]
            if not pairs:
                continue
            outs = [out for _, out in pairs]
            promised = str(sum(trial.promised for trial, _ in pairs))
            ran = [out for out in outs if out.code == 0]
            rows.append(
                [
                    kind,
                    name,
                    str(len(outs)),
                    promised,
                    str(len(outs) - len(ran)),
                    str(sum(1 for out in ran if not out.good)),
                    str(sum(1 for out in ran if not out.mounts)),
                    str(sum(len(out.lost) for out in ran)),
                    str(sum(1 for out in ran if out.note)),
                ]
            )
    head = ["", "tool", "copies", "fsynced files", "refused", "exit 0 and damaged", "of them do not mount"]
    return table([*head, "fsynced files lost", "every block taken"], rows, False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=40, help="of each filesystem")
    parser.add_argument("--kinds", default="ext,xfs,btrfs")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the others count on from it")
    parser.add_argument("--smeared", action="store_true", help="copies without an instant, as dd makes them")
    parser.add_argument("--no-partclone", action="store_true")
    parser.add_argument("--folder", help="where disks may lie (default: in memory)")
    asked = parser.parse_args()
    if problem := rig.without_devices():
        print(f"cannot run here: {problem}", file=sys.stderr)
        return 2
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    began, done, bad = time.monotonic(), list[Trial](), list[Trial]()
    why: Counter[str] = Counter()
    plan = [(kind, seed) for seed in range(asked.trials) for kind in asked.kinds.split(",")]
    with (
        tempfile.TemporaryDirectory(prefix="imager-crash-", dir=asked.folder or memory) as name,
        trials.Stand(Path(name)).up() as stand,
    ):
        for kind, seed in plan:
            trial = trials.run(
                stand, kind, asked.seed + seed, smeared=asked.smeared, partclone=not asked.no_partclone
            )
            done.append(trial)
            if not trial.imager.good or (trial.kernel_lost and not asked.smeared):
                bad.append(trial)
                print(trial)
            if trial.imager.note:
                why[f"{kind}: {trial.imager.note}"] += 1
            print(told(trial), flush=True)
    print(f"\n{summary(done)}")
    for reason, count in why.most_common():
        print(f"{count:4} x every block of {reason}")
    unmountable = sum(1 for trial in done if not trial.reference)
    if unmountable:
        print(f"{unmountable} copies do not mount even with all their blocks")
    print(f"{len(done)} trials in {time.monotonic() - began:.0f} s, {len(bad)} of them bad")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
