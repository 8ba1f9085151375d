"""A hub on 127.0.0.1 with the part of the hub's HTTP interface that downloads use. It can be told to fail."""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits, oldest first: each is a dict of file contents. main is the newest; a tag may name another."""

    commits: list[dict[str, bytes]]
    tags: dict[str, int] = field(default_factory=dict)
    token: str | None = None

    def sha(self, number: int) -> str:
        names = json.dumps(
            [
                [name, hashlib.sha1(content).hexdigest()]
                for name, content in sorted(self.commits[number].items())
            ]
        )
        return hashlib.sha1(names.encode()).hexdigest()

    def resolve(self, revision: str) -> int | None:
        known = (
            {"main": len(self.commits) - 1} | self.tags | {self.sha(n): n for n in range(len(self.commits))}
        )
        return known.get(revision)


@dataclass
class Failure:
    """A fault on matching paths, `times` times: an error status, a cut after half of a file, or silence."""

    paths: str
    kind: str  # "404", "401", "500", "cut", "stall"
    times: int = 10**9


class Hub:
    """A running hub. Point HF_ENDPOINT at hub.url.

    with Hub({"datasets/owner/name": Repository(...), "models/owner/name": Repository(...)}) as hub: ...
    """

    def __init__(self, repositories: dict[str, Repository]):
        self.repositories, self.failures, self.asked, self.lock = repositories, [], [], threading.Lock()
        self.stopped = threading.Event()
        self.slow_seconds = 0.0  # between the pieces of a file
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self)

            do_GET = do_HEAD

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    def fail(self, paths: str, kind: str, times: int = 10**9) -> None:
        self.failures.append(Failure(paths, kind, times))

    def downloads(self) -> list[str]:
        """The files that were asked for with their content, in order."""
        return [path for method, path in self.asked if method == "GET" and "/resolve/" in path]

    def _failure(self, path: str) -> str | None:
        with self.lock:
            for failure in self.failures:
                if failure.times and re.search(failure.paths, path):
                    failure.times -= 1
                    return failure.kind
        return None

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append((request.command, path))
        failure = self._failure(path)
        if failure == "stall":
            self.stopped.wait(120)
            request.close_connection = True
        elif failure in ("404", "401", "500"):
            code = {"404": "RepoNotFound", "401": "RepoNotFound"}.get(failure)
            self._send(request, int(failure), b"", {"X-Error-Code": code} if code else {})
        else:
            self._find(request, path, cut=failure == "cut")

    def _find(self, request: BaseHTTPRequestHandler, path: str, cut: bool) -> None:
        match = re.fullmatch(r"/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?", path)
        kind = "api"
        if not match:
            match = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
            kind = "file"
        if not match:
            return self._send(request, 404, b"")
        repository = self.repositories.get(f"{(match[1] or 'models').strip('/')}/{match[2]}")
        authorised = repository and (
            not repository.token or request.headers.get("Authorization") == f"Bearer {repository.token}"
        )
        if not authorised:
            return self._send(
                request, 404 if repository is None else 401, b"", {"X-Error-Code": "RepoNotFound"}
            )
        number = repository.resolve(match[4] or "main")
        if number is None:
            return self._send(request, 404, b"", {"X-Error-Code": "RevisionNotFound"})
        files, sha = repository.commits[number], repository.sha(number)
        if kind == "api" and match[3] == "tree":
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in files.items()
            ]
            return self._send(request, 200, json.dumps(entries).encode())
        if kind == "api":
            info = {
                "_id": "0",
                "id": match[2],
                "sha": sha,
                "siblings": [{"rfilename": name} for name in files],
            }
            return self._send(request, 200, json.dumps(info).encode())
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if match[5] not in files:
            return self._send(request, 404, b"", headers | {"X-Error-Code": "EntryNotFound"})
        content = files[match[5]]
        self._send_file(request, content, headers | {"ETag": f'"{_oid(content)}"'}, cut)

    def _send_file(self, request, content: bytes, headers: dict[str, str], cut: bool) -> None:
        status, start = 200, re.match(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if start and int(start[1]):
            status, headers = (
                206,
                headers | {"Content-Range": f"bytes {start[1]}-{len(content) - 1}/{len(content)}"},
            )
            content = content[int(start[1]) :]
        self._send(
            request, status, content[: len(content) // 2] if cut else content, headers, length=len(content)
        )
        if cut:
            request.close_connection = True

    def _send(
        self,
        request,
        status: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        request.send_response(status)
        for name, value in {
            **(headers or {}),
            "Content-Length": str(len(content) if length is None else length),
        }.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            for piece in range(0, len(content), 1 << 16):
                request.wfile.write(content[piece : piece + (1 << 16)])
                time.sleep(self.slow_seconds)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
