"""A real MLflow server process on loopback that can be killed and started again at the same address."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.support.servers.processes import free_port

START_SECONDS = 240


class MlflowServer:
    """The server process; its database and files are below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server and wait until it answers; does nothing if it runs already."""
        if self._process and self._process.poll() is None:
            return
        # The process that `mlflow server` starts, without the supervisor, which would double the start time.
        command = [sys.executable, "-m", "uvicorn", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["mlflow.server.fastapi_app:app"]
        store = f"sqlite:///{self.folder}/server.db"
        environment = os.environ | {
            "_MLFLOW_SERVER_FILE_STORE": store,
            "_MLFLOW_SERVER_REGISTRY_STORE": store,
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(self.folder / "artifacts"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        }
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            except OSError:
                assert self._process.poll() is None, (self.folder / "server.log").read_text()
                assert time.monotonic() < end, "the MLflow server did not start"
                time.sleep(0.1)

    def freeze(self) -> None:
        """Stop the process (SIGSTOP): from now on it accepts connections and answers none."""
        assert self._process
        os.killpg(self._process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """Send SIGKILL to the server and its workers."""
        if self._process and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
