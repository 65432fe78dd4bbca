"""A repository opened without any key: for scrub, sync, and what else needs no secret.

Invariant: nobody is asked for a secret, and nothing that needs one is
attempted: a block or a sealed part is out of reach, not merely unwanted. What
can be told without keys is believed only as far as the repository's own
signatures and digests carry.
"""

from __future__ import annotations

import os

from imager.errors import IntegrityError, WrongKey
from imager.repository import keys
from imager.repository.format import SEALED, Config, config_message
from imager.repository.keys import Secrets
from imager.repository.repository import Repository, read_config
from imager.storage.base import Storage


class Keyless(Repository):
    """A sealed repository as it looks to one who has no key of it."""

    def __init__(self, storage: Storage, config: Config) -> None:
        # The vault must have some id key; a fresh one, used by nobody, cannot give a block a true id.
        super().__init__(storage, config, Secrets(os.urandom(32), b"", {}))
        self.secrets = Secrets(b"", b"", {})

    def session_key(self, envelope: bytes) -> int:
        """Raises `WrongKey`."""
        raise WrongKey("nothing can be decrypted without a key", hint="give a passphrase or a keyfile")


def open_keyless(storage: Storage, *, writing: bool = False) -> Repository:
    """Open a repository without a secret; one that is not encrypted opens in full.

    Raises `NoRepository`, `IntegrityError`, `StorageError`.
    """
    config, value = read_config(storage, writing=writing)
    if config.encryption != SEALED:
        return Repository(storage, config, Secrets(bytes.fromhex(config.id_key), b"", {}))
    # Its own key signs it: this tells damage, not who made it. Only a slot's secret could tell that.
    if not keys.is_signed(
        bytes.fromhex(config.verify_key), bytes.fromhex(config.seal), config_message(value)
    ):
        raise IntegrityError("config is damaged: its signature is not by the key that it names")
    return Keyless(storage, config)


def is_keyless(repository: Repository) -> bool:
    """Whether the repository was opened without a key that it has."""
    return isinstance(repository, Keyless)
