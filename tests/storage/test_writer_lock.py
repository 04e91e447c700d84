"""Two writers at one place: the second waits or fails, as set, and the artifact is made once and whole."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from rag_core.errors import ArtifactError, ConfigError
from rag_core.storage import writer_lock
from rag_core.storage.artifact import open_artifact, publish
from rag_core.storage.writer_lock import lock_file, only_writer, reserved, wait_setting

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 240

# What `run_stage` does around a stage's work; the work lasts until the test lets it end.
STAGE = """
import os, sys, time
from pathlib import Path
from rag_core.storage.artifact import find_finished, publish
from rag_core.errors import ArtifactError
from rag_core.storage.writer_lock import reserved

out, end = Path(sys.argv[1]), Path(sys.argv[2])
try:
    with reserved(out):
        if find_finished(out, "thing", {}, {}) is None:
            with publish(out, "thing") as draft:
                for number in range(10):
                    (draft.folder / f"part-{number}").write_text(str(os.getpid()))
                while not end.exists():
                    time.sleep(0.01)
            print("made")
        else:
            print("skipped")
except ArtifactError as error:
    print(error)
    sys.exit(2)
"""
HELD = "is being written by another run (process "


def two_at_once(folder: Path, wait: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of two processes; one works until the other has waited or given up."""
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "RAG_WAIT_SECONDS": wait}
    command = [sys.executable, "-c", STAGE, str(folder / "out"), str(folder / "end")]
    runs, messages = [], [folder / "messages-0", folder / "messages-1"]
    for message_file in messages:
        with message_file.open("w") as file:
            runs.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True))
    until = time.monotonic() + WAIT_SECONDS
    while not any(run.poll() is not None for run in runs) and HELD not in "".join(map(Path.read_text, messages)):
        assert time.monotonic() < until, "neither process had to wait"
        time.sleep(0.02)
    (folder / "end").touch()
    outputs = [run.communicate(timeout=WAIT_SECONDS)[0] for run in runs]
    return [
        (run.returncode, out.strip(), err.read_text()) for run, out, err in zip(runs, outputs, messages, strict=True)
    ]


def writers_of(out: Path) -> set[str]:
    open_artifact(out, "thing")
    return {(out / f"part-{number}").read_text() for number in range(10)}


def test_of_two_simultaneous_runs_the_one_that_waits_finds_the_work_done(tmp_path: Path) -> None:
    ends = two_at_once(tmp_path, "240")
    assert [code for code, _, _ in ends] == [0, 0], ends
    assert sorted(out for _, out, _ in ends) == ["made", "skipped"]
    assert len(writers_of(tmp_path / "out")) == 1
    (waited,) = [err for _, out, err in ends if out == "skipped"]
    assert HELD in waited
    assert "of at most 240 s" in waited
    assert sorted(path.name for path in tmp_path.iterdir()) == ["end", "messages-0", "messages-1", "out"]


def test_of_two_simultaneous_runs_the_one_that_does_not_wait_names_the_writer_and_its_start(tmp_path: Path) -> None:
    ends = two_at_once(tmp_path, "0")
    assert sorted(code for code, _, _ in ends) == [0, 2], ends
    (refused,) = [out for code, out, _ in ends if code == 2]
    assert "being written by another run (process " in refused
    assert "s ago)" in refused
    assert "rag --wait" in refused
    assert len(writers_of(tmp_path / "out")) == 1


def test_a_writer_that_has_not_yet_written_its_name_gets_time_to_do_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_lock, "NAME_SECONDS", WAIT_SECONDS)
    with lock_file(tmp_path / "out").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def write_name() -> None:
            file.write("process 7 on a-host")
            file.flush()

        later = threading.Timer(0.3, write_name)
        later.start()
        with pytest.raises(ArtifactError, match=r"another run \(process 7 on a-host"), only_writer(tmp_path / "out", 0):
            pass
        later.join()


def test_waiting_ends_after_the_given_seconds(tmp_path: Path) -> None:
    began = time.monotonic()
    with (
        only_writer(tmp_path / "out"),
        pytest.raises(ArtifactError, match="still after 0 s of waiting"),
        only_writer(tmp_path / "out", wait_seconds=0.3),
    ):
        pass
    assert time.monotonic() - began >= 0.3


def test_one_publish_at_a_time_uses_the_lock_of_its_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with reserved(out):
        for text in ("one", "two"):
            with publish(out, "thing") as draft:
                (draft.folder / "data.txt").write_text(text)
                with pytest.raises(ArtifactError, match="being written"), publish(out, "thing"):
                    pass
        assert lock_file(out).exists(), "the stage still holds it"
    assert not lock_file(out).exists()
    assert (out / "data.txt").read_text() == "two"


@pytest.mark.parametrize("text", ["soon", "-1", "nan"])
def test_a_wait_that_is_not_a_number_of_seconds_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAG_WAIT_SECONDS", text)
    with pytest.raises(ConfigError, match=f"RAG_WAIT_SECONDS is '{text}'"):
        wait_setting()


def test_the_commands_option_is_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAG_WAIT_SECONDS", "1")
    (tmp_path / "manifest.json").write_text("{}")
    assert CliRunner().invoke(app, ["--wait", "7.5", "verify", str(tmp_path)]).exit_code == 2
    assert wait_setting() == 7.5
    assert isinstance(CliRunner().invoke(app, ["--wait", "-3", "verify", str(tmp_path)]).exception, ConfigError)
