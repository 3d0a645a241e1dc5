"""A small HTTP server with ranges: it serves a folder, notes what is asked, and a test can spoil its answers."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
import time
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    path: str
    start: int
    stop: int


class RangeServer(ThreadingHTTPServer):
    """`faults` are taken one by one, each by the next GET: a status, or cut, short, reset, silent, trickle, whole.

    `always` is a fault for every GET; without `versions` no answer has an ETag. With a barrier `meeting` answers wait
    until as many have been asked for.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: deque[int | str] = deque()
        self.always: int | str | None = None
        self.meeting: threading.Barrier | None = None
        self.versions = True
        self.requests: list[Request] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        pass  # clients that hang up are part of the tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        file = self.server.folder / self.path.lstrip("/")
        self.send_response(200 if file.is_file() else 404)
        self.send_header("Content-Length", str(file.stat().st_size if file.is_file() else 0))
        self.end_headers()

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            if server.meeting is not None:
                server.meeting.wait(60)
            self._answer()
        finally:
            with server.lock:
                server.under_way -= 1

    def _answer(self) -> None:
        server, file = self.server, self.server.folder / unquote(urlsplit(self.path).path).lstrip("/")
        with server.lock:
            fault = server.always if server.always is not None else server.faults.popleft() if server.faults else None
        if not file.is_file():
            fault = 404
        content = file.read_bytes() if fault != 404 else b""
        start, stop = self._range(len(content))
        with server.lock:
            server.requests.append(Request(self.path, start, stop))
        if isinstance(fault, int):
            self._send(fault, b"spoilt", "")
        elif fault == "reset":
            self._hang_up()
        elif fault == "silent":
            time.sleep(60)
        elif fault == "whole":
            self._send(200, content, "")
        elif start >= len(content):
            self._send(416, b"", "")
        else:
            headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
            if server.versions:
                headers["ETag"] = f'"{hashlib.md5(content).hexdigest()}"'
            ranged = "Range" in self.headers
            self._send(206 if ranged else 200, content[start:stop], fault or "", headers if ranged else {})

    def _hang_up(self) -> None:
        # With nothing to linger for, closing is a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _range(self, size: int) -> tuple[int, int]:
        first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
        return int(first), min(size, int(last) + 1 if last else size)

    def _send(self, status: int, body: bytes, fault: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        # "short" is an answer that is whole by itself and lacks a half; "cut" breaks off.
        body = body[: len(body) // 2] if fault == "short" else body
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self._hang_up()
        elif fault == "trickle":
            for byte in body:
                self.wfile.write(bytes([byte]))
                time.sleep(0.2)
        else:
            self.wfile.write(body)


@contextmanager
def serving(folder: Path):
    """Serve a folder on a free port of this machine."""
    with RangeServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
