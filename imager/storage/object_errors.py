"""What an object store answers, as an error of a storage.

Invariant: no exception of the client library leaves the storage wing. What
may pass by itself (overload, a broken connection, a timeout) is `Unavailable`;
what will not is told once, with what to do about it.
"""

from __future__ import annotations

import re

from msgspec import Struct

from imager.storage.errors import AlreadyExists, Gone, NotFound, Retained, StorageError, Unavailable

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<(?:Code|code)>([A-Za-z0-9]+)</")
_SAID = re.compile(r"<(?:Message|message)>([^<]{1,300})</")
_KIND = re.compile(r"kind: (\w+)")

_PASSING = frozenset(
    ("SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError", "ConditionalRequestConflict",
     "OperationAborted", "RequestTimeTooSkewedRetry", "ServerBusy", "OperationTimedOut")
)  # fmt: skip

_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound")
_IMMUTABLE = frozenset(("BlobImmutableDueToPolicy", "RetentionPolicyNotMet", "ObjectLocked"))
_LOCKED = re.compile(r"object lock|retention policy|immutable|WORM", re.IGNORECASE)

CREDENTIALS = "check the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...)"
_HINTS = {
    "InvalidAccessKeyId": CREDENTIALS,
    "SignatureDoesNotMatch": "the secret key is another than the store knows: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session's credentials have expired: obtain new ones",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
    "AccessDenied": "the key in use may not do this: it needs to get, put and list objects"
    " (and to delete them, for prune)",
    "PermanentRedirect": "the bucket is in another region: set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region: set AWS_REGION",
    "InvalidBucketName": "a bucket's name has 3 to 63 lower-case letters, digits and hyphens",
    "NotImplemented": "this store lacks conditional writes: imager doctor tells; use another one",
    "QuotaExceeded": "raise the quota of the bucket, or free some space there",
    "EntityTooLarge": "this store takes no objects of 64 MiB: use another one",
}


class ChecksumWanted(StorageError):
    """The bucket locks what is written, and takes nothing without a checksum."""


class Told(Struct, frozen=True):
    """What a store answered: the HTTP status, its own word for what is wrong, and a sentence."""

    status: int
    code: str
    said: str = ""

    @property
    def passing(self) -> bool:
        """Whether the same may be answered otherwise in a while."""
        return self.code in _PASSING or self.status == 429 or (self.status >= 500 and self.status != 501)

    @property
    def why(self) -> str:
        """The same for a person."""
        return f"{self.code}: {self.said}" if self.said else self.code or f"status {self.status}"


def failure(error: BaseException, doing: str, url: str) -> StorageError:
    """The error to raise for `error` of the client, met while `doing` (such as "writing sets/12")."""
    kind = type(error).__name__
    text = str(error)
    # The long form repeats the answer; what comes before it is enough.
    head, _, detail = text.partition("\n\nDebug source:")
    status = int(found[1]) if (found := _STATUS.search(head)) else 0
    code = found[1] if (found := _CODE.search(head)) else ""
    said = found[1] if (found := _SAID.search(head)) else ""
    told = Told(status, code, said)
    if told.passing or code in _NO_BUCKET:
        made = refusal(told, doing, url)
    elif kind in ("FileNotFoundError", "NotFoundError"):
        made = NotFound(f"{doing} failed: it is not in {url}")
    elif kind == "AlreadyExistsError":
        made = AlreadyExists(f"{doing} failed: the name is taken in {url}")
    elif status or kind in ("PermissionDeniedError", "UnauthenticatedError"):
        made = refusal(Told(status or 403, code, said), doing, url)
    else:
        made = _without_answer(kind, head, detail, doing, url)
    made.status = status  # type: ignore[attr-defined]
    return made


def refusal(told: Told, doing: str, url: str) -> StorageError:
    """The error to raise for an answer that says no."""
    status, code, said = told.status, told.code, told.said
    if code in _NO_BUCKET:
        return Gone(
            f"{doing} failed: there is no such bucket ({url})",
            hint="create the bucket with the store's own tools, or check the address",
        )
    if told.passing:
        why = code or f"status {status}"
        return Unavailable(
            f"{doing} failed: the store answers {why}{': ' + said if said else ''} ({url})",
            hint="it is overloaded or out of order: try again later",
        )
    if "checksum" in said.lower() and ("InvalidRequest" in code or "ObjectLock" in code):
        return ChecksumWanted(f"{doing} failed: {said} ({url})", hint="set AWS_CHECKSUM_ALGORITHM=SHA256")
    if code in _IMMUTABLE or (status in (401, 403, 409) and _LOCKED.search(said)):
        return Retained(
            f"{doing} failed: the store keeps it locked: {told.why} ({url})",
            hint="its lock runs out some day: try again then",
        )
    if status in (401, 403):
        why = told.why if code else "access denied"
        return StorageError(
            f"{doing} failed: the store refuses it: {why} ({url})",
            hint=_HINTS.get(code, _HINTS["AccessDenied"]),
        )
    return StorageError(f"{doing} failed: the store answers {told.why} ({url})", hint=_HINTS.get(code))


def _without_answer(kind: str, head: str, detail: str, doing: str, url: str) -> StorageError:
    """No answer came: the connection, or what should have made it."""
    low = detail.lower()
    if "certificate" in low or "invalidcontenttype" in low:
        return StorageError(
            f"{doing} failed: no trusted TLS connection to {url}",
            hint="check the endpoint (https or http?), and that the store's certificate is known here",
        )
    if "credential" in low or "169.254.169.254" in head:
        return StorageError(f"{doing} failed: there are no credentials for {url}", hint=CREDENTIALS)
    if "builder error" in head:
        return StorageError(
            f"{doing} failed: the endpoint of {url} cannot be used", hint="check AWS_ENDPOINT_URL"
        )
    if kind == "GenericError" and ("HTTP error" in head or _KIND.search(detail)):
        how = found[1] if (found := _KIND.search(detail)) else ""
        why = {"Connect": "it cannot be reached", "Timeout": "no answer in time"}.get(
            how, "the connection broke off"
        )
        return Unavailable(
            f"{doing} failed: {why} ({url})",
            hint="check the network, and the endpoint (AWS_ENDPOINT_URL)",
        )
    return StorageError(f"{doing} failed: {head.strip() or kind} ({url})")
