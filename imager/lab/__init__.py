"""A rehearsal of everything, on disks that the lab makes itself.

Invariant: nothing is written outside the lab's own folder and the loop
devices over its files, and what a step claims is judged by means that are not
the engine's own.
"""
