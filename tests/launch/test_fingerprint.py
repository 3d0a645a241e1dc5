"""What a pipeline's step reads from a server is part of its hash, as what it reads from a folder is."""

from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

from range_server import serving

from seedling.data.host import HostError
from seedling.launch.fingerprint import corpora_on_servers, fingerprint, paths_in


def stage(*places: str, **remote) -> dict:
    settings = {"tries": 2, "timeout_seconds": 5.0, **remote}
    return {"stage": "sft", "config": {"data": {"train": [*places, "no/such/folder"], "remote": settings}}}


def test_a_corpus_on_a_server_is_its_list_of_shards(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shards.npy").write_bytes(b"one")
    (tmp_path / "a.index.npy").write_bytes(b"index")
    cache = str(tmp_path / "cache")
    with serving(tmp_path) as server:
        place, tar, nowhere = f"{server.url}/train", f"{server.url}/a.tar", f"{server.url}/elsewhere"
        assert [*paths_in(stage(place))] == [place]
        before = corpora_on_servers(stage(place, tar, nowhere, cache_dir=cache))
        assert before == corpora_on_servers(stage(place, tar, nowhere, cache_dir=cache))
        assert before[nowhere] == "absent" and len({*before.values()}) == 3
        decoding = {"stage": "evaluate", "config": {"data": place, "remote": {"cache_dir": cache}}}
        contextualize = {"command": "contextualize", "arguments": [place], "options": {"variants": 2}}
        for reads in (decoding, contextualize):
            assert corpora_on_servers(reads) == {place: before[place]}
        (tmp_path / "train" / "shards.npy").write_bytes(b"two")
        assert corpora_on_servers(stage(place, cache_dir=cache))[place] != before[place]
    assert fingerprint(Path("train")) == "absent"


@pytest.mark.parametrize("fault", [503, 403, "silent"])
def test_a_server_that_does_not_answer_is_an_error_and_not_an_absent_corpus(tmp_path, fault):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shards.npy").write_bytes(b"one")
    with serving(tmp_path) as server:
        server.always = fault
        with pytest.raises(HostError, match=rf"{server.url}/train/shards.npy: "):
            corpora_on_servers(stage(f"{server.url}/train", timeout_seconds=0.5, cache_dir=str(tmp_path / "cache")))


def test_an_address_that_is_no_corpus_is_not_asked_for(tmp_path):
    with serving(tmp_path) as server:
        endpoint = f"{server.url}/v1?token=1#a"
        config = {"endpoint": {"base_url": endpoint}, "data": {"train": []}, "home": f"{server.url}/home"}
        assert corpora_on_servers({"stage": "sft", "config": config}) == {}
        asking = {"command": "contextualize", "arguments": ["shards"], "options": {"endpoint.base_url": endpoint}}
        assert corpora_on_servers(asking) == {}
        assert corpora_on_servers({"command": "prepare", "arguments": [endpoint], "options": {}}) == {}
        assert not server.requests


def test_a_cache_is_nothing_that_a_step_reads(tmp_path):
    """It changes whenever the step runs: by its files the step would be another one at each start."""
    (tmp_path / "words.txt").touch()
    here, words = str(tmp_path), str(tmp_path / "words.txt")
    caches = {"cache": here, "remote.cache_dir": here, "data": {"remote": {"cache_dir": here}}}
    assert [*paths_in({**caches, "words": words})] == [words]
