"""An image set as JSON and as text, for the verbs that show sets.

Invariant: what a key cannot read is shown as not readable, never left out
silently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from imager.repository.manifest import Manifest


def document(manifest: Manifest) -> dict[str, Any]:
    """The set for `--json`. With a key that can only write, the fields of the sealed part are missing."""
    from imager.cli.shell import plain

    fields: dict[str, Any] = {
        "set": manifest.id,
        "created": manifest.created,
        "lineage": manifest.lineage,
        "sequence": manifest.sequence,
        "previous": plain(manifest.previous),
        "digest": manifest.digest.hex(),
        "readable": manifest.body is not None,
        "writer": plain(manifest.public.writer),
    }
    if manifest.body is not None:
        fields |= plain(manifest.body)
    return fields
