"""No process of ours reports usage to anybody, whatever imports us."""

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
def test_usage_reports_are_off_in_whatever_imports_us_unless_somebody_wants_them(module: str) -> None:
    code = f"import json, os, {module}; print(json.dumps(dict(os.environ)))"
    clean = {name: value for name, value in os.environ.items() if name not in OFF}

    def environment_after(**more: str) -> dict[str, str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=clean | more, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        )
        found: dict[str, str] = json.loads(done.stdout)
        return found

    assert OFF.items() <= environment_after().items()
    assert environment_after(DO_NOT_TRACK="0")["DO_NOT_TRACK"] == "0"


def test_the_tools_understand_what_switches_them_off() -> None:
    code = (
        "import rag_core, huggingface_hub.constants, mlflow.telemetry, prefect.analytics\n"
        "from prefect.settings import get_current_settings\n"
        "from ray._common.usage.usage_lib import usage_stats_enabled\n"
        "print(huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY, mlflow.telemetry.get_telemetry_client(),\n"
        "      prefect.analytics.is_telemetry_enabled(), get_current_settings().server.analytics_enabled,\n"
        "      usage_stats_enabled())"
    )
    # MLflow and Prefect report nothing from a test or a CI machine, so those marks go too.
    marks = ("PYTEST", "CI", "GITHUB_", "BUILD", "JENKINS", "TF_BUILD", "TEAMCITY")
    clean = {name: value for name, value in os.environ.items() if name not in OFF and not name.startswith(marks)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["True", "None", "False", "False", "False"], done.stderr


def test_a_served_model_ends_the_usage_reports_that_its_server_had_begun() -> None:
    code = (
        "import os, runpy, mlflow\n"
        "print(mlflow.telemetry.get_telemetry_client() is None)\n"
        f"runpy.run_path({str(ROOT / 'tasks' / 'tracking' / 'served_model.py')!r})\n"
        "print(mlflow.telemetry.get_telemetry_client() is None)"
    )
    marks = ("PYTEST", "CI", "GITHUB_", "BUILD", "JENKINS", "TF_BUILD", "TEAMCITY")
    clean = {name: value for name, value in os.environ.items() if name not in OFF and not name.startswith(marks)}
    # The client looks up its settings at a name of the internet when it has something to send: it has nothing here.
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["False", "True"], done.stderr
