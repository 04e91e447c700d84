"""Training on Ray that is disturbed by lost workers and by signals gives the result of undisturbed training."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from rag_core.errors import ConfigError
from rag_core.storage.artifact import open_artifact
from rag_core.training.objectives import EndToEndRates
from tests.support.prepared import WORK, Command, Prepared
from tests.support.servers.processes import environment_in, processes_below
from tests.support.small_corpus import (
    make_encoder,
    make_generator,
    make_index,
    model_config,
    optimizer,
    write_questions_jsonl,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SMOKE = os.environ.get("CHAOS") == "smoke"
SETTINGS = {"log_every": 3, "eval_every": 10, "checkpoint_every": 2}


def make_generator_with_dropout(folder: Path, encoder: Path) -> Path:
    """A generator with dropout, so that the curve depends on the random states of every worker."""
    make_generator(folder, encoder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for side in ("encoder", "decoder"):
        config[side] |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    file.write_text(json.dumps(config))
    return folder


class Training:
    """Trains RAG-Token on the small corpus; caches the result of an undisturbed run for each number of workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._encoder = make_encoder(folder / "encoder")
        self._generator = make_generator_with_dropout(folder / "generator", self._encoder)
        self._index = make_index(folder, self._encoder)
        self._questions = write_questions_jsonl(folder / "questions.jsonl")
        self._undisturbed: dict[int, tuple[str, dict[str, Any]]] = {}

    def stage(self, out: Path, workers: int = 1, generator_rate: float = 2e-3) -> Any:
        from flows.stages.train import train_token
        from tasks.stages.train import TrainConfig

        rates = EndToEndRates(question_encoder=1e-3, generator=generator_rate)
        config = TrainConfig(optimizer=optimizer(40, **SETTINGS), rates=rates, num_workers=workers)
        model = model_config(self._encoder, self._generator)
        return train_token(self._index.path, self._questions, self._questions, out, model, config)

    def run(self, out: Path, workers: int = 1, generator_rate: float = 2e-3) -> tuple[str, dict[str, Any]]:
        """Fingerprint of the model, and every curve of its MLflow run except the speed."""
        from mlflow import MlflowClient

        result = self.stage(out, workers, generator_rate)
        client, curves = MlflowClient(), {}
        for name in client.get_run(result.run_id).data.metrics:
            if name not in ("seconds", "examples_per_second"):
                points = client.get_metric_history(result.run_id, name)
                curves[name] = [(point.step, point.value) for point in points]
        assert len(curves["train_nll"]) == 14, "a curve lacks points, or has some twice"
        assert not list(out.parent.glob(f".{out.name}.*training*")), "the training folder is left"
        return result.fingerprint, curves

    def undisturbed(self, workers: int = 1) -> tuple[str, dict[str, Any]]:
        if workers not in self._undisturbed:
            self._undisturbed[workers] = self.run(self.folder / f"undisturbed-{workers}", workers)
        return self._undisturbed[workers]


@pytest.fixture(scope="module")
def training(services: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    return Training(tmp_path_factory.mktemp("training"))


@contextmanager
def disturbed(out: Path, steps: int, disturb: Callable[[], None]) -> Iterator[None]:
    """In the block, call `disturb` once, as soon as a checkpoint of at least `steps` steps exists."""
    disturbances = []

    def watch() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            if any(int(folder.name[5:]) >= steps for folder in out.parent.glob(f".{out.name}.training-*/step-*")):
                disturb()
                disturbances.append(steps)
                return
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield
    watcher.join()
    assert disturbances, "training ended before it could be disturbed"


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def test_a_lone_worker_that_is_killed_is_replaced_from_the_last_checkpoint(
    training: Training, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from tasks.on_ray.runtime import share_of_cluster
    from tasks.on_ray.workers import run_on_worker

    undisturbed = training.undisturbed()
    worker = run_on_worker(share_of_cluster(1), os.getpid)
    with disturbed(tmp_path / "out", 12, lambda: kill(worker)):
        assert training.run(tmp_path / "out") == undisturbed
    assert "train-token: a worker was lost; a new one continues from the last checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_training_with_a_checkpoint_from_which_the_same_command_resumes(
    training: Training, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    class Stopped(BaseException):
        """Raised by the handler that was set before training."""

    def outside(*_: object) -> None:
        raise Stopped

    undisturbed, before = training.undisturbed(), signal.signal(number, outside)
    try:
        with disturbed(tmp_path / "out", 7, lambda: os.kill(os.getpid(), number)), pytest.raises(Stopped):
            training.run(tmp_path / "out")
    finally:
        signal.signal(number, before)
    assert not (tmp_path / "out").exists()
    assert "stopping after this step, with a checkpoint" in capfd.readouterr().err
    assert training.run(tmp_path / "out") == undisturbed
    assert "train-token: resuming after step" in capfd.readouterr().err


def test_a_model_that_was_published_but_not_registered_is_registered_by_the_next_run(training: Training) -> None:
    from mlflow import MlflowClient

    training.undisturbed()
    out, client = training.folder / "undisturbed-1", MlflowClient()
    fingerprint = open_artifact(out, "rag-model").fingerprint

    def versions() -> list[Any]:
        all_versions = client.search_model_versions("name = 'rag-token'")
        return [version for version in all_versions if version.tags.get("fingerprint") == fingerprint]

    registered = len(versions())
    assert registered
    note = out.parent / f".{out.name}.mlflow-run"
    note.unlink()  # as on another machine
    assert training.stage(out).skipped
    assert len(versions()) == registered, "it is already registered"
    for version in versions():
        client.delete_model_version("rag-token", version.version)
    note.unlink()  # as after a kill before it was registered
    again = training.stage(out)
    assert again.skipped
    assert [version.run_id for version in versions()] == [again.run_id]


def train_workers() -> list[int]:
    """Process ids of Ray Train's workers on this process's cluster."""
    parents, names = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(process.name)] = (process / "cmdline").read_text()
    ours = {os.getpid()}
    for _ in range(5):
        ours |= {process for process, parent in parents.items() if parent in ours}
    return sorted(process for process in ours if "TrainWorker" in names.get(process, ""))


@pytest.mark.chaos(short=False)
@pytest.mark.timeout(900)
def test_of_two_workers_one_then_the_other_is_killed_then_both_are_stopped_and_the_model_is_the_undisturbed_one(
    training: Training, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    undisturbed, out = training.undisturbed(workers=2), tmp_path / "out"
    first, second = (disturbed(out, 10 * n + 8, lambda n=n: kill(train_workers()[n])) for n in (0, 1))
    stopped = disturbed(out, 28, lambda: os.kill(os.getpid(), signal.SIGINT))
    with first, second, stopped, pytest.raises(KeyboardInterrupt):
        training.run(out, workers=2)
    shown = capfd.readouterr().err
    assert shown.count("train-token: a worker was lost; a new one continues from the last checkpoint") == 2
    assert training.run(out, workers=2) == undisturbed
    assert "train-token: resuming after step" in capfd.readouterr().err


@pytest.mark.chaos(short=False)
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_that_a_retry_cannot_cure_is_not_retried(
    training: Training, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    with pytest.raises(ConfigError, match=r"^Training diverged at step \d+: .*Lower the learning rates"):
        training.run(tmp_path / "out", workers, generator_rate=1e30)
    assert "a worker was lost" not in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


COMMAND = """
def work(folder, out, trained):
    from flows.stages.train import train_token
    from rag_core.model.adapters.lora import LoraSettings
    from rag_core.training.objectives import EndToEndRates
    from tasks.stages.train import TrainConfig
    from tests.support.small_corpus import model_config, optimizer
    folder, steps = Path(folder), optimizer(300, log_every=3, eval_every=50, checkpoint_every=1)
    rates, adapters = EndToEndRates(question_encoder=1e-3, generator=2e-3), trained == "adapters"
    lora = LoraSettings(rank=2, dropout=0.1) if adapters else None
    config = TrainConfig(optimizer=steps, rates=rates, lora=lora, gradient_checkpointing=adapters)
    questions, model = folder / "questions.jsonl", model_config(folder / "encoder", folder / "generator")
    result = train_token(folder / "index", questions, questions, Path(out), model, config)
    print("run", result.run_id, flush=True)
"""


@pytest.fixture(scope="module")
def site(prefect_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Prepared]]:
    """A folder with the inputs of a command, and prepared commands."""
    folder = tmp_path_factory.mktemp("commands")
    Training(folder)
    with Prepared(WORK % COMMAND, folder, environment_in(folder, PREFECT_API_URL=prefect_url)) as commands:
        yield folder, commands


def outcome(commands: Prepared, folder: Path, out: Path, trained: str) -> tuple[str, Any]:
    """Run the command to its end; return the fingerprint of the model, and the curves in MLflow."""
    from mlflow import MlflowClient

    run_id = commands.finish(folder, out, trained).rpartition("run ")[2].split()[0]
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    curves = {
        name: [(point.step, point.value) for point in client.get_metric_history(run_id, name)]
        for name in client.get_run(run_id).data.metrics
        if name not in ("seconds", "examples_per_second")
    }
    assert not list(out.parent.glob(f".{out.name}.*training*"))
    return open_artifact(out, "rag-model").fingerprint, curves


def wait_for_checkpoint(folder: Path, out: Path, process: Command, beyond: int) -> None:
    end = time.monotonic() + 300

    def last_step() -> int:
        return max((int(path.name[5:]) for path in out.parent.glob(f".{out.name}.training-*/step-*")), default=0)

    while last_step() <= beyond:
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < end, "training did not begin"
        time.sleep(0.002)


# What happens to a command, in this order, before it may finish.
DISTURBANCES = ("kill",) if SMOKE else ("kill", "terminate twice at once", "kill", "terminate twice", "kill")


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "trained",
    [
        pytest.param("weights", marks=pytest.mark.chaos),
        pytest.param("adapters", marks=pytest.mark.chaos(short=False)),
    ],
)
def test_a_command_killed_and_terminated_at_random_moments_of_training_ends_as_the_undisturbed_one(
    site: tuple[Path, Prepared], figure: Callable[[str], None], trained: str
) -> None:
    folder, commands = site
    undisturbed = outcome(commands, folder, folder / f"undisturbed-{trained}", trained)
    draw, reached, out, resumed = random.Random(11), 0, folder / f"out-{trained}", "train-token: resuming after step"
    before = (folder / "log").read_text().count(resumed)
    for disturbance in DISTURBANCES:
        process = commands.start(folder, out, trained)
        wait_for_checkpoint(folder, out, process, reached)
        time.sleep(draw.uniform(0, 0.5))
        if disturbance == "kill":
            kill_group(process)
        else:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.0 if disturbance.endswith("at once") else 0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == -signal.SIGTERM
        assert not out.exists(), "training ended before it could be disturbed"
        reached = max(int(path.name[5:]) for path in folder.glob(f".{out.name}.training-*/step-*"))
    assert outcome(commands, folder, out, trained) == undisturbed
    assert (folder / "log").read_text().count(resumed) == before + len(DISTURBANCES)
    figure(f"training of {trained}: {', '.join(DISTURBANCES)}; weights and curves equal to the last bit")


def kill_group(process: Command) -> None:
    """Send signal 9 to the command's process group and wait for its workers, which may still write a checkpoint."""
    workers = processes_below(process.pid, lambda name: "Worker" in name)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs(workers, timeout=60)
