"""Why an ssh ended, said in words that help.

Invariant: what ssh itself said is always part of the message; only the hint is
a guess, made from words that OpenSSH has used for many years.
"""

from __future__ import annotations

from collections.abc import Sequence

from imager.errors import StorageError
from imager.storage import wire
from imager.storage.errors import Unavailable

# What ssh says, what that means, what to do, and whether waiting may help.
_MEANINGS = (
    (
        ("REMOTE HOST IDENTIFICATION HAS CHANGED",),
        "the host key of {host} is not the one that is known",
        "if the machine was installed anew, remove the old key with ssh-keygen -R; "
        "if not, somebody may be in between",
        False,
    ),
    (
        ("Host key verification failed", "No matching host key", "key is not known by any other names"),
        "the host key of {host} is not known",
        "connect once by hand with ssh, compare the fingerprint, and accept it",
        False,
    ),
    (
        ("Permission denied", "Too many authentication failures", "No supported authentication methods"),
        "{host} did not let us in",
        "try the same by hand: ssh must get in without imager; "
        "an unattended run needs a key without a question, or an agent",
        False,
    ),
    (
        ("Could not resolve hostname",),
        "the host {host} is not known",
        "check the name, and the Host entries of ~/.ssh/config",
        True,
    ),
    (
        ("Connection refused",),
        "{host} refuses the connection",
        "is an ssh server running there, and is the port right?",
        True,
    ),
    (
        ("timed out", "No route to host", "Network is unreachable", "not responding", "Host is down"),
        "{host} does not answer",
        "check the network, and whether the machine is on",
        True,
    ),
    (
        ("Bad configuration option", "terminating, ", "Bad owner or permissions"),
        "ssh does not accept its configuration",
        "try the same by hand with ssh, and mend ~/.ssh/config",
        False,
    ),
)


def explain(host: str, code: int | None, said: Sequence[str]) -> StorageError:
    """The error to raise where ssh ended with `code` (None: it still runs) and said `said`."""
    # An imager's own error is followed by its hint; ssh says what matters last.
    errors = [line for line in said if line.startswith("error: ")]
    last = wire.printable((errors or list(said))[-1], 300) if said else ""
    reason = f" ({last})" if last else ""
    if code in (126, 127):
        return StorageError(
            f"imager cannot be run on {host}{reason}",
            hint="install it there where a plain ssh command finds it, "
            "or name it with IMAGER_REMOTE=/path/to/imager",
        )
    if code == 255:
        # A change of the host key comes in a box of at signs: any line may be the one that tells.
        text = "\n".join(said)
        for words, meaning, hint, waiting in _MEANINGS:
            if any(word in text for word in words):
                kind = Unavailable if waiting else StorageError
                return kind(meaning.format(host=host) + reason, hint=hint)
    if code is not None and 0 <= code < 128:
        return StorageError(
            f"the command at the far end, {host}, ended with code {code}{reason}",
            hint="is it imager serve --stdio that runs there? look at command= in its authorized_keys",
        )
    how = "the far end has hung up" if code is None else f"ssh ended with code {code}"
    if code is not None and code < 0:
        how = f"ssh was ended by signal {-code}"
    return Unavailable(
        f"the connection to {host} broke: {how}{reason}", hint="if it always does, ssh -v tells more"
    )
