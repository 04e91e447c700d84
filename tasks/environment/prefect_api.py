"""Check Prefect's settings, and the server that `PREFECT_API_URL` (or a Prefect profile) names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from rag_core.errors import ConfigError
from rag_core.network.addresses import check_address, without_credentials
from rag_core.network.server_probe import GRACE, SECONDS, describe_response, reason_of, within

if TYPE_CHECKING:
    from prefect.settings import Settings

EXAMPLE = "http://127.0.0.1:4200/api"


def prefect_settings() -> Settings:
    """Prefect's current settings.

    Raises:
        ConfigError: Prefect cannot read one of its variables.
    """
    from pydantic import ValidationError

    try:
        from prefect.settings import get_current_settings

        return get_current_settings()
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        wrong = [name for name in os.environ if name.startswith("PREFECT_") and _sets(name, field)]
        raise ConfigError(
            f"Prefect cannot read its setting {wrong[0] if wrong else field} ({first['msg'].lower()}). Correct or "
            "unset it."
        ) from error


def _sets(variable: str, field: str) -> bool:
    """Whether the variable sets that field of Prefect's settings, such as server.analytics_enabled."""
    return variable.removeprefix("PREFECT_").lower().endswith(field.replace(".", "_").removeprefix("prefect_").lower())


def configured_url() -> str:
    """The configured server's address; "" if each command starts its own. Raises ConfigError as `prefect_settings`."""
    return (os.environ.get("PREFECT_API_URL") or prefect_settings().api.url or "").strip()


def check_prefect() -> None:
    """Check that the configured server answers, accepts our credentials and has our major version.

    Raises:
        ConfigError: it does not, or the address or a setting is wrong.
    """
    url = configured_url()
    if not url:
        return
    check_address("PREFECT_API_URL", url, ("http", "https"), EXAMPLE)
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    shown = f"Prefect's server at {without_credentials(url)} (PREFECT_API_URL)"
    try:
        version = within(SECONDS + GRACE, lambda: _version_of(url))
    except (PrefectHTTPStatusError, httpx.HTTPStatusError) as error:
        raise _refused(shown, url, error.response) from error
    except (httpx.HTTPError, OSError) as error:
        raise ConfigError(
            f"{shown} does not answer ({reason_of(error)}). No work was started. Start it (make prefect), correct "
            "PREFECT_API_URL, or unset it: each command then starts a server of its own."
        ) from error
    except ValueError as error:
        raise _no_prefect(shown, url, "answers, but not as Prefect does") from error
    _check_version(shown, version, url)


def _version_of(url: str) -> Any:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    settings = {PREFECT_API_URL: url, PREFECT_CLIENT_MAX_RETRIES: 0}
    # The client is not entered (`with`): that would also check the version, with a message of its own.
    with temporary_settings(settings):
        client = get_client(sync_client=True, httpx_settings={"timeout": SECONDS})
        return client.api_version()


def _check_version(shown: str, version: Any, url: str) -> None:
    import prefect
    from packaging.version import InvalidVersion, Version

    try:
        theirs, ours = Version(str(version)), Version(prefect.__version__)
    except InvalidVersion as error:
        raise _no_prefect(shown, url, "answers, but not as Prefect does") from error
    if theirs.major != ours.major:
        raise ConfigError(
            f"{shown} is Prefect {theirs}, this is Prefect {ours}: their major versions must be equal. Use a server of "
            f"Prefect {ours.major}, or unset PREFECT_API_URL: each command then starts a server of its own."
        )


def _refused(shown: str, url: str, response: Any) -> ConfigError:
    status, kind = response.status_code, response.headers.get("content-type", "")
    if status in (401, 403):
        variables = [name for name in ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY") if os.environ.get(name)]
        problem = f"rejects the value of {' and '.join(variables)}" if variables else "asks for a password"
        return ConfigError(
            f"{shown} {problem} (answer {status}). Set PREFECT_API_AUTH_STRING to the server's USER:PASSWORD (for "
            "Prefect Cloud: PREFECT_API_KEY), or unset PREFECT_API_URL: each command then starts a server of its own."
        )
    if status >= 500:
        return ConfigError(
            f"{shown} {describe_response(status, kind)}: the server, or a proxy in front of it, has a problem. No work "
            "was started. Look at its log, or unset PREFECT_API_URL: each command then starts a server of its own."
        )
    return _no_prefect(shown, url, describe_response(status, kind))


def _no_prefect(shown: str, url: str, answer: str) -> ConfigError:
    bare = without_credentials(url).rstrip("/")
    remedy = "Correct the address" if bare.endswith("/api") else f"Prefect's API ends in /api: set it to {bare}/api"
    return ConfigError(
        f"{shown} {answer}, so that address is not Prefect's API. {remedy}, or unset PREFECT_API_URL: each command "
        "then starts a server of its own."
    )
