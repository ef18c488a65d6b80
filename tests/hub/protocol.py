"""HTTP layer of the fake Hub: routes of requests to endpoints, and the sending of answers and errors."""

import json
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote, urlsplit


__all__ = ["BROKEN", "CUT", "GARBLED", "READER", "WRITER", "Connection", "Refusal"]

WRITER, READER = "hf_writer", "hf_reader"  # tokens
BROKEN, CUT, GARBLED = 0, 1, 2  # instead of a status: no answer, half of one, and one with another content
ID = r"(?P<id>[\w.-]+/[\w.-]+)"
ROUTES = [  # stage, method, path
    ("create", "POST", r"/api/repos/create"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("auth", "GET", rf"/api/models/{ID}/auth-check/write"),
    ("info", "GET", rf"/api/models/{ID}(/revision/(?P<revision>[^/]+))?"),
    ("tree", "GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)(/(?P<path>.+))?"),
    ("preupload", "POST", rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)"),
    ("batch", "POST", rf"/{ID}\.git/info/lfs/objects/batch"),
    ("put", "PUT", rf"/lfs/{ID}/(?P<oid>\w+)"),
    ("verify", "POST", rf"/lfs/{ID}/verify"),
    ("commit", "POST", rf"/api/models/{ID}/commit/(?P<revision>[^/]+)"),
    ("resolve", "GET", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
]


DAMAGES: dict[int | None, Callable[[bytes], bytes]] = {
    None: lambda data: data,
    CUT: lambda data: data[: len(data) // 2],
    GARBLED: lambda data: data[: len(data) // 2] + bytes(255 - byte for byte in data[len(data) // 2 :]),
}


class Refusal(Exception):
    """Raised by an endpoint to answer with an error status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Connection(BaseHTTPRequestHandler):
    """HTTP connection that parses requests and sends answers; subclasses define `_serve`, which handles a request."""

    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = 1 << 16, True  # else every answer waits 40 ms for an acknowledgement

    def log_message(self, *args) -> None:
        """Do not log requests."""

    def _handle(self) -> None:
        self.body, self.hub, self.damage = self._read(), self.server.hub, None
        parts = urlsplit(self.path)
        self.query, method = parse_qs(parts.query), self.command.replace("HEAD", "GET")
        for self.stage, verb, pattern in ROUTES:
            match = re.fullmatch(pattern, parts.path)
            if match and verb == method:
                self.found = {name: value and unquote(value) for name, value in match.groupdict().items()}
                break
        else:
            return self._answer(404, {"error": f"no such endpoint: {self.command} {self.path}"})
        try:
            self._serve()
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            self._answer(refusal.status, {"error": str(refusal)}, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, content: bytes | dict | list, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        sent = DAMAGES[self.damage](data)
        self.send_response(status)
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
            self.close_connection |= self.damage == CUT
