"""What of a source is kept beside its blocks: its layout, and the system that is on it.

Invariant: looking changes nothing on a source; nothing is ever mounted so that it could be written to.
"""
