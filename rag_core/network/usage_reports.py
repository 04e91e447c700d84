"""Switch off the usage reports that Prefect, MLflow, Ray and the hub's client send by default.

Each library reads its variable when it is imported or starts a process. So our packages call `switch_off` before they
import anything else, and child processes inherit the variables. A variable that is already set is kept: to send
reports, set it, for example DO_NOT_TRACK=0.
"""

from __future__ import annotations

import os

# Prefect's client reads only DO_NOT_TRACK; MLflow reads it too, but accepts only "true". A Ray cluster with reports off
# still reports that they are off, so its report URL points nowhere (the "discard" port of this machine).
OFF = {
    "DO_NOT_TRACK": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
}


def switch_off() -> None:
    """Set the variables that are not yet set, for this process and its child processes."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
