"""A flow run that crashed is retried: finished stages are skipped, and bad input is not tried twice.

These tests build flows from the stages' own tasks, and really kill Ray's processes (fixture `services`).
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rag_core.corpus.corpus import CorpusConfig
from rag_core.errors import InputError
from rag_core.storage.artifact import Manifest, open_artifact, publish
from tests.support.small_corpus import write_passages_jsonl

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def copy_stage(corpus: Path, out: Path, marker: Path, parent: str | None):  # type: ignore[no-untyped-def]
    """A stage that calls a Ray worker and then publishes an artifact."""
    import ray

    from tasks.stage import Input, run_stage

    die_once = worker_that_dies_once(str(marker))
    fingerprint = open_artifact(corpus, "corpus").fingerprint

    def work(run) -> Manifest:  # type: ignore[no-untyped-def]
        ray.get(die_once())
        with publish(out, "thing", made_from={"corpus": fingerprint}) as draft:
            (draft.folder / "data.txt").write_text(fingerprint)
            draft.counts["things"] = 1
        return open_artifact(out, "thing")

    inputs = {"corpus": Input(corpus, fingerprint)}
    return run_stage("thing", "thing", out, config={}, inputs=inputs, parent_run_id=parent, work=work)


def worker_that_dies_once(marker: str):  # type: ignore[no-untyped-def]
    """Start a Ray worker that kills itself in its call, unless the file `marker` exists already."""
    import ray

    # Defined in this function, so that the worker need not import this file.
    @ray.remote(num_cpus=0, max_retries=0)
    def die_once() -> None:
        import os
        import pathlib
        import signal

        if not os.path.exists(marker):
            pathlib.Path(marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)

    return die_once.remote


def skipped_runs(stage: str, out: Path) -> list[bool]:
    """For each MLflow run of the stage with this output, oldest first: whether it was skipped."""
    from mlflow import MlflowClient

    client = MlflowClient()
    query = f"tags.stage = '{stage}' and tags.artifact = '{out.resolve()}'"
    runs = client.search_runs(
        [client.get_experiment_by_name("rag").experiment_id], query, order_by=["attributes.start_time ASC"]
    )
    return [run.data.tags.get("skipped") == "true" for run in runs]


def test_a_stage_whose_worker_is_lost_is_retried_without_the_flow(services: Path, tmp_path: Path) -> None:
    from prefect import flow, task

    from flows.stages.make_corpus import make_corpus
    from tasks.retries import STAGE_RETRIES

    stage = task(**STAGE_RETRIES | {"retry_delay_seconds": 0})(copy_stage)
    source = write_passages_jsonl(tmp_path / "passages.jsonl")

    @flow
    def two_stages(out: Path):  # type: ignore[no-untyped-def]
        corpus = make_corpus([source], out / "corpus", CorpusConfig(format="jsonl"))
        return stage(corpus.path, out / "thing", tmp_path / "died", None)

    result = two_stages(tmp_path / "out")
    assert not result.skipped
    assert skipped_runs("thing", tmp_path / "out" / "thing") == [False, False], "one attempt was lost, one was not"
    assert skipped_runs("corpus", tmp_path / "out" / "corpus") == [False], "the flow was not started again"
    undisturbed = two_stages(tmp_path / "undisturbed")
    assert result.fingerprint == undisturbed.fingerprint


def test_a_flow_run_that_is_retried_skips_the_stages_it_had_finished(services: Path, tmp_path: Path) -> None:
    from prefect import flow, task

    from flows.stages.make_corpus import make_corpus

    source = write_passages_jsonl(tmp_path / "passages.jsonl")

    @flow(retries=1)
    def two_stages(out: Path):  # type: ignore[no-untyped-def]
        corpus = make_corpus([source], out / "corpus", CorpusConfig(format="jsonl"))
        return task(copy_stage)(corpus.path, out / "thing", tmp_path / "died", None)

    result = two_stages(tmp_path / "out")
    assert skipped_runs("corpus", tmp_path / "out" / "corpus") == [False, True]
    assert skipped_runs("thing", tmp_path / "out" / "thing") == [False, False]
    assert result.fingerprint == two_stages(tmp_path / "undisturbed").fingerprint


@pytest.mark.usefixtures("services")
def test_what_a_killed_run_published_but_did_not_announce_is_announced_by_the_next_one(tmp_path: Path) -> None:
    from prefect import flow

    from tasks.stage import run_stage

    out = tmp_path / "thing"
    announced: list[bool] = []

    class Killed(BaseException):
        """Stands for a kill."""

    def killed(run, skipped) -> None:  # type: ignore[no-untyped-def]
        raise Killed

    def work(run) -> Manifest:  # type: ignore[no-untyped-def]
        with publish(out, "thing") as draft:
            (draft.folder / "data.txt").write_text("whole")
        return open_artifact(out, "thing")

    @flow
    def stage(announce):  # type: ignore[no-untyped-def]
        arguments = {"config": {}, "inputs": {}, "parent_run_id": None, "work": work}
        return run_stage("thing", "thing", out, **arguments, announce=announce)

    with pytest.raises(Killed):
        stage(killed)
    assert (out / "data.txt").is_file()
    for _ in range(2):
        assert stage(lambda run, skipped: announced.append(skipped)).skipped
    assert announced == [True]


def test_bad_input_is_not_tried_again(services: Path, tmp_path: Path) -> None:
    from flows.stages.make_corpus import make_corpus
    from tasks.retries import is_crash

    with pytest.raises(InputError):
        make_corpus([tmp_path / "nothing.jsonl"], tmp_path / "out", CorpusConfig(format="jsonl"))
    assert not is_crash(InputError("bad"))
    assert not is_crash(KeyError("a fault of ours"))


def test_only_a_loss_counts_as_a_crash_not_what_our_code_raises_in_a_worker(services: Path, tmp_path: Path) -> None:
    import ray

    from tasks.retries import is_crash

    @ray.remote(num_cpus=0)
    def faulty() -> None:
        raise ZeroDivisionError

    with pytest.raises(ray.exceptions.WorkerCrashedError) as crash:
        ray.get(worker_that_dies_once(str(tmp_path / "died"))())
    assert is_crash(crash.value)
    with pytest.raises(ZeroDivisionError) as fault:
        ray.get(faulty.remote())
    assert not is_crash(fault.value)


@pytest.mark.usefixtures("services")
def test_mlflow_says_how_a_run_ended() -> None:
    from mlflow import MlflowClient
    from prefect.exceptions import TerminationSignal

    from tasks.tracking.runs import open_run

    ends = (TerminationSignal(signal.SIGTERM), "KILLED"), (KeyboardInterrupt(), "KILLED"), (InputError("bad"), "FAILED")
    for error, status in ends:
        with pytest.raises(type(error)), open_run("ended") as run:
            raise error
        assert MlflowClient().get_run(run.run_id).info.status == status
