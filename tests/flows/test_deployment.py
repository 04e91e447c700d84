"""Real deployments: `prefect deploy --all`, a process worker, and a training run started by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rag_core.storage.artifact import open_artifact
from tests.support.servers.processes import end
from tests.support.small_corpus import (
    make_encoder,
    make_generator,
    make_index,
    model_config,
    optimizer,
    write_questions_jsonl,
)

ROOT = Path(__file__).resolve().parents[2]


def prefect(*arguments: str, timeout: float = 300) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_deployed_flow_is_run_by_a_worker(services: Path, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client

    encoder = make_encoder(tmp_path / "encoder")
    generator = make_generator(tmp_path / "generator", encoder)
    make_index(tmp_path, encoder)
    questions = str(write_questions_jsonl(tmp_path / "questions.jsonl"))
    parameters = {
        "index": str(tmp_path / "index"),
        "questions": questions,
        "dev": questions,
        "out": str(tmp_path / "rag-token"),
        "model": model_config(encoder, generator).model_dump(mode="json"),
        "config": {"optimizer": optimizer(2).model_dump(mode="json"), "eval_questions": 4, "num_workers": 1},
    }
    prefect("work-pool", "create", "rag", "--type", "process")
    prefect("deploy", "--all")
    names = [entry["name"] for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]]
    with get_client(sync_client=True) as client:
        deployed = {deployment.name: deployment for deployment in client.read_deployments()}
    assert set(names) <= set(deployed)
    nightly = deployed["pipeline"].schedules
    assert [schedule.active for schedule in nightly] == [False]
    assert nightly[0].schedule.cron

    prefect("deployment", "run", "train-token/train-token", "--params", json.dumps(parameters))
    log = (tmp_path / "worker.log").open("w")
    worker = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", "rag", "--type", "process"],
        cwd=tmp_path,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        state = wait_for_flow_run("train-token", seconds=300)
    finally:
        # Do not wait long: Prefect's worker may still wait for its last heartbeat, but its work is done.
        end(worker, patience=20)
    assert state == "COMPLETED", (tmp_path / "worker.log").read_text()[-4000:]
    assert open_artifact(tmp_path / "rag-token", "rag-model").config["variant"] == "token"


def wait_for_flow_run(deployment: str, seconds: float) -> str:
    """Wait until the newest run of a deployment has ended; return its state."""
    from prefect.client.orchestration import get_client

    until = time.monotonic() + seconds
    state = "none"
    with get_client(sync_client=True) as client:
        deployment_id = next(entry.id for entry in client.read_deployments() if entry.name == deployment)
        while time.monotonic() < until:
            runs = [run for run in client.read_flow_runs() if run.deployment_id == deployment_id]
            state = runs[0].state_type.value if runs and runs[0].state_type else "none"
            if state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
                break
            time.sleep(1)
    return state


def test_every_deployments_parameters_fit_its_flow(services: Path) -> None:
    import importlib

    content = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    for entry in content["deployments"]:
        module, function = entry["entrypoint"].split(":")
        flow = getattr(importlib.import_module(module.removesuffix(".py").replace("/", ".")), function)
        assert flow.name == entry["name"]
        flow.validate_parameters(entry["parameters"])
        if entry["name"] == "demo":
            demo = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
            assert entry["parameters"]["config"] == demo, "prefect.yaml and configs/demo.yaml have drifted apart"
