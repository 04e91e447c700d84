"""Server addresses: hide their credentials, and check their form before any connection."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from urllib.parse import urlsplit, urlunsplit

from rag_core.errors import ConfigError

# A parameter of a database's address that may hold a secret.
_SECRET_PARAMETER = re.compile(r"(?i)([?&][^=&#]*(?:password|passwd|pwd|secret|token|key)[^=&#]*=)[^&#]*")


def without_credentials(uri: str) -> str:
    """The address without user, password and values of secret parameters, for messages, files and pages."""
    uri = _SECRET_PARAMETER.sub(r"\1…", uri)
    try:
        parts = urlsplit(uri)
        parts.port  # noqa: B018  (raises ValueError if the port is not a number)
    except ValueError:
        # The password contains / ? # or [. Where it begins and ends is unclear, so everything before the last @ goes.
        scheme, separator, rest = uri.partition("://")
        return scheme + separator + rest.rpartition("@")[2] if separator else uri.rpartition("@")[2]
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def check_address(variable: str, address: str, schemes: Sequence[str], example: str) -> None:
    """Check that `address` has the form of a server address.

    Args:
        variable: environment variable that holds it, for the message.
        address: its value.
        schemes: accepted schemes.
        example: a valid address, for the message.

    Raises:
        ConfigError: a scheme, host or port is wrong or missing, or there are spaces.
    """
    if problem := _problem_of(address, schemes):
        raise ConfigError(
            f"{variable} is {without_credentials(address)!r}: {problem}. Give an address such as {example}, or unset "
            f"{variable}."
        )


def _problem_of(address: str, schemes: Sequence[str]) -> str:
    if re.search(r"[\s\"'<>\x00-\x1f\x7f]", address):
        return "it contains a space, a quotation mark or a control character"
    scheme, separator, _ = address.partition("://")
    if not separator:
        return f"it does not begin with {' or '.join(f'{known}://' for known in schemes)}"
    if scheme.lower() not in schemes:
        near = difflib.get_close_matches(scheme.lower(), schemes, 1)
        meant = f" (is {near[0]}:// meant?)" if near else ""
        expected = " or ".join(f"{known}://" for known in schemes)
        return f"{scheme}:// is not accepted here{meant}, only {expected}"
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        if "ort" in str(error):  # "Port could not be cast to integer", "Port out of range 0-65535"
            return "its port is no number from 1 to 65535 (write / ? or # in a password as %2F, %3F or %23)"
        return "the brackets of its IPv6 address do not match"
    if not host:
        return "it has no host name"
    return "port 0 cannot be used" if port == 0 else ""
