"""What the AWS SDK is told of an object store, looked at before the first request: its endpoint and profile.

The SDK itself waits minutes for an endpoint that does not answer, and takes any server's 404 for an object that is not
there.
"""

from __future__ import annotations

import http.client
import os
import ssl
import urllib.request
from urllib.parse import urlsplit

from rag_core.errors import ConfigError
from rag_core.network.addresses import check_address, without_credentials
from rag_core.network.server_probe import GRACE, SECONDS, reason_of, what_answers, within

# The first that is set counts.
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
EXAMPLE = "http://127.0.0.1:9000"


def check_store_settings() -> None:
    """Whether the profile exists and an S3 store answers at the endpoint, where those are set.

    Raises:
        ConfigError: one is wrong.
    """
    _check_profile()
    name = next((name for name in ENDPOINTS if os.environ.get(name, "").strip()), None)
    if name is None:
        return
    address = os.environ[name]
    check_address(name, address, ("http", "https"), EXAMPLE)
    if not urllib.request.getproxies():  # a proxy may be the only way there
        _check_endpoint(name, address)


def _check_profile() -> None:
    import botocore.session

    wanted = os.environ.get("AWS_PROFILE", "").strip()
    known = botocore.session.Session().available_profiles if wanted else []
    if wanted and wanted not in known:
        listed = f"known are {', '.join(known)}" if known else "there are no profiles"
        raise ConfigError(
            f"AWS_PROFILE is {wanted!r}, but {listed} (~/.aws/config, ~/.aws/credentials, or the files that AWS_CONFIG_FILE "
            "and AWS_SHARED_CREDENTIALS_FILE name). Name one of them, make it (aws configure --profile), or unset AWS_PROFILE."
        )


def _check_endpoint(name: str, address: str) -> None:
    shown = f"The object store at {without_credentials(address)} ({name})"
    try:
        status, headers = within(SECONDS + GRACE, lambda: _answer_of(address))
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(
            f"{shown} does not answer ({reason_of(error)}). Start it, correct the address (such as {EXAMPLE}), or unset "
            f"{name} to use Amazon's own."
        ) from error
    kind = headers.get("content-type", "")
    if "html" in kind and not any(header.startswith("x-amz") for header in headers):
        raise ConfigError(
            f"{shown} {what_answers(status, kind)}, so it is no S3 store. Correct the address (its console may have another "
            f"port), or unset {name} to use Amazon's own."
        )


def _answer_of(address: str) -> tuple[int, dict[str, str]]:
    parts = urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme == "https":
        # Whose certificate it is, is the SDK's affair (AWS_CA_BUNDLE): nothing of ours is sent here.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, parts.port, timeout=SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=SECONDS)
    try:
        connection.request("GET", parts.path or "/")
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()
