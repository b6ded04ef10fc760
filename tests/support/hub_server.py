"""A small HTTP server on the loopback that answers as the Hugging Face hub does, for the tests of downloads.

Files of weights are redirected to another origin, as the hub redirects to its storage, with an address that
is signed and for which no token is needed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aTokenThatNobodyMaySee"


def read_files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass
class HostedRepository:
    """Files at every commit, and where branches and tags point."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    # Shown to nobody without TOKEN.
    private: bool = False
    # Shown to everybody, its files only with TOKEN.
    gated: bool = False

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit of these files, to which the branch then points."""
        text = "".join(f"{name} {hashlib.sha1(data).hexdigest()}\n" for name, data in sorted(files.items()))
        commit = hashlib.sha1(f"{len(self.commits)} {text}".encode()).hexdigest()
        self.commits[commit] = files
        self.revisions[branch] = commit
        return commit


class HubServer:
    """Serves `repositories` at `endpoint` and remembers what was asked."""

    def __init__(self):
        self.repositories: dict[str, HostedRepository] = {}
        # (method, path) of every request, in order.
        self.requests: list[tuple[str, str]] = []
        # Ranges that were asked for.
        self.ranges: list[str] = []
        # Bytes after which the connection is closed while a file of weights is sent, one download each.
        self.cuts: list[int] = []
        # What to answer every request with instead, such as 503.
        self.status: int | None = None
        # Seconds to wait before any answer.
        self.delay = 0.0
        # Said of a commit instead of what it is.
        self.pretended_commit: str | None = None
        # Leave out what only a hub says of a file, as a proxy may.
        self.plain = False
        # The token reached the storage.
        self.token_left_the_hub = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def sent(self) -> list[str]:
        """The files of which something was sent, by name."""
        asked = [path for method, path in self.requests if method == "GET" and "/resolve/" in path]
        return sorted({path.partition("/resolve/")[2].partition("/")[2] for path in asked})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # who asked did not wait for the answer
            super().handle()

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((self.command, path))
        time.sleep(hub.delay)
        stored = self.headers.get("Host", "").startswith("localhost")
        authorised = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        hub.token_left_the_hub |= stored and "Authorization" in self.headers
        if hub.status:
            return self._error(hub.status, "", "Out of order")
        if "Authorization" in self.headers and not authorised:
            return self._error(401, "", "Invalid credentials in Authorization header")
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            kind, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        elif "/resolve/" in path:
            kind, (owner, name) = "resolve", path[1:].partition("/resolve/")[0].split("/")
            revision, _, wanted = path.partition("/resolve/")[2].partition("/")
        else:
            return self._error(404, "", "Not found")
        repository = hub.repositories.get(f"{owner}/{name}")
        if repository is None or (repository.private and not authorised and not stored):
            # To strangers the hub does not say whether there is one.
            return self._error(404 if authorised else 401, "RepoNotFound", "Repository not found")
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.commits:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repository.commits[commit]
        if kind == "revision":
            said = {"id": f"{owner}/{name}", "sha": hub.pretended_commit or commit, "siblings": []}
            return self._json(said | {"private": repository.private, "gated": repository.gated})
        if kind == "tree":
            return self._json([_entry(file, data) for file, data in files.items()])
        if repository.gated and not authorised and not stored:
            return self._error(401, "GatedRepo", f"Access to model {owner}/{name} is restricted.")
        if wanted not in files:
            return self._error(404, "EntryNotFound", "Entry not found")
        self._file(files[wanted], commit, large=wanted.endswith(".safetensors"), stored=stored)

    def _file(self, data: bytes, commit: str, *, large: bool, stored: bool) -> None:
        hub, headers = self.hub, {"Accept-Ranges": "bytes"}
        if not hub.plain:
            headers["X-Repo-Commit"] = commit
        if large and not stored:
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(data))
            headers["Location"] = f"http://localhost:{hub.port}{self.path}?Signature=do-not-show"
            return self._send(302, b"", headers)
        headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
        start, status = 0, 200
        if asked := self.headers.get("Range"):
            hub.ranges.append(asked)
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = hub.cuts.pop(0) if large and self.command == "GET" and hub.cuts else None
        self._send(status, data[start:], headers, cut)

    def _json(self, values) -> None:
        self._send(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        # More than the hub says: an answer may hold anything.
        said = {"error": f"{message} (Authorization: {self.headers.get('Authorization')})"}
        self._send(status, json.dumps(said).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:cut])
        self.close_connection = self.close_connection or cut is not None


def _entry(path: str, data: bytes) -> dict:
    """A line of the listing of a commit."""
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
