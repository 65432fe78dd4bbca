"""Who may sign image sets: the repository's key, and the writers that it certified and has not revoked.

Invariant: a signature counts only if a chain of signatures leads from it to the
repository's key, which no key that can write only holds. Of a revoked writer
only those sets count that the revocation names by their digests; no clock takes part.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from imager.errors import IntegrityError
from imager.repository.format import (
    MAX_JSON,
    Certificate,
    Revocation,
    canonical,
    certificate_message,
    is_id,
    now,
    parse,
    revocation_message,
    shape,
    unhex,
)
from imager.repository.keys import is_signed, public_key, sign

ANY_HOST = "*"
Revoked = Mapping[str, frozenset[bytes]]
"Ids of revoked writers, and the digests of the sets of each that still count."


def certify(
    repository: bytes, signing_seed: bytes, *, host: str, label: str, seed: bytes | None = None
) -> tuple[bytes, Certificate]:
    """A new writer: (its signing seed, the repository's certificate of it)."""
    seed = seed or os.urandom(32)
    bare = Certificate(os.urandom(16).hex(), host, label, public_key(seed).hex(), "")
    signature = sign(signing_seed, certificate_message(repository, bare))
    return seed, Certificate(bare.writer, host, label, bare.public, signature.hex())


def is_certified(repository: bytes, verify_key: bytes, certificate: Certificate) -> bool:
    """Whether the certificate is by this repository's key."""
    try:
        signature = unhex(certificate.signature, 64, "certificate")
        unhex(certificate.public, 32, "certificate")
    except IntegrityError:
        return False
    return is_id(certificate.writer) and is_signed(
        verify_key, signature, certificate_message(repository, certificate)
    )


def new_revocation(repository: bytes, signing_seed: bytes, writer: str, sets: Iterable[bytes]) -> bytes:
    """The object `revoked/<writer>`: of its sets only those with these digests still count."""
    digests = sorted({digest.hex() for digest in sets})
    value = {"writer": writer, "repository": repository, "created": now(), "sets": digests}
    signature = sign(signing_seed, revocation_message(value))
    return canonical({**value, "signature": signature})


def parse_revocation(raw: bytes, name: str, repository: bytes, verify_key: bytes) -> Revocation:
    """The object `revoked/<name>`, its signature checked. Raises `IntegrityError`."""
    what = f"the revocation of writer {name}"
    value = parse(raw, what, MAX_JSON)
    revocation = shape(value, Revocation, what)
    if revocation.writer != name or revocation.repository != repository.hex():
        raise IntegrityError(f"{what} is damaged: it belongs to another name or repository")
    for digest in revocation.sets:
        unhex(digest, 32, what)
    if not is_signed(verify_key, unhex(revocation.signature, 64, what), revocation_message(value)):
        raise IntegrityError(f"{what} is not signed by this repository's key")
    return revocation


def kept(revocation: Revocation) -> frozenset[bytes]:
    """Digests of the sets that a revocation lets count."""
    return frozenset(bytes.fromhex(digest) for digest in revocation.sets)
