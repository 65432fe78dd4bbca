"""A rehearsal of everything, on disks that the lab makes itself.

Invariant: nothing is written outside the lab's own folder and the loop
devices over its files, and what a step claims is judged by means that are not
the engine's own.
"""

from __future__ import annotations

from imager.lab.report import LabSummary, Row
from imager.lab.run import DEFAULT_SIZE, LabOptions, run

__all__ = ["DEFAULT_SIZE", "LabOptions", "LabSummary", "Row", "run"]
