"""Faulty servers on loopback: one gives every request the same answer, one never answers, one does not exist."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.support.servers.processes import free_port

JSON, HTML = "application/json", "text/html; charset=utf-8"


@contextlib.contextmanager
def answering(status: int, body: str = "", kind: str = JSON) -> Iterator[str]:
    """A server that answers every request with this status and body; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """HOST:PORT of a server that accepts connections and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(20)
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def absent() -> str:
    """HOST:PORT where no server listens."""
    return f"127.0.0.1:{free_port()}"
