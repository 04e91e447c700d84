"""A stand-in for the Hugging Face hub on loopback: models with commits, branches, pull requests, gates, and outages.

It implements the part of the hub's API that huggingface_hub needs to list and download models, with the real status
codes and headers, and records every request. It serves the files that tests publish; the weights are random.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".bin", ".safetensors", ".h5", ".msgpack", ".ot", ".onnx")
BOT_TITLE = "Adding `safetensors` variant of this model"


@dataclass(frozen=True)
class Request:
    """One request, as received."""

    method: str
    path: str
    token: str | None

    @property
    def file(self) -> str | None:
        """The requested file, of any revision, or None."""
        return self.path.partition("/resolve/")[2].partition("/")[2] or None


@dataclass
class Repository:
    """A model: its commits, each with all files, and the branches and tags that point to them."""

    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    references: dict[str, str] = field(default_factory=dict)
    readers: set[str] | None = None  # tokens that may see it; None: everybody
    gate: set[str] | None = None  # tokens that may download; None: everybody
    discussions: list[dict[str, Any]] = field(default_factory=list)

    def commit_of(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.references.get(revision)


class HubServer:
    """The server, and the controls for tests."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        # Former name of a model → its current name.
        self.renamed: dict[str, str] = {}
        self.tokens = {"good-token"}
        self.requests: list[Request] = []
        # "": normal. Otherwise "silent" (accepts and never answers), "html", or a status code.
        self.mood: str | int = ""
        # The same for downloads only (also "slow": large files come in pieces, and the connection is lost once),
        # and for the file tree of a commit.
        self.download_mood: str | int = ""
        self.tree_mood: str | int = ""
        self._server = _HttpServer(self)
        self.ended = threading.Event()
        self.connections: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def publish(self, name: str, folder: Path | dict[str, bytes], branch: str = "main", tag: str = "") -> str:
        """Add a commit with these files and move the branch to it; returns the commit's id."""
        if isinstance(folder, Path):
            files = {
                path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
            }
        else:
            files = dict(folder)
        repository = self.repositories.setdefault(name, Repository(name))
        digest = hashlib.sha1(f"{name} {len(repository.commits)}".encode(), usedforsecurity=False)
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
        commit = digest.hexdigest()
        repository.commits[commit] = files
        repository.references |= {branch: commit} | ({tag: commit} if tag else {})
        return commit

    def open_pull_request(self, name: str, files: dict[str, bytes]) -> str:
        """Open a pull request with the title that the weight-conversion bot uses. On the hub anybody can do so."""
        repository = self.repositories[name]
        number = len(repository.discussions) + 1
        commit = self.publish(name, repository.commits[repository.references["main"]] | files, f"refs/pr/{number}")
        author = {"name": "SFconvertbot", "fullname": "a stranger", "type": "user"}
        repository.discussions.append(
            {"num": number, "title": BOT_TITLE, "isPullRequest": True, "status": "open", "author": author}
            | {"createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": name, "type": "model"}}
        )
        return commit

    def lookups(self) -> list[Request]:
        """The requests that are not for a file."""
        return [request for request in self.requests if request.file is None]

    def files(self, method: str = "GET") -> list[str]:
        """The downloaded files, in order."""
        return [request.file for request in self.requests if request.file is not None and request.method == method]

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if not self.ended.is_set():
            self.ended.set()
            self._server.shutdown()
            self._server.server_close()
            for connection in self.connections:  # clients keep them open between requests
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """A hub without models, until the block ends."""
    server = HubServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()


_API = re.compile(r"/api/models/(?P<repo>.+?)(?:/(?P<resource>revision|tree|discussions)(?:/(?P<rest>.*))?)?")
_FILE = re.compile(r"/(?P<repo>.+?)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class _HttpServer(ThreadingHTTPServer):
    """The HTTP side of a hub. Its handlers reach the hub through it."""

    daemon_threads = True

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _HubHandler)


class _Responses(BaseHTTPRequestHandler):
    """Writes responses in the hub's form. Knows nothing of models."""

    protocol_version = "HTTP/1.1"
    server: _HttpServer

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def setup(self) -> None:
        super().setup()
        self.hub.connections.append(self.connection)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""

    def _token(self) -> str | None:
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token if scheme == "Bearer" else None

    def _in_a_mood(self, current: Callable[[], str | int]) -> bool:
        """Respond as the mood says; False if the request should get its usual response."""
        mood = current()
        if mood == "silent":
            while not self.hub.ended.is_set() and current() == "silent":
                time.sleep(0.05)
            self.close_connection = True
        elif mood == "slow":
            return False
        elif mood == "html":
            self._send(200, b"<html><body>Please sign in to the network.</body></html>", "text/html")
        elif mood:
            self._error(int(mood), "", "a bad day")
        return bool(mood)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), "application/json")

    def _error(self, status: int, code: str, message: str, extra: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (extra or {})
        self._send(status, json.dumps({"error": message}).encode(), "application/json", headers)

    def _send(
        self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None, *, slowly: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                if slowly:
                    body = self._send_slowly(body)
                self.wfile.write(body)

    def _send_slowly(self, body: bytes) -> bytes:
        """Send all pieces but the last, less than a second apart.

        Returns the last piece. The file's first download returns b"" instead and loses its connection.
        """
        pieces = 6
        size = len(body) // pieces
        for number in range(pieces - 1):
            self.wfile.write(body[number * size : (number + 1) * size])
            self.wfile.flush()
            time.sleep(0.4)
        if self.hub.files().count(Request(self.command, self.path, None).file or "") > 1:
            return body[(pieces - 1) * size :]
        self.close_connection = True
        return b""


class _HubHandler(_Responses):
    """Answers the hub's API, and downloads, from its repositories."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self._record()
        self._error(404, "EntryNotFound", "nothing is posted here")

    def do_GET(self) -> None:
        self._record()
        hub, path = self.hub, urlsplit(self.path).path
        if self._in_a_mood(lambda: hub.mood):
            return
        if path == "/api/whoami-v2":
            name = {"name": "somebody", "type": "user"}
            return self._json(name) if self._token() in hub.tokens else self._unknown_token()
        if moved := next((old for old in hub.renamed if f"/{old}/" in f"{path}/"), None):
            location = self.path.replace(moved, hub.renamed[moved], 1)
            return self._send(307, b"", "text/plain", {"Location": location})
        if match := _FILE.fullmatch(path):
            if not self._in_a_mood(lambda: hub.download_mood):
                self._file(match["repo"], unquote(match["revision"]), unquote(match["file"]))
            return
        if match := _API.fullmatch(path):
            if match["resource"] == "tree" and self._in_a_mood(lambda: hub.tree_mood):
                return
            return self._api(match["repo"], match["resource"] or "revision", unquote(match["rest"] or "main"))
        self._error(404, "", "Sorry, we can't find the page you are looking for.")

    def _record(self) -> None:
        self.hub.requests.append(Request(self.command, self.path, self._token()))

    def _repository(self, name: str) -> Repository | None:
        """The repository, if it exists and the token may see it. Otherwise sends the error and returns None."""
        token, repository = self._token(), self.hub.repositories.get(name)
        if token is not None and token not in self.hub.tokens:
            self._unknown_token()
        elif repository is None or (repository.readers is not None and token not in repository.readers):
            # Without a token the hub does not tell a private model from a missing one.
            if token is None:
                self._error(401, "RepoNotFound", "Invalid username or password.")
            else:
                self._error(404, "RepoNotFound", "Repository not found")
        else:
            return repository
        return None

    def _unknown_token(self) -> None:
        self._error(401, "", "Invalid credentials in Authorization header")

    def _api(self, name: str, resource: str, revision: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if resource == "discussions":
            listed = repository.discussions
            return self._json({"discussions": listed, "count": len(listed), "start": 0})
        commit = repository.commit_of(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit]
        if resource == "tree":
            return self._json([_entry(path, content) for path, content in sorted(files.items())])
        siblings = [{"rfilename": path, "size": len(content)} for path, content in sorted(files.items())]
        gated = "manual" if repository.gate is not None else False
        private = repository.readers is not None
        self._json(
            {"id": name, "modelId": name, "sha": commit, "private": private, "gated": gated, "siblings": siblings}
        )

    def _file(self, name: str, revision: str, file: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if repository.gate is not None and self._token() not in repository.gate:
            status = 401 if self._token() is None else 403
            return self._error(status, "GatedRepo", f"Access to model {name} is restricted.")
        commit = repository.commit_of(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repository.commits[commit].get(file)
        if content is None:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        etag = _sha256(content) if file.endswith(LARGE) else _blob_id(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.endswith(LARGE):
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{etag}"'}
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if byte_range:
            first, last = int(byte_range[1]), int(byte_range[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        slowly = self.hub.download_mood == "slow" and file.endswith(LARGE) and self.command == "GET"
        self._send(206 if byte_range else 200, content, "application/octet-stream", headers, slowly=slowly)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_id(content: bytes) -> str:
    """Git's object id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
