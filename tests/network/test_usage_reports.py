"""None of our processes sends usage reports, whichever package is imported first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rag_core.network.usage_reports import OFF

pytest_plugins = ["tests.support.environment_fixtures"]
pytestmark = pytest.mark.usefixtures("nothing_set")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["rag_core", "tasks.environment", "flows.cli.main"])
def test_importing_any_package_switches_usage_reports_off_unless_a_variable_is_set(module: str) -> None:
    code = f"import json, os, {module}; print(json.dumps(dict(os.environ)))"
    clean = {name: value for name, value in os.environ.items() if name not in OFF}

    def environment_after(**more: str) -> dict[str, str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=clean | more, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        )
        environment: dict[str, str] = json.loads(done.stdout)
        return environment

    assert OFF.items() <= environment_after().items()
    assert environment_after(DO_NOT_TRACK="0")["DO_NOT_TRACK"] == "0"


def test_the_libraries_obey_the_variables() -> None:
    code = (
        "import rag_core, huggingface_hub.constants, mlflow.telemetry, prefect.analytics\n"
        "from prefect.settings import get_current_settings\n"
        "from ray._common.usage.usage_lib import usage_stats_enabled\n"
        "print(huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, mlflow.telemetry.get_telemetry_client(),\n"
        "      prefect.analytics.is_telemetry_enabled(), get_current_settings().server.analytics_enabled,\n"
        "      usage_stats_enabled())"
    )
    # MLflow and Prefect report nothing from a test or a CI machine, so the variables that show one are removed, too.
    marks = ("PYTEST", "CI", "GITHUB_", "BUILD", "JENKINS", "TF_BUILD", "TEAMCITY")
    clean = {name: value for name, value in os.environ.items() if name not in OFF and not name.startswith(marks)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["True", "None", "False", "False", "False"], done.stderr


def test_a_served_model_ends_usage_reports_that_its_server_has_started() -> None:
    code = (
        "import os, runpy, mlflow\n"
        "print(mlflow.telemetry.get_telemetry_client() is None)\n"
        f"runpy.run_path({str(ROOT / 'tasks' / 'tracking' / 'served_model.py')!r})\n"
        "print(mlflow.telemetry.get_telemetry_client() is None)"
    )
    marks = ("PYTEST", "CI", "GITHUB_", "BUILD", "JENKINS", "TF_BUILD", "TEAMCITY")
    clean = {name: value for name, value in os.environ.items() if name not in OFF and not name.startswith(marks)}
    # MLflow's client would fetch its settings from the internet only to send something, and it has nothing to send.
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["False", "True"], done.stderr
