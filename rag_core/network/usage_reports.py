"""No usage reports: what Prefect, MLflow, Ray and the hub's client send home by default is switched off.

Each of them reads its variable when it is imported or when it starts a process, so the packages of this project call
`switch_off` before they import anything else, and the processes that they start inherit it. A variable that is set
already is left as it is: whoever wants to report says so, for example with DO_NOT_TRACK=0.
"""

from __future__ import annotations

import os

# Prefect's client knows no other name than DO_NOT_TRACK; MLflow takes that one only as "true". A Ray cluster whose reports
# are off reports just that, so it is also told to do so to nobody (the port "discard" of this machine).
OFF = {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
}


def switch_off() -> None:
    """Set the variables that are not set, for this process and those that it starts."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
