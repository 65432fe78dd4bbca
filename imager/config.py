"""Where this machine keeps what belongs to no repository: state and cache.

Invariant: nothing secret is ever kept there, and losing it loses no backup.
State is small and worth keeping; a cache can be thrown away at any time.
"""

from __future__ import annotations

import os


def _folder(override: str, xdg: str, home: str, system: str) -> str:
    given = os.environ.get(override)
    if given:
        return given
    base = os.environ.get(xdg)
    if base and os.path.isabs(base):
        return os.path.join(base, "imager")
    if os.geteuid() == 0:
        return system
    return os.path.join(os.path.expanduser("~"), home, "imager")


def state_dir() -> str:
    """What this machine remembers between runs: IMAGER_STATE_DIR, $XDG_STATE_HOME, or /var/lib for root."""
    return _folder("IMAGER_STATE_DIR", "XDG_STATE_HOME", ".local/state", "/var/lib/imager")


def cache_dir() -> str:
    """What this machine could work out again: IMAGER_CACHE_DIR, $XDG_CACHE_HOME, or /var/cache for root."""
    return _folder("IMAGER_CACHE_DIR", "XDG_CACHE_HOME", ".cache", "/var/cache/imager")
