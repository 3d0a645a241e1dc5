"""Contexts by any OpenAI-compatible endpoint: POST BASE_URL/chat/completions, many at once, paced, tried again.

Tried again: 408, 409, 429, 5xx, timeouts, lost connections and answers that are none. Refused, and so left to the
templates: a request that the server will not take (400, 413, 422) or keeps answering with nothing; a refusal is
kept once the server has answered any. Everything else, and no answer after all tries, ends the run with one line; what
was answered is in the cache.
"""

from __future__ import annotations

import email.utils
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from .answers import Answer, Request
from .config import EndpointConfig
from .corpus import ContextError

AGAIN = {408, 409, 429}
REFUSED = {400, 413, 422}
MAX_REFUSED = 5  # at the start, before any answer: then it is not the requests that are wrong
MAX_WAIT_S = 600.0
SHOWN = 200  # characters of an error that a server answers with
DEFAULTS = {"temperature": 0.8, "max_tokens": 200}


class Pace:
    """Gives every request its time to start: `per_minute` at most (0: any number), none while the server wants rest."""

    def __init__(self, per_minute: float):
        self.interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def reserve(self) -> float:
        """Return the seconds to wait before the next request may start."""
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + self.interval
            return start - now

    def rest(self, seconds: float) -> None:
        """No request starts for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


class _Again(Exception):
    """Worth another try; `rest_s` where the server says after how long."""

    def __init__(self, reason: str, *, rest_s: float | None = None, answered: bool = False):
        super().__init__(reason)
        self.rest_s, self.answered = rest_s, answered


class _Stopped(Exception):
    """Another request has failed for good."""


class EndpointWriter:
    """Writes by an endpoint. `counts` counts requests, retries and what was no answer."""

    def __init__(self, cfg: EndpointConfig):
        self.cfg, self.counts = cfg, Counter()
        self.url = cfg.base_url.rstrip("/") + "/chat/completions"
        self.parameters = {**DEFAULTS, **cfg.parameters}
        self.identity = {"model": cfg.model, "parameters": self.parameters}
        self._key = self._api_key()
        self._pace = Pace(cfg.requests_per_minute)
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._answered = self._refused = 0

    def _api_key(self) -> str:
        if not self.cfg.api_key_env:
            return ""
        key = os.environ.get(self.cfg.api_key_env, "").strip()
        if not key:
            raise ContextError(f"endpoint.api_key_env: the environment variable {self.cfg.api_key_env} is not set")
        if not (key.isascii() and key.isprintable()):  # a library's error would show it
            raise ContextError(f"endpoint.api_key_env: {self.cfg.api_key_env} holds characters that no key has")
        return key

    def write(self, requests: Sequence[Request], keep: Callable[[int, Answer | None], None]) -> None:
        """Ask all, `concurrency` at a time; the first failure stops those that have not begun, and is raised."""
        self._stop.clear()
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = httpx.Limits(max_connections=self.cfg.concurrency, max_keepalive_connections=self.cfg.concurrency)
        with (
            httpx.Client(headers=headers, timeout=self.cfg.timeout_s, limits=limits) as client,
            ThreadPoolExecutor(self.cfg.concurrency) as threads,
        ):
            futures = [
                threads.submit(self._one, client, request, number, keep) for number, request in enumerate(requests)
            ]
            try:
                errors = [error for future in futures if (error := future.exception()) is not None]
            finally:
                self._stop.set()  # also on Ctrl-C: what has not begun never will
        for error in errors:
            if not isinstance(error, _Stopped):
                raise error

    def _one(
        self, client: httpx.Client, request: Request, number: int, keep: Callable[[int, Answer | None], None]
    ) -> None:
        try:
            answer = self._ask(client, request)
            if answer is not None or self._answered:  # where nothing was answered yet, the settings may be wrong
                keep(number, answer)
        except BaseException:
            self._stop.set()
            raise

    def _ask(self, client: httpx.Client, request: Request) -> Answer | None:
        """Return the answer, after as many tries as it takes; None where it is refused."""
        reason = _Again("never asked")
        for attempt in range(self.cfg.retries + 1):
            self._wait(self._pace.reserve())
            self._count("requests")
            if attempt:
                self._count("retries")
            try:
                return self._post(client, request)
            except _Again as error:
                reason = error
                if error.rest_s is not None:
                    self._pace.rest(min(error.rest_s, MAX_WAIT_S))
                if attempt < self.cfg.retries:  # beside the rest: a server that wants none is not asked at once
                    self._wait(min(self.cfg.backoff_s * 2**attempt, MAX_WAIT_S))
        if reason.answered:  # only this request gets nothing sensible: the templates will do
            return self._refuse(str(reason))
        raise ContextError(
            f"{self.url}: no answer in {self.cfg.retries + 1} tries (the last: {reason}); see that it runs there, set "
            "endpoint.base_url, or use writer=templates; the same command goes on, and asks nothing again that was "
            "answered"
        )

    def _post(self, client: httpx.Client, request: Request) -> Answer | None:
        messages = [{"role": "system", "content": request.system}, {"role": "user", "content": request.user}]
        body = {"model": self.cfg.model, "messages": messages, "seed": request.seed, **self.parameters}
        try:
            response = client.post(self.url, json={key: value for key, value in body.items() if value is not None})
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise ContextError(
                f"endpoint.base_url = {self.cfg.base_url}: {error}; such as http://host:8000/v1"
            ) from None
        except httpx.HTTPError as error:
            raise _Again(f"{type(error).__name__} {error}".strip()) from None
        status = response.status_code
        if status in AGAIN or status >= 500:
            raise _Again(f"status {status}{self._said(response)}", rest_s=_retry_after(response))
        if status in REFUSED:
            return self._refuse(f"status {status}{self._said(response)}")
        if status != 200:
            raise ContextError(f"{self.url}: status {status}{self._said(response)}; {_way_out(status, self.cfg)}")
        answer = _answer(response)
        with self._lock:
            self._answered += 1
        return answer

    def _refuse(self, why: str) -> None:
        """Leave one request to the templates; an error where none has ever been answered."""
        with self._lock:
            self._refused += 1
            hopeless = self._refused >= MAX_REFUSED and not self._answered
        if hopeless:
            raise ContextError(
                f"{self.url}: answers nothing (the last: {why}); see endpoint.base_url, endpoint.model and "
                "endpoint.parameters (null takes one out)"
            )

    def _said(self, response: httpx.Response) -> str:
        """What the server says of an error, on one line, and never our key."""
        text = " ".join(response.text.split())
        text = text.replace(self._key, "***") if self._key else text
        return f", {text[:SHOWN]}" if text else ""

    def _wait(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _Stopped

    def _count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


def _answer(response: httpx.Response) -> Answer:
    """Return the text and the tokens of an answer; one without text is worth another try."""
    try:
        content: Any = response.json()
        text = content["choices"][0]["message"]["content"]
        usage = content.get("usage") or {}
        tokens = [int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Again("an answer that is no chat completion", answered=True) from None
    if not isinstance(text, str) or not text.strip():
        raise _Again("an empty answer", answered=True)
    return Answer(text, *tokens)


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that a Retry-After header asks for, in either of its forms."""
    value = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, IndexError):
        return None


def _way_out(status: int, cfg: EndpointConfig) -> str:
    if status in (401, 403):
        variable = cfg.api_key_env or "(none is named)"
        return f"the key is read from the environment variable endpoint.api_key_env: {variable}"
    return f"see endpoint.base_url and endpoint.model ({cfg.model})"
