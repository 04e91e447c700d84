"""Check the AWS endpoint and profile before the first request to an object store.

The SDK itself waits minutes for an endpoint that does not answer, and reads any web server's 404 as a missing object.
"""

from __future__ import annotations

import http.client
import os
import ssl
import urllib.request
from urllib.parse import urlsplit

from rag_core.errors import ConfigError
from rag_core.network.addresses import check_address, without_credentials
from rag_core.network.server_probe import GRACE, SECONDS, describe_response, reason_of, within

# In order of precedence.
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
EXAMPLE = "http://127.0.0.1:9000"


def check_store_settings() -> None:
    """Check that the profile exists and that an S3 store answers at the endpoint, if these are set.

    Raises:
        ConfigError: one of them is wrong.
    """
    _check_profile()
    name = next((name for name in ENDPOINTS if os.environ.get(name, "").strip()), None)
    if name is None:
        return
    address = os.environ[name]
    check_address(name, address, ("http", "https"), EXAMPLE)
    if not urllib.request.getproxies():  # with a proxy, the endpoint may not be reachable directly
        _check_endpoint(name, address)


def _check_profile() -> None:
    import botocore.session

    profile = os.environ.get("AWS_PROFILE", "").strip()
    known = botocore.session.Session().available_profiles if profile else []
    if profile and profile not in known:
        listed = f"the known profiles are {', '.join(known)}" if known else "there are no profiles"
        raise ConfigError(
            f"AWS_PROFILE is {profile!r}, but {listed} (in ~/.aws/config, ~/.aws/credentials, or the files named by "
            "AWS_CONFIG_FILE and AWS_SHARED_CREDENTIALS_FILE). Give a known profile, create this one "
            "(aws configure --profile), or unset AWS_PROFILE."
        )


def _check_endpoint(name: str, address: str) -> None:
    shown = f"The object store at {without_credentials(address)} ({name})"
    try:
        status, headers = within(SECONDS + GRACE, lambda: _answer_of(address))
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(
            f"{shown} does not answer ({reason_of(error)}). Start it, correct the address (such as {EXAMPLE}), or "
            f"unset {name} to use Amazon S3."
        ) from error
    kind = headers.get("content-type", "")
    if "html" in kind and not any(header.startswith("x-amz") for header in headers):
        raise ConfigError(
            f"{shown} {describe_response(status, kind)}, so it is no S3 store. Correct the address (the web console "
            f"may have another port than the API), or unset {name} to use Amazon S3."
        )


def _answer_of(address: str) -> tuple[int, dict[str, str]]:
    parts = urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme == "https":
        # The SDK checks the certificate (AWS_CA_BUNDLE). This request sends nothing secret, so it need not.
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, parts.port, timeout=SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=SECONDS)
    try:
        connection.request("GET", parts.path or "/")
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}
    finally:
        connection.close()
