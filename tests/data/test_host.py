"""Reading from a server: every fault that may pass is survived, every other is said at once, by URL and reason."""

import multiprocessing
import time

import pytest

pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

from range_server import serving

from seedling.data import host
from seedling.data.host import PIECE, Host, HostError, OtherFile, Patience, pause_before

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(host, "LONGEST_PAUSE_S", 0.02)
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with serving(tmp_path) as running:
        yield running


def reader(tries: int = 4, timeout_s: float = 60.0) -> Host:
    return Host("http", Patience(tries, timeout_s))


def test_any_range_is_read_as_it_lies_there(server):
    read = reader().read
    for offset, size in ((0, 1), (5, 1000), (len(CONTENT) - 7, 7), (0, len(CONTENT))):
        assert read(f"{server.url}/a.tar", offset=offset, size=size) == CONTENT[offset : offset + size]
    assert reader().read_file(f"{server.url}/a.tar").content == CONTENT


def test_a_long_range_comes_in_pieces_and_a_torn_one_costs_one_piece(server, monkeypatch):
    monkeypatch.setattr(host, "PIECE", 100_000)
    server.faults.extend([None, None, "cut"])
    assert reader().read(f"{server.url}/a.tar", offset=50, size=350_000) == CONTENT[50:350_050]
    asked = [(request.start, request.stop) for request in server.requests]
    assert asked == [(50, 100_050), (100_050, 200_050), (200_050, 300_050), (200_050, 300_050), (300_050, 350_050)]
    assert PIECE <= 16 << 20, "a piece must come through a slow line within the deadline of a try"


def test_a_whole_file_comes_in_pieces_and_a_torn_one_costs_one_piece(server, monkeypatch):
    monkeypatch.setattr(host, "PIECE", 300_000)
    server.faults.extend([None, None, "cut", 503])
    found = reader().read_file(f"{server.url}/a.tar")
    assert (found.content, found.size) == (CONTENT, len(CONTENT)) and found.version
    assert [request.start for request in server.requests] == [0, 300_000, 600_000, 600_000, 600_000, 900_000]


def test_pieces_of_two_versions_never_make_a_file(server, tmp_path, monkeypatch):
    monkeypatch.setattr(host, "PIECE", 600_000)
    get, newer = host._get_http, bytes(reversed(CONTENT))

    async def changing(filesystem, url, start, stop):
        answer = await get(filesystem, url, start, stop)
        (tmp_path / "a.tar").write_bytes(newer)  # after the first piece
        return answer

    monkeypatch.setattr(host, "_get_http", changing)
    assert reader().read_file(f"{server.url}/a.tar").content == newer


def test_a_file_that_is_not_as_long_as_it_should_be_is_refused_before_its_bytes_are_used(server):
    read, url = reader().read, f"{server.url}/a.tar"
    assert read(url, offset=7, size=100, file_size=len(CONTENT)) == CONTENT[7:107]
    with pytest.raises(OtherFile, match=rf"{url}: has {len(CONTENT)} bytes, shards.npy lists it with 12"):
        read(url, offset=7, size=100, file_size=12)
    assert len(server.requests) == 2, "another try would find the same file"


@pytest.mark.parametrize("fault", [500, 502, 503, 429, 408, "cut", "short", "reset"])
def test_what_may_pass_is_tried_again(server, fault):
    server.faults.extend([fault, fault])
    assert reader().read(f"{server.url}/a.tar", offset=10, size=5000) == CONTENT[10:5010]
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", ["silent", "trickle"])
def test_a_slow_answer_ends_at_its_deadline_and_is_tried_again(server, fault):
    server.faults.append(fault)
    started = time.monotonic()
    assert reader(timeout_s=2.0).read(f"{server.url}/a.tar", offset=0, size=100) == CONTENT[:100]
    assert 2.0 <= time.monotonic() - started < 20  # as long as the slow answer


@pytest.mark.parametrize("fault", [503, "cut", "short", "silent"])
def test_a_server_that_does_not_recover_ends_with_its_url_the_tries_and_the_last_error(server, fault):
    server.always = fault
    with pytest.raises(
        HostError, match=rf"{server.url}/a.tar: no good answer in 3 tries.*the last one: .+; see whether"
    ):
        reader(tries=3, timeout_s=2.0 if fault == "silent" else 60.0).read(f"{server.url}/a.tar", offset=0, size=1000)
    assert len(server.requests) == 3


def test_a_port_where_nobody_listens_is_tried_and_named():
    with pytest.raises(HostError, match=r"http://127.0.0.1:9/a.tar: no good answer in 2 tries"):
        Host("http", Patience(2, 5.0)).read("http://127.0.0.1:9/a.tar", offset=0, size=10)


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        (404, FileNotFoundError, "no such file"),
        (401, HostError, "does not let this job read it .*credentials"),
        (403, HostError, "does not let this job read it .*credentials"),
        (416, ValueError, "ends before a byte that its index names"),
        (400, HostError, "refuses the request"),
        ("whole", HostError, "ignores ranges"),
    ],
)
def test_what_another_try_cannot_change_is_said_after_one(server, fault, kind, message):
    server.always = fault
    with pytest.raises(kind, match=rf"{server.url}/a.tar: .*{message}"):
        reader().read(f"{server.url}/a.tar", offset=0, size=1000)
    assert len(server.requests) == 1


def test_a_missing_file_is_one_bad_file_and_a_forbidden_server_is_the_end():
    # The loader counts OSError and ValueError against an utterance; a HostError it passes on.
    assert not issubclass(FileNotFoundError, HostError)
    assert issubclass(HostError, ValueError), "the command line shows those as one line"


def test_a_shard_that_ends_early_is_named(server):
    with pytest.raises(ValueError, match="ends before a byte"):
        reader().read(f"{server.url}/a.tar", offset=len(CONTENT) + 5, size=10)
    with pytest.raises(ValueError, match="ends before a byte") as caught:
        reader().read(f"{server.url}/a.tar", offset=len(CONTENT) - 10, size=20)
    assert not isinstance(caught.value, HostError), "it is one bad utterance, not the end of the run"


def _read_in_child(read, url, queue):
    queue.put(read(url, offset=0, size=100))


def test_a_reader_works_on_in_a_forked_process(server):
    """DataLoader workers are forked from a process that has read indexes: connections and threads stay behind."""
    mine = reader()
    assert mine.read(f"{server.url}/a.tar", offset=0, size=100) == CONTENT[:100]
    fork = multiprocessing.get_context("fork")
    queue = fork.Queue()
    children = [
        fork.Process(target=_read_in_child, args=(mine.read, f"{server.url}/a.tar", queue), daemon=True)
        for _ in range(3)
    ]
    for child in children:
        child.start()
    assert [queue.get(timeout=600) for _ in children] == [CONTENT[:100]] * 3
    assert mine.read(f"{server.url}/a.tar", offset=100, size=100) == CONTENT[100:200]


def test_pauses_grow_to_a_bound_and_are_never_the_same_for_all():
    pauses = {attempt: [pause_before(attempt) for _ in range(50)] for attempt in (2, 3, 6, 20)}
    for attempt, around in ((2, 0.5), (3, 1.0), (6, 8.0), (20, 30.0)):
        assert all(0.5 * around <= pause <= 1.5 * around for pause in pauses[attempt])
        assert len(set(pauses[attempt])) > 40
