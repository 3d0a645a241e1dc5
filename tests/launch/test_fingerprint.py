"""What a pipeline's step reads from a server is part of its hash, as what it reads from a folder is."""

from pathlib import Path

import pytest

pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

from range_server import serving

from seedling.launch.fingerprint import fingerprint, paths_in


def test_a_corpus_on_a_server_is_its_list_of_shards(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shards.npy").write_bytes(b"one")
    with serving(tmp_path) as server:
        place = f"{server.url}/train"
        assert list(paths_in({"data": {"train": [place, "no/such/folder"]}})) == [place]
        before = fingerprint(place)
        assert before == fingerprint(place) != fingerprint(f"{server.url}/elsewhere") == "absent"
        (tmp_path / "train" / "shards.npy").write_bytes(b"two")
        assert fingerprint(place) != before
    assert fingerprint("http://127.0.0.1:9/train") == "absent", "as is an endpoint that does not run now"
    assert fingerprint(Path("train")) == "absent"
