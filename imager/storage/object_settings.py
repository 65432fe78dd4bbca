"""Endpoint and credentials of an object store, from where its ecosystem keeps them.

Invariant: a profile that is named is used or refused, never passed over; a
secret is handed on and never shown.
"""

from __future__ import annotations

import configparser
import os
from typing import Any

from msgspec import Struct, field

from imager.errors import UsageError


class Settings(Struct, frozen=True):
    """What to give the client beyond the environment, which it reads itself."""

    config: dict[str, Any] = field(default_factory=dict)
    client: dict[str, Any] = field(default_factory=dict)


def settings(scheme: str) -> Settings:
    """For stores of `scheme`. Raises `UsageError` where a profile is asked for and there is none."""
    if scheme != "s3":
        return Settings()
    config = {**_profile(), "disable_bulk_delete": True}
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or os.environ.get("AWS_ENDPOINT")
        or config.get("endpoint")
        or ""
    )
    # Whoever writes http:// means it.
    client = {"allow_http": True} if endpoint.startswith("http://") else {}
    if endpoint:
        config["endpoint"] = endpoint
    return Settings(config, client)


def _profile() -> dict[str, Any]:
    """Static keys, region and endpoint of a profile in ~/.aws, where the environment gives no keys."""
    name = os.environ.get("AWS_PROFILE")
    if os.environ.get("AWS_ACCESS_KEY_ID") and not name:
        return {}
    places = (
        (os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials", name or "default"),
        (os.environ.get("AWS_CONFIG_FILE") or "~/.aws/config", f"profile {name}" if name else "default"),
    )
    found: dict[str, str] = {}
    for path, section in places:
        parser = configparser.RawConfigParser()
        try:
            parser.read(os.path.expanduser(path))
        except (configparser.Error, UnicodeDecodeError) as error:
            raise UsageError(f"{path} cannot be read: {error}".splitlines()[0]) from error
        if parser.has_section(section):
            found = {**dict(parser.items(section)), **found}
    if name and not found:
        raise UsageError(f"there is no AWS profile {name}", hint="check AWS_PROFILE and ~/.aws/credentials")
    if name and "aws_access_key_id" not in found:
        raise UsageError(
            f"the AWS profile {name} holds no keys",
            hint="for profiles that log in or assume a role: aws configure export-credentials --format env",
        )
    keys = {
        "access_key_id": ("aws_access_key_id", "AWS_ACCESS_KEY_ID"),
        "secret_access_key": ("aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"),
        "session_token": ("aws_session_token", "AWS_SESSION_TOKEN"),
        "region": ("region", "AWS_REGION"),
        "endpoint": ("endpoint_url", "AWS_ENDPOINT_URL"),
    }
    # A profile that is named is stronger than keys that happen to be in the environment.
    return {
        option: found[entry]
        for option, (entry, variable) in keys.items()
        if entry in found
        and (not os.environ.get(variable) or (name and option not in ("region", "endpoint")))
    }
