"""A web server on the loopback that can misbehave on purpose."""

from __future__ import annotations

import hashlib
import html
import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit


class Seen(NamedTuple):
    """A request: its method, file name, Range header, status, and path with query."""

    method: str
    name: str
    range: str | None
    status: int
    target: str


@dataclass
class Fault:
    """What happens to one GET: a `status` instead of the file, or its body broken after `after` bytes: the connection reset,
    `closed` in good order, or `stalled` for some seconds. `claim` bytes more than there are, or fewer, stand in the header."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None
    how: str = "reset"
    stalled_s: float = 0.0
    claim: int = 0


class FileServer:
    """Serves the files of one folder over HTTP, with a listing, ETags and ranges unless they are switched off."""

    def __init__(self, root: Path):
        self.root, self.ranges, self.etags, self.head, self.authorization = root, True, True, True, ""
        self.delay_s = 0.0  # between pieces of 16 KiB of a body
        self.seen: list[Seen] = []
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)  # by file name, a GET each
        self.always: dict[str, Fault] = {}  # by file name, every GET
        handler = type("Handler", (_Handler,), {"server_": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._closing = threading.Event()
        self._thread.start()

    @property
    def netloc(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        """Of the folder."""
        return f"http://{self.netloc}/data/corpus"

    def requests(self, method: str, name: str | None = None) -> list[Seen]:
        """What was asked for, in order."""
        return [seen for seen in self.seen if seen.method == method and name in (None, seen.name)]

    def wait(self, seconds: float) -> None:
        """Sleep, but not beyond the end of the server."""
        self._closing.wait(seconds)

    def close(self) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_: FileServer

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        server, path = self.server_, unquote(urlsplit(self.path).path)
        folder, _, name = path.rpartition("/")
        if path == "/data/corpus":
            folder, name = path, ""
        fault = Fault()
        if self.command == "GET":
            fault = server.always.get(name) or (server.faults[name].popleft() if server.faults[name] else fault)
        file = server.root / name
        if server.authorization and self.headers.get("Authorization") != server.authorization:
            return self._reply(name, 401, {"WWW-Authenticate": "Basic"})
        if self.command == "HEAD" and not server.head:
            return self._reply(name, 405, {})
        if fault.status != 200:
            return self._reply(name, fault.status, fault.headers)
        if folder != "/data/corpus" or (name and not file.is_file()):
            return self._reply(name, 404, {})
        if not name:
            return self._reply(name, 200, {"Content-Type": "text/html"}, self._listing())
        self._file(name, file.read_bytes(), formatdate(file.stat().st_mtime, usegmt=True), fault)

    def _file(self, name: str, data: bytes, modified: str, fault: Fault) -> None:
        server = self.server_
        headers = {"Last-Modified": modified}
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        if server.etags:
            headers["ETag"] = etag
            if self.headers.get("If-Match", etag) != etag:
                return self._reply(name, 412, headers)
        asked = self.headers.get("Range") if server.ranges else None
        if asked is None:
            return self._reply(name, 200, headers, data, fault)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return self._reply(name, 416, headers | {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        self._reply(name, 206, headers, data[start:end], fault)

    def _reply(self, name: str, status: int, headers: dict[str, str], body: bytes = b"", fault: Fault | None = None) -> None:
        fault = fault or Fault()
        self.server_.seen.append(Seen(self.command, name, self.headers.get("Range"), status, self.path))
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) + fault.claim))
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = min(len(body), len(body) + fault.claim) if fault.after is None else fault.after
        try:
            self._send(body[:sent])
        except OSError:
            return  # the client went away
        if fault.after is not None or fault.claim > 0:
            self.server_.wait(fault.stalled_s)
            self.close_connection = True
            if fault.how == "reset":
                # SO_LINGER of 0 seconds: close() sends a reset instead of a farewell.
                self.connection.setsockopt(1, 13, b"\x01\x00\x00\x00\x00\x00\x00\x00")

    def _send(self, body: bytes) -> None:
        step = 16 << 10 if self.server_.delay_s else max(1, len(body))
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            self.server_.wait(self.server_.delay_s)

    def _listing(self) -> bytes:
        """As Apache and nginx write it: a link, then date and size."""
        others = ["../", "?C=N;O=D", "/elsewhere/other.parquet", "sub/", "sub/other.parquet"]
        rows = [f'<a href="{href}">x</a>' for href in others]
        for file in sorted(self.server_.root.iterdir(), reverse=True):
            stat = file.stat()
            rows.append(f'<a href="{quote(file.name)}">{html.escape(file.name)}</a>   {formatdate(stat.st_mtime)}  {stat.st_size}')
        return "<html><body><pre>{}</pre></body></html>".format("\n".join(rows)).encode()

    def log_message(self, format: str, *args: Any) -> None:
        pass
