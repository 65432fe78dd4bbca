"""What may be an attack, told where a person looks at a repository.

Invariant: nothing here decides anything; what can be refused is refused where it is read.
"""

from __future__ import annotations

from imager.repository import imageset, tombstones
from imager.repository.imageset import Listing
from imager.repository.repository import Repository
from imager.repository.witness import Witness


def of_listing(repository: Repository, listing: Listing) -> list[str]:
    """Sets that are gone or were replaced since this machine saw them, times to come, revocations undone.

    Raises `StorageError`.
    """
    witness = Witness(repository.place)
    found = witness.observe(
        listing.sets,
        damaged=[damaged.id for damaged in listing.problems],
        forgotten=tombstones.digests(repository),
        there=tombstones.exists(repository),
    )
    found += [
        f"image set {set_id} says that it was taken in the future: a wrong clock, or a forgery"
        for set_id in imageset.ahead(listing.sets)
    ]
    return found + of_keys(repository)


def of_keys(repository: Repository) -> list[str]:
    """Revocations that were forged or taken away. Raises `StorageError`."""
    if not repository.sealed:
        return []
    repository.revoked()
    return [f"{name}: {detail}" for name, detail in repository.revocation_problems]
