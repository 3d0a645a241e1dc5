"""Contexts by an endpoint, over real HTTP: whatever the server does, no answer is lost, and none is paid for twice."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path

import pytest
from chat_server import ChatServer, Reply, completion, obliging
from tiny_corpus import demo_entries, files, read_all, write_shards

from seedling.data.contexts.answers import AnswerCache, Request, ask, open_cache
from seedling.data.contexts.config import ContextsConfig, EndpointConfig
from seedling.data.contexts.contextualize import contextualize
from seedling.data.contexts.corpus import ContextError
from seedling.data.contexts.endpoint import EndpointWriter
from seedling.data.contexts.sidecar import Contexts
from seedling.data.contexts.text import contains, leaks

KEY = "sk-very-secret-0123456789"
ENTRIES = demo_entries(120, seed=3)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), ENTRIES, shards=2)


def endpoint(server, **settings):
    return EndpointConfig(**{"base_url": server.base_url, "model": "m", "backoff_s": 0.01, **settings})


def config(server, **settings):
    forms = {"list": 1, "description": 1, "dialogue": 1, "edits": 1}
    return ContextsConfig(writer="endpoint", endpoint=endpoint(server, **settings), forms=forms)


def run(server, shards, out, **settings):
    cfg = config(server, **settings)
    return contextualize(shards, out, cfg, make_writer=lambda: EndpointWriter(cfg.endpoint))


def questions(count):
    return [Request("system", f"question {number}", 1) for number in range(count)]


def asked(server, count, tmp_path, **settings):
    """Ask `count` questions through a cache; return the texts and what was counted."""
    writer, cache = EndpointWriter(endpoint(server, **settings)), AnswerCache(tmp_path / "answers.jsonl")
    counts: Counter[str] = Counter()
    answers = ask(questions(count), writer=writer, cache=cache, counts=counts)
    cache.close()
    return [answer and answer.text for answer in answers], counts


def echo(number, body):
    return completion(f"answer to {body['messages'][1]['content']}")


def test_sentences_are_the_endpoints_and_lists_are_templates(shards, tmp_path):
    with ChatServer() as server:
        summary = run(server, shards, tmp_path / "out", parameters={"temperature": 0.3, "seed": None, "top_k": 5})
    found = [(e, c[0]) for e, c in zip(ENTRIES, read_all(Contexts(tmp_path / "out"), shards).values())]
    theirs = [(entry, context) for entry, context in found if context.text.startswith("Yesterday somebody asked")]
    assert len(theirs) == summary.counts["sentences by the writer"] > 20
    assert sum(context.text == ", ".join(context.phrases) for _, context in found) > 20
    for entry, context in found:
        assert not leaks(context.text, entry["text"], keywords=entry["keywords"])
        if context.kind == "relevant":
            assert all(contains(context.text, keyword) for keyword in entry["keywords"])
    assert summary.counts["requests"] == len(server.bodies)
    assert summary.counts["prompt tokens"] == 50 * len(server.bodies)
    assert summary.counts["completion tokens"] == 7 * len(server.bodies)
    for body in server.bodies:
        assert (body["model"], body["temperature"], body["top_k"]) == ("m", 0.3, 5) and "seed" not in body
        assert [message["role"] for message in body["messages"]] == ["system", "user"]


def test_what_was_answered_is_never_asked_again(tmp_path):
    with ChatServer(echo) as server:
        first, _ = asked(server, 20, tmp_path)
        again, counts = asked(server, 25, tmp_path)
    assert again == [f"answer to question {number}" for number in range(25)] and first == again[:20]
    assert len(server.bodies) == 25 == len(server.answered) and counts["answers from the cache"] == 20


def test_equal_questions_are_asked_once(tmp_path):
    with ChatServer(echo) as server:
        cache = AnswerCache(tmp_path / "answers.jsonl")
        answers = ask(questions(3) * 4, writer=EndpointWriter(endpoint(server)), cache=cache, counts=Counter())
    assert len(server.bodies) == 3 and [answer.text for answer in answers] == [answers[n % 3].text for n in range(12)]


@pytest.mark.parametrize(
    "bad",
    [
        Reply(429, "slow down"),
        Reply(429, "", headers={"retry-after": "0"}),
        Reply(429, "", headers={"retry-after": formatdate(time.time() - 5, usegmt=True)}),
        Reply(500, "<html>oops</html>"),
        Reply(503, {"error": "loading"}),
        Reply(200, "not json"),
        Reply(200, {"choices": []}),
        Reply(200, {"choices": [{"message": {"content": "  "}}]}),
        Reply(200, {"choices": [{"message": {"content": None}}]}),
        Reply(200, [1]),
        Reply(200, {}, delay=60.0),  # longer than the timeout
    ],
    ids=lambda reply: f"{reply.status}-{str(reply.body)[:12]}-{reply.delay or ''}",
)
def test_passing_failures_are_tried_again(tmp_path, bad):
    with ChatServer(lambda number, body: bad if number in (1, 2, 5) else echo(number, body)) as server:
        texts, counts = asked(server, 6, tmp_path, timeout_s=3 if bad.delay else 60)
    assert texts == [f"answer to question {number}" for number in range(6)]
    assert counts["retries"] == 3 and counts["requests"] == len(server.bodies) == 9


def test_retry_after_is_obeyed_by_all(tmp_path):
    wait = Reply(429, "", headers={"retry-after": "0.6"})
    with ChatServer(lambda number, body: wait if number == 1 else echo(number, body)) as server:
        asked(server, 3, tmp_path, concurrency=1)
    assert server.times[1] - server.times[0] >= 0.6


def test_a_server_that_wants_no_rest_is_still_given_the_backoff(tmp_path):
    at_once = Reply(503, "", headers={"retry-after": "0"})
    with ChatServer(lambda number, body: at_once if number <= 2 else echo(number, body)) as server:
        asked(server, 1, tmp_path, backoff_s=0.2)
    first, second, third = server.times
    assert second - first >= 0.2 and third - second >= 0.4


def test_no_more_than_so_many_at_once_and_so_many_a_minute(tmp_path):
    three = threading.Barrier(3)  # no answer before so many have asked

    def slow(number, body):
        three.wait(60)
        return Reply(200, echo(number, body).body, delay=0.05)

    with ChatServer(slow) as server:
        asked(server, 12, tmp_path, concurrency=3)
    assert server.most_at_once == 3
    with ChatServer(echo) as server:
        began = time.monotonic()  # before the first may be sent: it may be long on its way
        asked(server, 6, tmp_path / "..", requests_per_minute=1200)
    assert server.times[-1] - began >= 5 * 0.05


def test_a_dead_endpoint_is_one_clear_error_and_what_was_answered_stays(shards, tmp_path):
    dies = lambda number, body: obliging(body) if number <= 10 else Reply(500, f"no\nmore {KEY}")  # noqa: E731
    with ChatServer(dies) as server, pytest.raises(ContextError) as failed:
        run(server, shards, tmp_path / "out", retries=2, concurrency=2)
    said = str(failed.value)
    assert "\n" not in said and f"{server.base_url}/chat/completions: no answer in 3 tries" in said
    assert "status 500" in said and "writer=templates" in said
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 10
    assert not list((tmp_path / "out").glob("*.rows.npy"))
    with ChatServer() as moved:  # another address, more at once: the same run goes on
        summary = run(moved, shards, tmp_path / "out", concurrency=4)
    assert len(moved.bodies) == summary.counts["prompt tokens"] / 50 - 10


def test_an_unreachable_endpoint_is_one_clear_error_after_bounded_tries(shards, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"  # taken, so that no other test can, and nobody listens
        cfg = ContextsConfig(
            writer="endpoint",
            endpoint=EndpointConfig(base_url=url, model="m", retries=3, backoff_s=0.01, concurrency=2),
        )
        with pytest.raises(ContextError, match=rf"{url}/chat/completions: no answer in 4 tries .*ConnectError"):
            contextualize(shards, tmp_path / "out", cfg, make_writer=lambda: EndpointWriter(cfg.endpoint))


@pytest.mark.parametrize(
    "status, said",
    [(401, "read from the environment variable"), (404, "endpoint.model"), (400, "answers nothing")],
)
def test_a_request_that_can_never_succeed_is_not_repeated(tmp_path, monkeypatch, status, said):
    monkeypatch.setenv("THE_KEY", KEY)
    with ChatServer(lambda number, body: Reply(status, f"bad key {KEY}")) as server:
        with pytest.raises(ContextError, match=said) as failed:
            asked(server, 30, tmp_path, concurrency=1, api_key_env="THE_KEY")
    assert len(server.bodies) <= 5 and KEY not in str(failed.value) and "***" in str(failed.value)


def test_a_page_that_is_no_endpoint_is_an_error_and_not_a_silent_return_to_templates(shards, tmp_path):
    with ChatServer(lambda number, body: Reply(200, "<html>welcome</html>")) as server:
        with pytest.raises(ContextError, match=r"answers nothing \(the last: an answer that is no chat completion\)"):
            run(server, shards, tmp_path / "out", retries=1)
    assert len(server.bodies) < 40


def test_a_request_that_is_refused_for_what_it_says_is_left_to_the_templates(tmp_path):
    with ChatServer(lambda number, body: Reply(400, "filtered") if number == 3 else echo(number, body)) as server:
        texts, counts = asked(server, 8, tmp_path, concurrency=1)
    assert texts.count(None) == 1 and counts["refused"] == 1 and len(server.bodies) == 8


@pytest.mark.parametrize("refusal", [Reply(422, "filtered"), Reply(200, {"choices": []})])
def test_a_refusal_is_not_paid_for_again(tmp_path, refusal):
    def reply(number, body):
        return refusal if body["messages"][1]["content"] == "question 3" else echo(number, body)

    with ChatServer(reply) as server:
        first, _ = asked(server, 6, tmp_path, concurrency=1, retries=1)
        paid = len(server.bodies)
        again, counts = asked(server, 6, tmp_path, concurrency=1, retries=1)
    assert again == first and first[3] is None and len(server.bodies) == paid
    assert counts["refused"] == 1 and counts["answers from the cache"] == 6


def test_refusals_before_any_answer_are_no_verdict(tmp_path):
    with ChatServer(lambda number, body: Reply(400, "no such parameter")) as server:
        asked(server, 2, tmp_path)
    with ChatServer(echo) as server:
        texts, _ = asked(server, 2, tmp_path)
    assert texts == ["answer to question 0", "answer to question 1"]


def test_an_answer_that_gives_the_transcript_away_is_asked_once_more_and_then_left_to_templates(shards, tmp_path):
    def parrot(number, body):
        wanted = json.loads(body["messages"][1]["content"].partition("\n")[2])
        return completion(wanted["transcript"] + " and " + ", ".join(wanted["names"]))

    with ChatServer(parrot) as server:
        cfg = config(server)
        cfg.shares = {"relevant": 1.0}
        summary = contextualize(shards, tmp_path / "out", cfg, make_writer=lambda: EndpointWriter(cfg.endpoint))
    leaked = summary.counts["relevant rejected: leak"]
    seeds = [body["seed"] for body in server.bodies]
    assert leaked > 40 and seeds.count(2) == leaked / 2 and len(seeds) == summary.counts["requests"]
    for entry, contexts in zip(ENTRIES, read_all(Contexts(tmp_path / "out"), shards).values()):
        assert not leaks(contexts[0].text, entry["text"], keywords=entry["keywords"]) and contexts[0].text


def test_the_key_is_sent_and_never_written(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("THE_KEY", KEY)
    with ChatServer() as server:
        run(server, shards, tmp_path / "out", api_key_env="THE_KEY")
    assert {headers["authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    written = files(tmp_path / "out")
    assert len(written) > 6 and not [name for name, content in written.items() if KEY.encode() in content]
    assert KEY not in "".join(capsys.readouterr())
    monkeypatch.delenv("THE_KEY")
    with ChatServer() as server, pytest.raises(ContextError, match="environment variable THE_KEY is not set"):
        run(server, shards, tmp_path / "other", api_key_env="THE_KEY")
    monkeypatch.setenv("THE_KEY", f"{KEY}\nX: y")
    with ChatServer() as server, pytest.raises(ContextError, match="THE_KEY holds characters") as failed:
        run(server, shards, tmp_path / "other", api_key_env="THE_KEY")
    assert KEY not in str(failed.value)
    with pytest.raises(ValueError, match=r"endpoint\.base_url must hold no user, password or query"):
        EndpointConfig(base_url=f"http://me:{KEY}@host/v1", model="m")


def contextualize_process(shards, out, server) -> subprocess.Popen:
    settings = ["writer=endpoint", f"endpoint.base_url={server.base_url}", "endpoint.model=m", "variants=2"]
    command = [sys.executable, "-m", "seedling.launch.cli", "contextualize", str(shards), "--out", str(out)]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *settings], env=environment, stderr=subprocess.PIPE, text=True)


def wait_until(condition, *, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_process_pays_for_nothing_twice(shards, tmp_path):
    """SIGKILL while all requests wait for a server that wants rest; answers are on disk as they come."""
    out, cache = tmp_path / "out", tmp_path / "out" / "answers.jsonl"
    pause = Reply(503, "", headers={"retry-after": "60"})
    with ChatServer(lambda number, body: obliging(body) if number <= 25 else pause) as server:
        process = contextualize_process(shards, out, server)
        wait_until(lambda: len(server.bodies) > 25 and cache.read_bytes().count(b"\n") == 25)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        cache.open("ab").write(b'{"key": "torn')
        server.replies = lambda number, body: obliging(body)
        again = contextualize_process(shards, out, server)
        assert again.wait() == 0, again.stderr.read()
    assert set(server.answered.values()) == {1}, "each distinct prompt was answered, and so paid for, once"
    counts = json.loads((out / "contexts.json").read_text())["counts"]
    assert counts["answers from the cache"] == 25 and counts["requests"] == len(server.answered) - 25
    assert counts["prompt tokens"] == 50 * len(server.answered)
    with ChatServer() as idle:
        contexts = Path(tmp_path / "untouched")
        assert contextualize_process(shards, contexts, idle).wait() == 0
        assert sum(idle.answered.values()) == sum(server.answered.values())
    assert read_all(Contexts(out), shards) == read_all(Contexts(contexts), shards)


def test_a_cache_that_is_none_and_one_in_use_are_named(tmp_path, shards):
    (tmp_path / "notes.txt").write_text("dear diary\n")
    with pytest.raises(ContextError, match=r"notes\.txt: byte 0 begins no answer"):
        AnswerCache(tmp_path / "notes.txt")
    with ChatServer() as server, open_cache(tmp_path / "shared.jsonl"):
        cfg = config(server)
        cfg.cache = str(tmp_path / "shared.jsonl")
        with pytest.raises(ContextError, match=r"shared\.jsonl: another run uses this cache"):
            contextualize(shards, tmp_path / "out", cfg, make_writer=lambda: EndpointWriter(cfg.endpoint))
