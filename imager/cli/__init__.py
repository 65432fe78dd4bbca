"""The command line: it parses, calls and renders, and holds no logic.

Invariant: nothing heavier than click is imported before a verb runs.
"""
