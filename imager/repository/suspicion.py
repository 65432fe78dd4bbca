"""What may be an attack, told where a person looks at a repository.

Invariant: nothing here decides anything; what can be refused is refused where it is read.
"""

from __future__ import annotations

from collections.abc import Iterable

from imager.errors import IntegrityError, NoRepository
from imager.repository import imageset, tombstones
from imager.repository.imageset import Damaged, Head, Listing, Manifest
from imager.repository.repository import Repository
from imager.repository.witness import Witness
from imager.repository.writers import ANY_HOST


def of_listing(repository: Repository, listing: Listing) -> list[str]:
    """Sets that are gone or were replaced since this machine saw them, times to come, revocations undone.

    Raises `StorageError`.
    """
    found = of_history(repository, listing.sets, listing.problems)
    found += [
        f"image set {set_id} says that it was taken in the future: a wrong clock, or a forgery"
        for set_id in imageset.ahead(listing.sets)
    ]
    return found + of_keys(repository)


def of_history(
    repository: Repository, sets: Iterable[Manifest] | Iterable[Head], damaged: Iterable[Damaged]
) -> list[str]:
    """Sets that are gone or were replaced since this machine saw them. Raises `StorageError`.

    `damaged`: those that are there and cannot be used, which is another problem.
    """
    return Witness(repository.place).observe(
        list[Manifest | Head](sets),
        damaged=[one.id for one in damaged],
        forgotten=tombstones.digests(repository),
        there=tombstones.exists(repository),
        genuine=lambda one: _is_genuine(repository, one),
    )


def _is_genuine(repository: Repository, one: Manifest | Head) -> bool:
    """Whether a set is of the lineage that it names, as far as the key tells.

    A key that cannot read it knows no more than the certificate, so it takes those of its own machine only.
    """
    if isinstance(one, Head):
        try:
            one = imageset.read_head(repository, one)
        except (IntegrityError, NoRepository, imageset.NoSuchSet):
            return False
    writer = one.public.writer
    return one.body is not None or writer is None or writer.host in (ANY_HOST, imageset.this_host())


def of_keys(repository: Repository) -> list[str]:
    """Revocations that were forged or taken away. Raises `StorageError`."""
    if not repository.sealed:
        return []
    repository.revoked()
    return [f"{name}: {detail}" for name, detail in repository.revocation_problems]
