"""What an object store answers, as an error of a storage.

Invariant: no exception of the client library leaves the storage wing. What
may pass by itself (overload, a broken connection, a timeout) is `Unavailable`;
what will not is told once, with what to do about it.
"""

from __future__ import annotations

import re

from imager.storage.errors import AlreadyExists, Gone, NotFound, StorageError, Unavailable

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<(?:Code|code)>([A-Za-z0-9]+)</")
_SAID = re.compile(r"<(?:Message|message)>([^<]{1,300})</")
_KIND = re.compile(r"kind: (\w+)")

_PASSING = frozenset(
    ("SlowDown", "RequestTimeout", "ServiceUnavailable", "InternalError", "ConditionalRequestConflict",
     "OperationAborted", "RequestTimeTooSkewedRetry", "ServerBusy", "OperationTimedOut")
)  # fmt: skip

_CREDENTIALS = "check the credentials in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...)"
_HINTS = {
    "InvalidAccessKeyId": _CREDENTIALS,
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


def failure(error: BaseException, doing: str, url: str) -> StorageError:
    """The error to raise for `error` of the client, met while `doing` (such as "writing sets/12")."""
    kind = type(error).__name__
    text = str(error)
    # The long form repeats the answer; what comes before it is enough.
    head, _, detail = text.partition("\n\nDebug source:")
    status = int(found[1]) if (found := _STATUS.search(head)) else 0
    code = found[1] if (found := _CODE.search(head)) else ""
    made = _made(kind, head, detail, status, code, doing, url)
    made.status = status  # type: ignore[attr-defined]
    return made


def _made(kind: str, head: str, detail: str, status: int, code: str, doing: str, url: str) -> StorageError:
    said = found[1] if (found := _SAID.search(head)) else ""
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return Gone(
            f"{doing} failed: there is no such bucket ({url})",
            hint="create the bucket with the store's own tools, or check the address",
        )
    if code in _PASSING or status == 429 or (status >= 500 and status != 501):
        why = code or f"status {status}"
        return Unavailable(
            f"{doing} failed: the store answers {why}{': ' + said if said else ''} ({url})",
            hint="it is overloaded or out of order: try again later",
        )
    if kind in ("FileNotFoundError", "NotFoundError"):
        return NotFound(f"{doing} failed: it is not in {url}")
    if kind == "AlreadyExistsError":
        return AlreadyExists(f"{doing} failed: the name is taken in {url}")
    if status in (401, 403) or kind in ("PermissionDeniedError", "UnauthenticatedError"):
        why = f"{code}: {said}" if said else code or "access denied"
        return StorageError(
            f"{doing} failed: the store refuses it: {why} ({url})",
            hint=_HINTS.get(code, _HINTS["AccessDenied"]),
        )
    if status:
        why = f"{code}: {said}" if said else code or f"status {status}"
        return StorageError(f"{doing} failed: the store answers {why} ({url})", hint=_HINTS.get(code))
    return _without_answer(kind, head, detail, doing, url)


def _without_answer(kind: str, head: str, detail: str, doing: str, url: str) -> StorageError:
    """No answer came: the connection, or what should have made it."""
    low = detail.lower()
    if "certificate" in low or "invalidcontenttype" in low:
        return StorageError(
            f"{doing} failed: no trusted TLS connection to {url}",
            hint="check the endpoint (https or http?), and that the store's certificate is known here",
        )
    if "credential" in low or "169.254.169.254" in head:
        return StorageError(f"{doing} failed: there are no credentials for {url}", hint=_CREDENTIALS)
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
