"""The versions that an S3 bucket keeps of its objects, and the locks on them.

Invariant: an object of a repository is made once, so of all versions of a name
the first is the true one. Nothing here shortens a lock or lifts one, and only
`try_delete`, which is for objects of a probe, removes a version.

The client that the repository itself is read and written with knows neither versions nor locks;
these calls go through botocore, which is imported when the first one is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from msgspec import Struct

from imager.errors import UsageError
from imager.storage.base import Storage
from imager.storage.errors import NotFound, StorageError, Unavailable

if TYPE_CHECKING:
    pass

T = TypeVar("T")

Mode: TypeAlias = Literal["GOVERNANCE", "COMPLIANCE"]
MODES: tuple[Mode, Mode] = ("GOVERNANCE", "COMPLIANCE")
_LACKING = frozenset(
    ("ObjectLockConfigurationNotFoundError", "NoSuchObjectLockConfiguration", "NotImplemented",
     "MethodNotAllowed", "XNotImplemented")
)  # fmt: skip


class Version(Struct, frozen=True):
    """One version of an object. `modified` in microseconds since 1970, by the store's clock.

    `deleted`: it is a mark that says that the object was deleted, and has no bytes. `latest`: it
    is what the bucket shows.
    """

    name: str
    id: str
    size: int
    etag: str
    modified: int
    deleted: bool
    latest: bool


class Lock(Struct, frozen=True):
    """That a version can't be removed before `until` (microseconds since 1970)."""

    mode: Mode
    until: int


class Locking(Struct, frozen=True):
    """How a bucket locks. `mode` and `days`: of each new object from its upload on; None: of none.

    `now`: the store's clock, in microseconds since 1970.
    """

    now: int
    mode: Mode | None
    days: int | None


def versions_of(storage: Storage) -> ObjectVersions:
    """The versions of the objects of a storage. Raises `UsageError` where there can be none."""
    from imager.storage.location import bare
    from imager.storage.object_store import ObjectStorage

    inner = bare(storage)
    if not isinstance(inner, ObjectStorage) or not inner.url.startswith("s3://"):
        raise UsageError(
            f"{storage.url} keeps no locks",
            hint="object locks are for repositories in S3 and what speaks like it (s3://BUCKET/PREFIX)",
        )
    return ObjectVersions.connect(inner.url)


class ObjectVersions:
    """Versions and locks of the objects below a prefix of a bucket. Safe to call from any thread."""

    def __init__(self, url: str, client: Any) -> None:
        self.url = url
        self._client = client
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""

    @classmethod
    def connect(cls, url: str) -> ObjectVersions:
        """At `s3://bucket/prefix`, with the credentials and the endpoint of `ObjectStorage`.

        Makes no call yet. Raises `UsageError`.
        """
        try:
            import botocore.config
            import botocore.exceptions
            import botocore.session
        except ImportError as error:
            raise UsageError(
                "object locks and versions need the package botocore", hint="pip install botocore"
            ) from error
        from imager.storage.object_settings import settings
        from imager.storage.spool import IN_FLIGHT

        found = settings("s3").config
        endpoint = found.get("endpoint")
        virtual = os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in ("1", "true")
        style = "path" if endpoint and not virtual else "auto"
        try:
            client = botocore.session.get_session().create_client(
                "s3",
                endpoint_url=endpoint,
                region_name=found.get("region") or os.environ.get("AWS_REGION"),
                aws_access_key_id=found.get("access_key_id"),
                aws_secret_access_key=found.get("secret_access_key"),
                aws_session_token=found.get("session_token"),
                config=botocore.config.Config(
                    connect_timeout=10,
                    read_timeout=60,
                    max_pool_connections=IN_FLIGHT,
                    retries={"mode": "standard", "max_attempts": 8},
                    s3={"addressing_style": style},
                ),
            )
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise UsageError(
                f"{url} cannot be used: {error}", hint="see docs/reference/storage.md"
            ) from error
        return cls(url, client)

    # --- what there is ----------------------------------------------------------------

    def locking(self) -> Locking | None:
        """How the bucket locks; None where it does not. Raises `StorageError`."""
        try:
            answer = self._call(
                "asking for the bucket's object lock",
                lambda: self._client.get_object_lock_configuration(Bucket=self._bucket),
            )
        except _Lacking:
            return None
        found = answer.get("ObjectLockConfiguration", {})
        if found.get("ObjectLockEnabled") != "Enabled":
            return None
        rule = found.get("Rule", {}).get("DefaultRetention", {})
        days = rule.get("Days") or 365 * rule.get("Years", 0) or None
        mode = rule.get("Mode") if days else None
        return Locking(_clock(answer), mode if mode in MODES else None, days)

    def versions(self, name: str = "") -> Iterator[Version]:
        """All versions of all objects, or of those whose names begin with `name`; the newest of each first.

        Raises `StorageError`.
        """
        wanted = {"Bucket": self._bucket, "Prefix": self._prefix + name}
        while True:
            answer = self._call("listing versions", partial(self._client.list_object_versions, **wanted))
            found = [
                *(self._version(one, deleted=False) for one in answer.get("Versions", [])),
                *(self._version(one, deleted=True) for one in answer.get("DeleteMarkers", [])),
            ]
            # Two lists, each in order, whose times are of whole seconds in some stores.
            yield from sorted(found, key=lambda one: (one.name, not one.latest, -one.modified))
            if not answer.get("IsTruncated"):
                return
            wanted["KeyMarker"] = answer["NextKeyMarker"]
            wanted["VersionIdMarker"] = answer.get("NextVersionIdMarker", "")

    def _version(self, one: dict[str, Any], *, deleted: bool) -> Version:
        return Version(
            name=one["Key"].removeprefix(self._prefix),
            id=one.get("VersionId") or "null",
            size=one.get("Size", 0),
            etag=one.get("ETag", ""),
            modified=microseconds(one["LastModified"]),
            deleted=deleted,
            latest=bool(one.get("IsLatest")),
        )

    def lock_of(self, version: Version) -> Lock | None:
        """The lock on a version. Raises `NotFound`, `StorageError`."""
        answer = self._call(
            f"looking at {version.name}",
            lambda: self._client.head_object(**self._named(version)),
        )
        mode, until = answer.get("ObjectLockMode"), answer.get("ObjectLockRetainUntilDate")
        return Lock(mode, microseconds(until)) if mode in MODES and until is not None else None

    def read(self, version: Version, offset: int, length: int | None) -> bytes:
        """Bytes of a version, fewer where it ends before. Raises `NotFound`, `StorageError`."""
        end = version.size if length is None else min(version.size, offset + length)
        if offset >= end:
            return b""

        def fetch() -> bytes:
            span = f"bytes={offset}-{end - 1}"
            data: bytes = self._client.get_object(**self._named(version), Range=span)["Body"].read()
            return data

        return self._call(f"reading {version.name}", fetch)

    # --- what is changed ---------------------------------------------------------------

    def lock(self, version: Version, lock: Lock) -> None:
        """Lock a version, or lock it for longer. Raises `StorageError`, also where that would be shorter."""
        until = datetime.fromtimestamp(lock.until / 1e6, UTC)
        self._call(
            f"locking {version.name}",
            lambda: self._client.put_object_retention(
                **self._named(version), Retention={"Mode": lock.mode, "RetainUntilDate": until}
            ),
        )

    def lock_at_upload(self, mode: Mode, days: int) -> None:
        """Have the bucket lock each new object, whoever writes it. Raises `StorageError`."""
        rule = {"DefaultRetention": {"Mode": mode, "Days": days}}
        self._call(
            "setting the bucket's object lock",
            lambda: self._client.put_object_lock_configuration(
                Bucket=self._bucket,
                ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule},
            ),
        )

    def try_delete(self, version: Version) -> str | None:
        """Try to remove a version: why it was refused, None where it is gone. Raises `Unavailable`."""
        try:
            self._call(f"deleting {version.name}", lambda: self._client.delete_object(**self._named(version)))
        except Unavailable:
            raise
        except StorageError as error:
            return error.message
        return None

    def _named(self, version: Version) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + version.name, "VersionId": version.id}

    def _call(self, doing: str, function: Callable[[], T]) -> T:
        import botocore.exceptions

        try:
            return function()
        except (botocore.exceptions.BotoCoreError, botocore.exceptions.ClientError) as error:
            raise _failure(error, doing, self.url) from error


class _Lacking(StorageError):
    """The bucket, or the store, knows no object lock."""


def _failure(error: Exception, doing: str, url: str) -> StorageError:
    """The error to raise for one of botocore's, as `object_errors.failure` does for the other client."""
    import botocore.exceptions

    from imager.storage import object_errors

    if isinstance(error, botocore.exceptions.ClientError):
        told = error.response.get("Error", {})
        code = str(told.get("Code", ""))
        status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        if code in _LACKING:
            return _Lacking(f"{doing} failed: {url} has no object lock")
        if code in ("NoSuchKey", "NoSuchVersion", "404"):
            return NotFound(f"{doing} failed: it is not in {url}")
        return object_errors.refusal(
            object_errors.Told(status, code, str(told.get("Message", ""))[:300]), doing, url
        )
    if isinstance(error, botocore.exceptions.NoCredentialsError | botocore.exceptions.NoRegionError):
        return StorageError(f"{doing} failed: {error} ({url})", hint=object_errors.CREDENTIALS)
    if isinstance(error, botocore.exceptions.HTTPClientError | botocore.exceptions.IncompleteReadError):
        return Unavailable(
            f"{doing} failed: it cannot be reached ({url})",
            hint="check the network, and the endpoint (AWS_ENDPOINT_URL)",
        )
    return StorageError(f"{doing} failed: {error} ({url})")


def microseconds(moment: datetime) -> int:
    """Microseconds since 1970 UTC of a moment that has its offset."""
    return round(moment.timestamp() * 1_000_000)


def _clock(answer: dict[str, Any]) -> int:
    """When the store gave an answer, by its own clock."""
    from email.utils import parsedate_to_datetime

    said = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date", "")
    try:
        return microseconds(parsedate_to_datetime(said))
    except ValueError as error:
        raise StorageError(f"the store tells no time: {said!r}") from error
