"""A real S3 server process (moto) on loopback, and the environment variables that its clients need."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from tests.support.servers.processes import end, free_port

BUCKET = "rag-artifacts"
# Unmistakable words: tests check that no log, manifest or message contains them.
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "CANARYKEYID7Q", "AWS_SECRET_ACCESS_KEY": "canary-secret-81f2"}


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[dict[str, str]]:
    """Start a server with an empty bucket `BUCKET`; yields the environment variables for its clients."""
    port = free_port()
    code = (
        "import sys, threading\n"
        "from moto.server import ThreadedMotoServer\n"
        f"ThreadedMotoServer(ip_address='127.0.0.1', port={port}, verbose=False).start()\n"
        "threading.Event().wait()"
    )
    with log.open("wb") as file:
        server = subprocess.Popen([sys.executable, "-c", code], stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 240
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=5)
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until, "the S3 server did not start"
                time.sleep(0.05)
        environment = {"AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1", **CREDENTIALS}
        import boto3

        options = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=url, **options).create_bucket(Bucket=BUCKET)
        yield environment
    finally:
        end(server)
