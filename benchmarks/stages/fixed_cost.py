"""Fixed cost of orchestration: `rag pipeline` with trivial work in all ten stages, as a command in an empty folder.

For the first line the command starts Prefect's server, Ray and MLflow's database; for the second it uses a running
Prefect server, MLflow server and Ray cluster. The start and end times of the MLflow runs tell how the seconds divide.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from mlflow import MlflowClient

from benchmarks.harness import Line, Size, Spread, main
from tests.support.small_corpus import PROMPT, make_encoder, optimizer, write_passages_jsonl, write_questions_jsonl

COLD_SECONDS, WARM_SECONDS_PER_STAGE = 45.0, 1.5
ROOT = Path(__file__).resolve().parents[2]


def measure(size: Size) -> list[Line]:
    """Both lines; size smoke measures only the cold one, with fewer stages."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        config = write_config(home / "inputs", every_stage=size == "full")
        lines = [cold_line([run_pipeline(config, home / "cold", {})])]
        if size == "full":
            with services(home / "services") as environment:
                run_pipeline(config, home / "warm-up", environment)
                lines.append(warm_line([run_pipeline(config, home / "warm", environment)]))
    return lines


def cold_line(runs: list[dict[str, Any]]) -> Line:
    """Seconds of the whole command."""
    return Line(
        path="fixed cost, nothing running",
        peer="",
        value=Spread.of([run["command"] for run in runs]),
        unit="s",
        target=COLD_SECONDS,
        higher_is_better=False,
        outputs="every stage's artifact published",
        details={"runs": runs},
    )


def warm_line(runs: list[dict[str, Any]]) -> Line:
    """Cost of one more stage: seconds from the first stage's start to the last stage's end ÷ number of stages.

    The command's own start and end, mainly imports, are in the details as `before` and `after`.
    """
    return Line(
        path="fixed cost of one stage more, servers and cluster running",
        peer="",
        value=Spread.of([(sum(run["stages"].values()) + run["between"]) / len(run["stages"]) for run in runs]),
        unit="s a stage",
        target=WARM_SECONDS_PER_STAGE,
        higher_is_better=False,
        outputs="every stage's artifact published",
        details={"runs": runs},
    )


def write_config(folder: Path, *, every_stage: bool) -> Path:
    """A pipeline over nine passages and eight questions: one or two training steps, one shard, tiny models."""
    folder.mkdir(parents=True)
    encoder = str(make_encoder(folder / "encoder"))
    questions = str(write_questions_jsonl(folder / "questions.jsonl"))
    step = optimizer(1).model_dump(mode="json")
    content = {
        "sources": [str(write_passages_jsonl(folder / "passages.jsonl"))],
        "corpus": {"format": "jsonl"},
        "questions": {"train": questions, "dev": questions, "test": questions},
        "embed": {"encoder": encoder},
        "pretrain": {
            "encoder": encoder,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "copy_steps": 1,
            "prompt": PROMPT.model_dump(),
            "optimizer": optimizer(2).model_dump(mode="json"),
        },
        "model": {"question_encoder": encoder, "generator": "", "num_docs": 3, "prompt": PROMPT.model_dump()},
        "variants": ["sequence", "token"] if every_stage else ["token"],
        "train": {"optimizer": step, "eval_questions": 4},
        "infer": {"decoding": {"num_beams": 2, "max_new_tokens": 6, "num_return_sequences": 2}},
    }
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file


def run_pipeline(config: Path, folder: Path, services: Mapping[str, str]) -> dict[str, Any]:
    """Seconds of `rag pipeline`: whole command, before the first stage, each stage, between stages, after the last."""
    folder.mkdir()
    environment = clean_environment(folder) | dict(services)
    command = [
        sys.executable,
        "-m",
        "flows.cli.main",
        "pipeline",
        "--config",
        str(config),
        "--out",
        str(folder / "out"),
    ]
    started = time.time()
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    seconds = time.time() - started
    if result.returncode:
        raise RuntimeError(f"rag pipeline ended with {result.returncode}:\n{result.stderr}")
    return {"command": round(seconds, 2)} | phases(environment, folder, started, started + seconds)


def phases(environment: Mapping[str, str], folder: Path, started: float, ended: float) -> dict[str, Any]:
    """How the seconds divide, from the MLflow runs of one pipeline."""
    client = MlflowClient(environment.get("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db"))
    experiment = client.get_experiment_by_name("rag")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])
    # An MLflow server also holds the runs of the warm-up.
    runs = [run for run in runs if run.info.start_time >= started * 1000]
    parent, stages = runs[0].info, runs[1:]
    seconds_of = {str(run.info.run_name): (run.info.end_time - run.info.start_time) / 1000 for run in stages}
    total = (parent.end_time - parent.start_time) / 1000
    return {
        "before": round(parent.start_time / 1000 - started, 2),
        "stages": {name: round(seconds, 2) for name, seconds in seconds_of.items()},
        "between": round(total - sum(seconds_of.values()), 2),
        "after": round(ended - parent.end_time / 1000, 2),
    }


def clean_environment(folder: Path) -> dict[str, str]:
    """This process's environment without variables that name a running service; Prefect's files go to `folder`."""
    services = ("PREFECT_", "MLFLOW_", "RAY_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(services)}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept | {"PREFECT_HOME": str(folder / "prefect"), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def services(folder: Path) -> Iterator[dict[str, str]]:
    """A Prefect server, an MLflow server and a Ray cluster; yields the environment variables that name them."""
    folder.mkdir()
    prefect, mlflow, ray = (free_port() for _ in range(3))
    host, environment = "127.0.0.1", clean_environment(folder)
    # The cluster and the command must share a token. MLflow's ten job-runner processes are not needed here.
    cluster = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment |= cluster | {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "RAY_TMPDIR": str(folder),
    }
    commands = [
        ["prefect", "server", "start", "--host", host, "--port", str(prefect)],
        ["mlflow", "server", "--host", host, "--port", str(mlflow), "--workers", "1"],
    ]
    scripts = Path(sys.executable).parent
    head = [str(scripts / "ray"), "start", "--head", "--block", f"--port={ray}", f"--node-ip-address={host}"]
    head.append("--include-dashboard=false")
    with contextlib.ExitStack() as stack:
        for command in [*([sys.executable, "-m", *words] for words in commands), head]:
            stack.enter_context(running(command, folder, environment))
        wait_for(f"http://{host}:{prefect}/api/health")
        wait_for(f"http://{host}:{mlflow}/health")
        yield cluster | {
            "PREFECT_API_URL": f"http://{host}:{prefect}/api",
            "MLFLOW_TRACKING_URI": f"http://{host}:{mlflow}",
            "RAY_ADDRESS": f"{host}:{ray}",
        }


@contextlib.contextmanager
def running(command: list[str], folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Run a server during the block; ends it and all its child processes."""
    with (folder / "servers.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(url: str, seconds: float = 90) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):  # noqa: S310
            return
        time.sleep(0.3)
    raise RuntimeError(f"nothing answers at {url} after {seconds:.0f} s")


def free_port() -> int:
    """A port on which no server listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main(measure)
