"""MLflow runs: one per stage, under one parent run per pipeline.

Stages open their runs only here. Workers never open runs: they get a `RunAddress` and write metrics to that run. Any
`MLFLOW_TRACKING_URI` works; the default is MLflow's own, a SQLite file in the current folder.

Work that has started neither waits for MLflow nor fails with it: writes that cannot be sent are kept in
`unsent_folder()` and sent in order as soon as the server answers (`tasks.tracking.journal`).
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
from matplotlib.figure import Figure
from mlflow.entities import RunStatus
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME, MLFLOW_USER

from rag_core.errors import ConfigError
from rag_core.network.addresses import without_credentials
from rag_core.storage.places import absolute
from tasks.environment.mlflow_database import creation_lock
from tasks.environment.mlflow_store import check_store
from tasks.environment.variables import FOR_STAGES, check_variables
from tasks.notices import warn
from tasks.tracking import delivery
from tasks.tracking.client import reaching
from tasks.tracking.journal import SUFFIX, Entry, Journal, Pause, UnreachableError, header_of
from tasks.tracking.metric_names import metric_name

EXPERIMENT = "rag"
UNSENT = "mlflow-unsent"
# Seconds that a run may spend at its end on sending writes that were kept.
SECONDS_AT_THE_END = 30.0

# Addresses of stores that have answered in this process.
_answered: set[str] = set()


@dataclass(frozen=True)
class RunAddress:
    """The MLflow run to which the driver and the workers of a stage write.

    `unsent` is the folder that keeps writes while the server does not answer; with several machines it should be a
    shared one. `header` is the first line of the run's file there (`tasks.tracking.journal`).
    """

    tracking_uri: str = field(repr=False)
    run_id: str
    unsent: Path
    header: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, run_id: str) -> RunAddress:
        """The address of a run in the store of this process."""
        return cls._make(tracking_uri(), run_id)

    @classmethod
    def _make(cls, uri: str, run_id: str, **more: Any) -> RunAddress:
        header = {"do": "open", "run": run_id, "mlflow": without_credentials(uri)}
        return cls(uri, run_id, unsent_folder(), header | {"experiment": experiment_name()} | more)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Add points to the run's curves. Takes about a second at most, whether or not the server answers."""
        points = {metric_name(name): float(value) for name, value in metrics.items()}
        self.write({"do": "metrics", "time": milliseconds(), "step": step, "metrics": points})

    def log_text(self, text: str, name: str) -> None:
        """Keep a text file."""
        self.write({"do": "file", "path": name, "content": text.encode(errors="backslashreplace")})

    def write(self, entry: Entry) -> None:
        """Send an entry of `tasks.tracking.delivery`, or keep it until it can be sent."""
        self.journal.write(entry)

    @property
    def journal(self) -> Journal:
        return _journal(self.tracking_uri, self.unsent / f"{self.run_id}.jsonl", json.dumps(dict(self.header)))


@functools.lru_cache(maxsize=256)
def _journal(uri: str, file: Path, header: str) -> Journal:
    return Journal(
        file, json.loads(header), functools.partial(delivery.deliver, uri), pause_of(uri), warn, delivery.outage_entry
    )


@functools.lru_cache(maxsize=8)
def pause_of(uri: str) -> Pause:
    """The pause of a server, shared by all runs: if one run gets no answer, the others need not try."""
    return Pause()


@dataclass
class StageRun:
    """An open MLflow run of one stage."""

    address: RunAddress
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def run_id(self) -> str:
        """MLflow's id of the run, or a local one (`local-…`) if MLflow could not be reached to create it."""
        return self.address.run_id

    def write(self, entry: Entry) -> None:
        """Send an entry of `tasks.tracking.delivery`, or keep it until it can be sent."""
        self.address.write(entry)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; nested ones get dotted names."""
        self.write({"do": "params", "params": {name: str(value)[:500] for name, value in flatten(params).items()}})

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record figures; they also go into the stage's result."""
        self.metrics |= {name: float(value) for name, value in metrics.items()}
        self.address.log_metrics(metrics, step)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Keep a plot under plots/."""
        content = io.BytesIO()
        figure.savefig(content, format=Path(name).suffix.removeprefix("."))
        self.write({"do": "file", "path": f"plots/{name}", "content": content.getvalue()})

    def log_dict(self, content: Mapping[str, Any], name: str) -> None:
        """Keep a JSON file."""
        self.address.log_text(json.dumps(dict(content), indent=2, default=str, ensure_ascii=False), name)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.write({"do": "tags", "tags": dict(tags)})

    def log_input(self, name: str, path: Path, fingerprint: str) -> None:
        """Record lineage: this stage read the artifact or file `path`, whose content has this fingerprint."""
        # MLflow keeps 36 characters of a digest.
        self.write({"do": "input", "name": name, "path": absolute(path), "digest": fingerprint[:36]})


@contextlib.contextmanager
def open_run(name: str, parent_run_id: str | None = None, tags: Mapping[str, str] | None = None) -> Iterator[StageRun]:
    """An MLflow run that ends like the block: as finished, failed, or killed (Ctrl-C, SIGTERM).

    Raises:
        ConfigError: MLflow cannot be reached and has never answered in this process: better now than after hours.
    """
    run_tags = {MLFLOW_RUN_NAME: name, MLFLOW_USER: os.environ.get("USER", "rag"), "stage": name, **(tags or {})}
    if parent_run_id:
        run_tags[MLFLOW_PARENT_RUN_ID] = parent_run_id
    run = StageRun(_new_run(run_tags))
    status = RunStatus.to_string(RunStatus.KILLED)
    try:
        yield run
        status = RunStatus.to_string(RunStatus.FINISHED)
    except Exception:
        status = RunStatus.to_string(RunStatus.FAILED)
        raise
    finally:
        run.write({"do": "end", "status": status, "time": milliseconds()})
        unsent = send_unsent(unsent_files())
        if reason := unsent.get(run.address.journal.file):
            report_unsent(run.address.journal.file, reason)


def _new_run(tags: Mapping[str, str]) -> RunAddress:
    uri, started = tracking_uri(), milliseconds()
    if uri not in _answered:
        prepare_store()
    local = RunAddress._make(uri, f"{delivery.LOCAL}{uuid.uuid4().hex}", create={"tags": dict(tags), "time": started})
    if not pause_of(uri).over:
        return local
    # The parent run may still have to be created.
    send_unsent(unsent_files())
    try:
        with reaching(uri) as client:
            run_id = delivery.make_run(client, local.header)
    except UnreachableError as error:
        if uri not in _answered:
            raise not_reached(error) from error
        pause_of(uri).longer()
        return local
    _answered.add(uri)
    return RunAddress._make(uri, run_id)


def not_reached(error: UnreachableError) -> ConfigError:
    """The error for a server that does not answer before any work was started."""
    return ConfigError(
        f"{error} No work was started. Start the server, correct MLFLOW_TRACKING_URI, or unset it: runs are then kept "
        "in mlflow.db in the current folder."
    )


def check_tracking() -> None:
    """Check that runs can be written to the tracking store, without creating anything.

    Raises:
        ConfigError: a variable is wrong, or the store cannot be used.
    """
    check_variables(FOR_STAGES)
    check_store(tracking_uri(), experiment_name())


def prepare_store() -> None:
    """Create the tracking store and the experiment if they do not exist, and send writes that earlier commands kept.

    Raises:
        ConfigError: MLflow cannot be reached, or its store cannot be used.
    """
    check_tracking()
    uri = tracking_uri()
    try:
        with creation_lock(uri), reaching(uri, retries=1) as client:
            delivery.experiment_id(client, experiment_name())
    except UnreachableError as error:
        raise not_reached(error) from error
    _answered.add(uri)
    send_unsent(unsent_files())


def unsent_folder() -> Path:
    """The folder of writes that wait for MLflow: `RAG_MLFLOW_UNSENT`, or mlflow-unsent in the current folder.

    The path is absolute, because workers use it too.
    """
    return Path(os.environ.get("RAG_MLFLOW_UNSENT") or UNSENT).resolve()


def unsent_files() -> list[Path]:
    """The files in `unsent_folder()`, oldest first: a pipeline's own file comes before those of its stages."""
    return sorted(unsent_folder().glob(f"*{SUFFIX}"), key=lambda file: str(header_of(file).get("since", "")))


def send_unsent(
    files: Sequence[Path], *, anywhere: bool = False, seconds: float = SECONDS_AT_THE_END
) -> dict[Path, str]:
    """Send the writes in `files`; returns for each file that could not be sent the reason.

    Args:
        anywhere: also send to servers other than this process's.
        seconds: time limit for each file.
    """
    own_uri, unsent = tracking_uri(), dict[Path, str]()
    problem_of = functools.cache(_problem_of_store)  # wait only once for a server that does not answer
    for file in files:
        header = header_of(file)
        is_own = header.get("mlflow", "") in ("", without_credentials(own_uri))
        if is_own or anywhere:
            uri = own_uri if is_own else str(header["mlflow"])
            if anywhere and (reason := problem_of(uri, str(header.get("experiment") or experiment_name()))):
                unsent |= {file: reason}
                continue
            reason = _journal(uri, file, json.dumps(header)).send(seconds, wait=SECONDS_AT_THE_END)
            unsent |= {file: reason} if reason else {}
    return unsent


def _problem_of_store(uri: str, experiment: str) -> str:
    """Why no run can be written to that store; "" if it can."""
    try:
        check_store(uri, experiment)
    except ConfigError as error:
        return str(error)
    return ""


def report_unsent(file: Path, reason: str) -> None:
    """Tell the user how many writes MLflow does not have yet, and how they are sent later."""
    writes = file.read_bytes().count(b"\n") - 1
    warn(
        f"{writes} writes of this run have not reached MLflow ({reason}). They are kept in {file}. The next command "
        "in this folder sends them, or `rag sync-mlflow`."
    )


def experiment_name() -> str:
    """The experiment that all runs go to: MLFLOW_EXPERIMENT_NAME, or "rag"."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT


def tracking_uri() -> str:
    """The tracking store: `MLFLOW_TRACKING_URI`, or a SQLite file in the current folder (absolute, for workers)."""
    return str(mlflow.get_tracking_uri())


def run_link(run: StageRun) -> str:
    """How a person opens the run: a link for a tracking server, the command that starts one for a local store."""
    uri = without_credentials(run.address.tracking_uri)
    if run.address.journal.file.exists() or not pause_of(run.address.tracking_uri).over:
        return f"{uri} does not answer; writes for it are kept in `{run.address.journal.file}`"
    try:
        with reaching(run.address.tracking_uri) as client:
            experiment = delivery.experiment_id(client, experiment_name())
    except UnreachableError as error:
        return f"run {run.run_id} ({error})"
    page = f"/#/experiments/{experiment}/runs/{run.run_id}"
    return (
        f"{uri.rstrip('/')}{page}" if uri.startswith("http") else f"`mlflow ui --backend-store-uri {uri}`, then {page}"
    )


def milliseconds() -> int:
    """The current time in MLflow's unit."""
    return int(time.time() * 1000)


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
