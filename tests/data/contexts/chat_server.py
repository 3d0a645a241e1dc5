"""A real HTTP server that speaks the chat completions protocol, and misbehaves where a test says so."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKENS = {"prompt_tokens": 50, "completion_tokens": 7}


class Reply:
    """What the server does with one request: a status and a body (text, or JSON of it), after `delay` seconds."""

    def __init__(self, status: int = 200, body=None, *, headers: dict | None = None, delay: float = 0.0):
        self.status, self.body, self.headers, self.delay = status, body, headers or {}, delay


def completion(text: str) -> Reply:
    return Reply(200, {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": TOKENS})


def obliging(body: dict) -> Reply:
    """Write a sentence with every name that is asked for."""
    asked = json.loads(body["messages"][1]["content"].partition("\n")[2])
    return completion(f"Yesterday somebody asked about {', '.join(asked['names'])}.")


class ChatServer:
    """`replies(number, body)` says what to do with the request that is the `number`-th to arrive, from 1."""

    def __init__(self, replies: Callable[[int, dict], Reply] = lambda number, body: obliging(body)):
        self.replies = replies
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.answered: Counter[str] = Counter()  # bodies that got a 200
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()

    def _handler(server):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server._lock:
                    server.bodies.append(body)
                    server.headers.append({key.lower(): value for key, value in self.headers.items()})
                    server.times.append(time.monotonic())
                    number = len(server.bodies)
                    server._at_once += 1
                    server.most_at_once = max(server.most_at_once, server._at_once)
                reply = server.replies(number, body) if self.path == "/v1/chat/completions" else Reply(404, "no such")
                time.sleep(reply.delay)
                with server._lock:
                    server._at_once -= 1
                    if reply.status == 200:
                        server.answered[json.dumps(body, sort_keys=True)] += 1
                self._send(reply)

            def _send(self, reply):
                text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
                payload = text.encode()
                try:
                    self.send_response(reply.status)
                    for name, value in {**reply.headers, "content-length": str(len(payload))}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(payload)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has given up waiting

        return Handler
