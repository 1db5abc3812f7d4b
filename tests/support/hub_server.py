"""Run a small Hugging Face hub on a loopback port, with the endpoints that HfFileSystem lists and reads datasets by."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """Serves folder/OWNER/NAME/COMMIT/... as datasets, records what it sent, and fails as `faults` says."""

    folder: Path
    url: str = ""
    branches: dict[str, str] = field(default_factory=dict)
    """Branch -> commit. Only the request for a revision resolves branches; listing and reading want the commit."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    """Kind of request (info, list, data) -> the faults of its next requests: a status, "drop", "cut" or "short"."""
    kinds: list[str] = field(default_factory=list)
    """Kind of every request, in order."""
    sent: list[tuple[str, int, int]] = field(default_factory=list)
    """File, first byte and end of every range that was sent, in order."""

    def bytes_sent(self) -> int:
        return sum(end - start for _, start, end in self.sent)


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Run a hub until the block ends."""
    hub = Hub(folder)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # A client may hang up.


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    fault = ""
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(revision|tree)/([^/]+)(?:/(.*))?", path)
        resolve = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        if api and api[2] == "revision":
            self._answer("info", lambda: self._info(api[1], api[3]))
        elif api:
            self._answer("list", lambda: self._list(api[1], api[3], api[4] or ""))
        elif resolve:  # The real hub redirects, too.
            self._redirect(f"/files/{resolve[1]}/{resolve[2]}/{resolve[3]}")
        elif path.startswith("/files/"):
            self._answer("data", lambda: self._file(path.removeprefix("/files/")))
        else:
            self._send(404, b"{}")

    def _answer(self, kind: str, reply: Callable[[], None]) -> None:
        self.hub.kinds.append(kind)
        waiting = self.hub.faults.get(kind)
        self.fault = waiting.pop(0) if waiting else ""
        if self.fault.isdigit():
            self._send(int(self.fault), b"{}")
        elif self.fault == "drop":
            self.close_connection = True
        else:
            reply()

    def _info(self, repo: str, revision: str) -> None:
        commit = self.hub.branches.get(revision, revision)
        if not (self.hub.folder / repo).is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif not (self.hub.folder / repo / commit).is_dir():
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            self._json({"id": repo, "sha": commit, "siblings": [], "tags": [], "private": False})

    def _list(self, repo: str, revision: str, inside: str) -> None:
        root = self.hub.folder / repo / revision
        if not (root / inside).is_dir():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        paths = (root / inside).rglob("*") if "recursive=true" in self.path.lower() else (root / inside).iterdir()
        self._json([_entry(path, root) for path in sorted(paths)])

    def _file(self, name: str) -> None:
        path = self.hub.folder / name
        if not path.is_file():
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        data = path.read_bytes()
        start, end, status = 0, len(data), 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", "")):
            start, end, status = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data)), 206
        if self.command == "GET":
            self.hub.sent.append((path.name, start, end))
        if self.fault == "short" and status == 206:
            end = (start + end) // 2  # This is a well-formed answer with fewer bytes than were asked for.
        headers = (
            {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}", "Accept-Ranges": "bytes"} if status == 206 else {}
        )
        self._send(status, data[start:end], headers)

    def _redirect(self, where: str) -> None:
        self._send(302, b"", {"Location": where})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if self.fault == "cut" else body)
        self.close_connection = self.close_connection or self.fault == "cut"


def _entry(path: Path, root: Path) -> dict[str, object]:
    kind = "directory" if path.is_dir() else "file"
    return {
        "type": kind,
        "path": str(path.relative_to(root)),
        "oid": "0" * 40,
        "size": path.stat().st_size if kind == "file" else 0,
    }
