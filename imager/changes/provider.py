"""What every source of changed-block maps offers.

Invariant: a provider answers with `Changes`, which may name too much and
never too little, or with `Unknown` and a reason that a person can read.
There is no third answer, and `Unknown` always leads to a full scan.

A tracker that runs between two backups (a kernel module, eBPF, dm-era) is a
provider that takes a token at the end of one backup, keeps it in the set's
manifest, and finds it again as `Request.token` at the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from msgspec import Struct, field

from imager.device.identity import Identity
from imager.extents import Extents

UNCHANGED = "unchanged"
ZERO = "zero"


class Changes(Struct, frozen=True):
    """Extents (bytes) that may differ from the base.

    `source` says where the answer comes from, for the set's manifest.
    `exact`: the provider looked at what changed, or the content, itself; where
    False the answer rests on someone's word, and a sample must be checked.
    `elsewhere`: what holds outside the extents: the base's content
    (`UNCHANGED`), or zeroes (`ZERO`, a sparse file's holes).
    """

    extents: Extents
    source: str
    exact: bool
    elsewhere: str = UNCHANGED


class Unknown(Struct, frozen=True):
    """No usable answer; `reason` completes the sentence "the map is not used: ..."."""

    reason: str


class Base(Struct, frozen=True):
    """The state that changes are counted from: an image of an earlier set."""

    set_id: str  # 32 hexadecimal digits
    digest: str  # of the manifest, 64 hexadecimal digits
    size: int  # of the image, in bytes
    source: Mapping[str, Any] = field(default_factory=dict)  # its identity, as the manifest keeps it


class Request(Struct, frozen=True):
    """What is going to be read, and since when. `fd` is open for reading."""

    fd: int
    size: int
    identity: Identity
    base: Base | None
    token: Mapping[str, Any] = field(default_factory=dict)


class Provider(Protocol):
    """One way to know what changed. `name` goes into the manifest."""

    @property
    def name(self) -> str: ...

    def changes(self, request: Request) -> Changes | Unknown:
        """What may differ from `request.base`, now. Reads no content of the source."""
