"""Shards on a server: the same batches as from a folder, fetched by range, ahead of need, and kept within bounds."""

import builtins
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("aiohttp", reason="the extra `remote` is not installed")

from range_server import serving

from seedling.data import host
from seedling.data.audio_clips import AudioClips
from seedling.data.audio_sets import AudioDataConfig
from seedling.data.augment import AugmentConfig
from seedling.data.batches import make_loader
from seedling.data.check import check_data
from seedling.data.contexts.config import ContextsConfig
from seedling.data.contexts.contextualize import contextualize
from seedling.data.contexts.draw import ContextConfig, DrawnContexts
from seedling.data.host import HostError
from seedling.data.index import Corpus, index_folder, index_path, read_index
from seedling.data.payload import PayloadReader
from seedling.data.remote import NEIGHBOURS, Range, RemoteConfig, RemotePath, RemoteStore, located, together
from seedling.data.shards import open_shard, shard_path
from seedling.stages.runtime.rendezvous import free_port

RATE = 16000
SHARDS, UTTERANCES = 3, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of noise, with their list."""
    folder, random = tmp_path_factory.mktemp("served") / "train", np.random.default_rng(0)
    folder.mkdir()
    for shard in range(SHARDS):
        with open_shard(shard_path(folder, shard), sample_rate=RATE) as writer:
            for number in range(UTTERANCES):
                waveform = random.uniform(-0.5, 0.5, int(RATE * random.uniform(0.5, 3.0))).astype(np.float32)
                writer.add(f"{shard}-{number}", waveform, {"text": f"text {number}", "lang": "en"})
    index_folder(folder)
    return folder


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(host, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(host, "LONGEST_PAUSE_S", 0.02)
    with serving(folder.parent) as running:
        yield running


def data_config(place, cache: Path, **remote) -> AudioDataConfig:
    settings = {"cache_dir": str(cache), "tries": 3, "timeout_seconds": 60.0}
    return AudioDataConfig(train=[str(place)], remote=RemoteConfig(**(settings | remote)))


def planned(cfg: AudioDataConfig):
    return cfg.training(micro_batch_seconds=8.0, micro_batches=2, seed=1, sample_rate=RATE, require_text=True)


def an_epoch(batches, *, num_workers: int = 0):
    shares = (micro_batch for step in batches.plan.steps(epochs=1) for micro_batch in step.micro_batches)
    return list(make_loader(batches, shares, num_workers=num_workers))


def assert_same_batches(found, expected):
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for one, other in zip(found, expected):
        assert torch.equal(one.waveforms_BN, other.waveforms_BN)
        assert (one.texts, one.meta, one.bad) == (other.texts, other.meta, other.bad)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_on_a_server_gives_the_batches_of_the_folder(server, folder, tmp_path, num_workers):
    local, remote = planned(data_config(folder, tmp_path)), planned(data_config(f"{server.url}/train", tmp_path))
    assert remote.fingerprint == local.fingerprint, "a run may go on when its shards move to a server"
    expected = an_epoch(local)
    assert sum(map(len, expected)) == SHARDS * UTTERANCES and not any(batch.bad for batch in expected)
    assert_same_batches(an_epoch(remote, num_workers=num_workers), expected)
    # The second epoch, and a second run, find everything in the cache.
    server.requests.clear()
    assert_same_batches(an_epoch(planned(data_config(f"{server.url}/train", tmp_path)), num_workers=2), expected)
    assert {request.path for request in server.requests} == {"/train/shards.npy"}


def test_batches_are_the_same_whatever_fails_on_the_way(server, folder, tmp_path):
    expected = an_epoch(planned(data_config(folder, tmp_path)))
    server.faults.extend([503, None, "cut", "short", None, "reset", 429, None, "cut", 500] * 3)
    # Ranges are fetched at once, and one of them may meet all of the faults.
    remote = planned(data_config(f"{server.url}/train", tmp_path / "cache", tries=len(server.faults) + 1))
    assert_same_batches(an_epoch(remote), expected)
    assert not server.faults, "not all of the faults were met"


def test_one_utterance_is_read_without_its_shard(server, folder, tmp_path):
    corpus = Corpus.open(f"{server.url}/train", remote=RemoteConfig(cache_dir=str(tmp_path)))
    at = corpus.index(1)[5]
    server.requests.clear()
    audio = PayloadReader().read(corpus.shards[1], offset=int(at["audio_offset"]), size=int(at["audio_size"]))
    lies_at = int(at["audio_offset"])
    assert audio == (folder / "shard-000001.tar").read_bytes()[lies_at : lies_at + int(at["audio_size"])]
    assert server.requests == [("/train/shard-000001.tar", lies_at, lies_at + int(at["audio_size"]))]


def test_neighbours_are_fetched_at_once_and_distant_ranges_apart(server, tmp_path):
    path = located(f"{server.url}/train/shard-000000.tar", RemoteConfig(cache_dir=str(tmp_path)))
    near = [Range(path, 1000 * i, 500) for i in range(4)]
    far = Range(path, 4000 + NEIGHBOURS, 100)
    other = Range(path.parent / "shard-000001.tar", 0, 100)
    assert [len(group) for group in together(sorted([other, far, *near]))] == [4, 1, 1]
    path.store.start([*near, far, other])
    for each in [*near, far, other]:
        content = path.store.read(each.path, offset=each.offset + 10, size=each.size - 20)
        assert content == PayloadReader().read(each.path, offset=each.offset + 10, size=each.size - 20)
    path.store.drop([*near, far, other])
    assert len(server.requests) == 3


def test_ranges_that_were_dropped_take_no_memory(server, tmp_path):
    cfg = RemoteConfig(cache_dir=str(tmp_path))
    store, path = RemoteStore(cfg), RemotePath(f"{server.url}/train/shard-000000.tar", astuple(cfg))
    for _ in range(3):
        ranges = [Range(path, offset, 100) for offset in (0, 200, 9000)]
        store.start(ranges)
        store.start(ranges)  # started already
        store.drop(ranges)
    assert not store._started


def test_the_loader_reads_ahead_by_the_plan(server, tmp_path):
    remote = planned(data_config(f"{server.url}/train", tmp_path, read_ahead=2))
    shares = [micro_batch for step in remote.plan.steps(epochs=1) for micro_batch in step.micro_batches]
    ranges = [remote.dataset._ranges(share) for share in shares]
    wanted = [{(f"/train/{r.path.name}", r.offset) for r in each} for each in ranges]
    needed = [{(f"/train/{near[0].path.name}", near[0].offset) for near in together(sorted(each))} for each in ranges]

    def asked() -> set:
        return {(request.path, request.start) for request in server.requests}

    loader = iter(make_loader(remote, shares))
    for number in range(3):
        next(loader)
        deadline = time.monotonic() + 600
        # What is two places later comes by itself, while this one is trained on, and has come before the next.
        while not needed[number + 2] <= asked() or server.under_way:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not (wanted[number + 3] - set.union(*wanted[: number + 3])) & asked(), "more than was asked for"
    server.requests.clear()
    server.always = 503  # nothing more is needed for what was fetched ahead
    assert next(loader).keys


def test_the_indexes_of_a_window_are_fetched_at_once(server, tmp_path):
    remote = planned(data_config(f"{server.url}/train", tmp_path, timeout_seconds=120.0))
    server.most_under_way, server.meeting = 0, threading.Barrier(SHARDS)
    next(remote.plan.steps())
    assert {request.path for request in server.requests if "index" in request.path} == {
        f"/train/shard-{number:06d}.index.npy" for number in range(SHARDS)
    }
    assert server.most_under_way == SHARDS


def test_work_on_whole_shards_is_refused_on_a_server():
    for work in (index_folder, check_data):
        with pytest.raises(ValueError, match="s3://bucket/train: index and check-data read whole shards, in a folder"):
            work("s3://bucket/train")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_host_that_goes_away_ends_the_run_and_says_so(server, tmp_path, num_workers):
    remote = planned(data_config(f"{server.url}/train", tmp_path, tries=2))
    shares = [micro_batch for step in remote.plan.steps(epochs=1) for micro_batch in step.micro_batches]
    server.always = 503
    with pytest.raises(HostError, match=rf"{server.url}/train/shard-.*no good answer in 2 tries.*503"):
        list(make_loader(remote, shares, num_workers=num_workers))


def test_a_shard_that_is_gone_is_counted_by_utterance_as_on_a_disk(server, folder, tmp_path):
    for place in ("local", "served"):
        shutil.copytree(folder, tmp_path / place)
    (tmp_path / "served" / "shard-000001.tar").unlink()
    with serving(tmp_path) as half:
        remote = planned(data_config(f"{half.url}/served", tmp_path / "cache"))
        found = an_epoch(remote)
    bad = [bad for batch in found for bad in batch.bad]
    assert len(bad) == UTTERANCES and {Path(each.shard).name for each in bad} == {"shard-000001.tar"}
    assert all("no such file" in each.reason for each in bad)


def test_a_place_without_a_list_says_what_writes_one(server, tmp_path):
    with pytest.raises(ValueError, match=r"/elsewhere: its server has no shards.npy.*seedling index FOLDER"):
        Corpus.open(f"{server.url}/elsewhere", remote=RemoteConfig(cache_dir=str(tmp_path)))
    with pytest.raises(ValueError, match="gs://bucket/train: shards are read from folders, http"):
        Corpus.open("gs://bucket/train")


def test_an_index_that_is_not_the_listed_one_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "train")
    index = index_path(tmp_path / "train" / "shard-000002.tar")
    rows = np.load(index)
    rows["samples"][0] += 1
    np.save(index, rows)
    with serving(tmp_path) as changed:
        corpus = Corpus.open(f"{changed.url}/train", remote=RemoteConfig(cache_dir=str(tmp_path / "cache"), tries=2))
        corpus.index(1)
        for read in (corpus.index, lambda shard: read_index(corpus.shards[shard])):
            with pytest.raises(HostError, match=r"shard-000002.index.npy: .*not the file which shards.npy lists"):
                read(2)


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("aiohttp", "s3fs"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for url in ("http://127.0.0.1:9/train", "s3://bucket/train"):
        with pytest.raises(HostError, match=r"pip install 'seedling\[remote\]'"):
            Corpus.open(url, remote=RemoteConfig(cache_dir=str(tmp_path)))


def test_a_remote_path_names_its_parts_like_a_path():
    path = located("https://host.org:80/data/train/shard-000001.tar")
    assert (path.name, path.stem, str(path.parent)) == (
        "shard-000001.tar",
        "shard-000001",
        "https://host.org:80/data/train",
    )
    assert str(index_path(path)) == "https://host.org:80/data/train/shard-000001.index.npy"
    assert path == located(str(path)) and len({path, located(str(path))}) == 1
    assert pickle.loads(pickle.dumps(path)) == path
    assert located("/data/train") == Path("/data/train")


def test_names_with_signs_of_a_url_are_found_on_a_server(server, folder, tmp_path):
    odd = folder.parent / "odd"
    odd.mkdir()
    for part in (folder / "shard-000000.tar", index_path(folder / "shard-000000.tar")):
        shutil.copy(part, odd / part.name.replace("shard-000000", "50%20 #1? ä"))
    index_folder(odd)
    here, there = (
        Corpus.open(place, remote=RemoteConfig(cache_dir=str(tmp_path))) for place in (odd, f"{server.url}/odd")
    )
    (local,), (remote,) = here.shards, there.shards
    assert (remote.name, remote.stem) == (local.name, local.stem)
    assert np.array_equal(there.index(0), here.index(0))
    assert PayloadReader().read(remote, offset=0, size=100) == PayloadReader().read(local, offset=0, size=100)
    assert str(located("s3://bucket/train") / "a #1.tar") == "s3://bucket/train/a #1.tar"
    with pytest.raises(
        ValueError, match=r"names of shards would come behind \?token=1; serve the folder at a plain URL"
    ):
        located(f"{server.url}/train?token=1")


def test_a_tar_of_a_server_is_read_anew_where_it_has_changed(folder, tmp_path):
    served, remote = tmp_path / "served", RemoteConfig(cache_dir=str(tmp_path / "cache"))
    served.mkdir()

    def first_bytes():
        corpus = Corpus.open(f"{running.url}/a.tar", remote=remote)
        assert corpus.num_utterances == UTTERANCES
        return corpus.fingerprint, PayloadReader().read(corpus.shards[0], offset=0, size=100)

    with serving(served) as running:
        found = []
        for shard in ("shard-000000", "shard-000001"):
            shutil.copy(folder / f"{shard}.tar", served / "a.tar")
            shutil.copy(folder / f"{shard}.index.npy", served / "a.index.npy")
            found.append(first_bytes())
            assert found[-1][1] == (folder / f"{shard}.tar").read_bytes()[:100]
    assert found[0] != found[1]


def bad_in(place, cache: Path) -> set[str]:
    return {bad.key for batch in an_epoch(planned(data_config(place, cache))) for bad in batch.bad}


def cut_short(tar: Path) -> None:
    at = Corpus.open(tar).index(0)[5]
    with open(tar, "r+b") as file:
        file.truncate(int(at["audio_offset"]) + int(at["audio_size"]) // 2)


def test_a_shard_that_was_cut_short_costs_the_utterances_that_it_lacks(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "train")
    tar = tmp_path / "train" / "shard-000001.tar"
    cut_short(tar)
    with serving(tmp_path) as cut:
        found = bad_in(f"{cut.url}/train/{tar.name}", tmp_path / "cache")
    assert found == bad_in(tar, tmp_path / "none")
    assert {f"1-{number}" for number in range(6, UTTERANCES)} <= found and "1-0" not in found


def test_a_shard_that_is_not_as_long_as_its_list_says_costs_all_that_is_in_it(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "train")
    cut_short(tmp_path / "train" / "shard-000001.tar")
    with serving(tmp_path) as cut:
        assert bad_in(f"{cut.url}/train", tmp_path / "cache") == {f"1-{number}" for number in range(UTTERANCES)}


def other_version(folder: Path, there: Path, *, name: str) -> None:
    """A folder whose shard `name` holds other audio, of the same size if it can be, under the same keys."""
    shutil.copytree(folder, there)
    with open_shard(there / name, sample_rate=RATE) as writer:
        for number in range(UTTERANCES):
            writer.add(f"1-{number}", np.zeros(RATE, np.float32), {"text": f"other text {number}", "lang": "en"})
    index_folder(there)


@pytest.mark.parametrize("same_size", [False, True])
def test_bytes_of_an_old_shard_do_not_stay_when_the_new_list_came_first(folder, tmp_path, same_size):
    """An upload may put the list and the indexes before the shard: what is read in between is not what they say."""
    served, name = tmp_path / "served" / "train", "shard-000001.tar"
    other_version(folder, served, name=name)
    new = (served / name).read_bytes()
    old = (folder / name).read_bytes()
    (served / name).write_bytes(old[: len(new)].ljust(len(new), b"\0") if same_size else old)
    with serving(tmp_path / "served") as running:
        place = f"{running.url}/train"
        assert {key.partition("-")[0] for key in bad_in(place, tmp_path / "cache")} == {"1"}
        (served / name).write_bytes(new)
        assert_same_batches(
            an_epoch(planned(data_config(place, tmp_path / "cache"))), an_epoch(planned(data_config(served, tmp_path)))
        )


@pytest.mark.parametrize("versions", [True, False])
def test_the_list_of_shards_is_fetched_once_for_all_of_a_node(server, folder, tmp_path, versions):
    server.versions = versions
    place = f"{server.url}/train"
    config = [str(tmp_path / "cache"), place]
    code = (
        "import sys; from seedling.data.index import Corpus; from seedling.data.remote import RemoteConfig;"
        "rows = Corpus.open(sys.argv[2], remote=RemoteConfig(cache_dir=sys.argv[1])).shards.folders[0].rows;"
        "print(type(rows).__name__, len(rows))"
    )
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, *config], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    said = {rank.communicate(timeout=600)[0].strip() for rank in ranks}
    fetched = sum(request.stop - request.start > 1 for request in server.requests)
    # A server that does not say which version a file is of leaves each rank with a copy of its own.
    assert (said, fetched) == ({f"memmap {SHARDS}"}, 1) if versions else ({f"ndarray {SHARDS}"}, 3)


def test_a_list_that_was_replaced_is_fetched_again(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "train")
    remote = RemoteConfig(cache_dir=str(tmp_path / "cache"))
    with serving(tmp_path) as running:
        before = Corpus.open(f"{running.url}/train", remote=remote)
        (tmp_path / "train" / "shard-000002.tar").unlink()
        index_folder(tmp_path / "train", list_only=True)
        after = Corpus.open(f"{running.url}/train", remote=remote)
    assert (len(before.shards), len(after.shards)) == (SHARDS, SHARDS - 1)
    assert after.fingerprint == Corpus.open(tmp_path / "train").fingerprint != before.fingerprint


def test_contexts_of_a_corpus_on_a_server_are_opened_by_the_settings_of_the_data(server, tmp_path):
    remote = RemoteConfig(cache_dir=str(tmp_path))
    opened = DrawnContexts.open([""], corpora=[f"{server.url}/train"], cfg=ContextConfig(), remote=remote)
    assert [shard.config for shard in opened.sidecars] == [remote] * SHARDS


def test_contexts_of_a_corpus_on_a_server_are_those_of_the_folder(server, folder, tmp_path):
    (tmp_path / "names").write_text("".join(f"Name{chr(97 + i)}{chr(97 + j)}\n" for i in range(9) for j in range(9)))
    settings = {"distractors": str(tmp_path / "names"), "shares": {"irrelevant": 1.0}, "jobs": 1}
    remote = ContextsConfig(**settings, remote=RemoteConfig(cache_dir=str(tmp_path / "cache")))
    found = contextualize(f"{server.url}/train", tmp_path / "there", remote)
    local = contextualize(folder, tmp_path / "here", ContextsConfig(**settings))
    assert found == local and found.contexts == SHARDS * UTTERANCES
    for written in (tmp_path / "here").glob("[!.]*"):
        assert (tmp_path / "there" / written.name).read_bytes() == written.read_bytes()
    assert (tmp_path / "cache" / "total").exists()


def test_players_of_a_report_read_by_the_settings_that_they_are_given(server, folder, tmp_path):
    clips = AudioClips(f"{server.url}/train", remote=RemoteConfig(cache_dir=str(tmp_path / "cache")))
    assert clips("1-3") == AudioClips(str(folder))("1-3")
    assert (tmp_path / "cache" / "total").exists()


def test_noise_on_a_server_is_read_by_the_settings_of_the_data(server, folder, tmp_path):
    cfg = data_config(folder, tmp_path / "cache")
    cfg.augment = AugmentConfig(noise_probability=1.0, noise_data=[f"{server.url}/train"])
    noise = planned(cfg).dataset.augment.noise.corpus
    assert noise.shards[0].config == cfg.remote


@pytest.mark.parametrize(
    ("setting", "value"), [("tries", 0), ("connections", 0), ("cache_gigabytes", 0), ("timeout_seconds", -1.0)]
)
def test_settings_of_a_server_that_cannot_work_are_named(setting, value):
    with pytest.raises(ValueError, match=rf"remote.{setting} is {value}; it must be"):
        RemoteConfig(**{setting: value})


# --- real servers


def wait_for(port: int, process: subprocess.Popen) -> None:
    for _ in range(6000):
        assert process.poll() is None, f"the server ended with {process.returncode}"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port} after ten minutes")


@pytest.fixture
def nginx(folder, tmp_path):
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")
    port, config = free_port(), tmp_path / "nginx.conf"
    config.write_text(
        f"""
        daemon off; master_process off; pid {tmp_path}/pid; error_log {tmp_path}/errors;
        events {{}}
        http {{
            access_log {tmp_path}/requests;
            client_body_temp_path {tmp_path}/1; proxy_temp_path {tmp_path}/2; fastcgi_temp_path {tmp_path}/3;
            uwsgi_temp_path {tmp_path}/4; scgi_temp_path {tmp_path}/5;
            server {{ listen 127.0.0.1:{port}; root {folder.parent}; }}
        }}
        """
    )
    with subprocess.Popen([program, "-c", str(config), "-e", str(tmp_path / "errors")]) as process:
        wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
        process.terminate()


def test_nginx_serves_training(nginx, folder, tmp_path):
    expected = an_epoch(planned(data_config(folder, tmp_path)))
    assert_same_batches(an_epoch(planned(data_config(f"{nginx}/train", tmp_path / "c")), num_workers=2), expected)
    answers = [line.split('"')[2].split()[0] for line in (tmp_path / "requests").read_text().splitlines()]
    assert answers.count("206") >= SHARDS, "no ranges were asked for"


@pytest.fixture
def s3(folder, tmp_path, monkeypatch):
    pytest.importorskip("s3fs", reason="the extra `remote` is not installed")
    pytest.importorskip("moto", reason="moto, an S3 server for tests, is not installed")
    pytest.importorskip("flask", reason="moto's server needs flask")
    port = free_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    program = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ) as process:
        wait_for(port, process)
        import s3fs

        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("corpus")
        bucket.put(str(folder), "corpus/train", recursive=True)
        yield bucket
        process.kill()


def test_s3_serves_training(s3, folder, tmp_path):
    expected = an_epoch(planned(data_config(folder, tmp_path)))
    remote = planned(data_config("s3://corpus/train", tmp_path / "cache"))
    assert_same_batches(an_epoch(remote, num_workers=2), expected)
    index = Corpus.open("s3://corpus/train", remote=RemoteConfig(cache_dir=str(tmp_path / "other")))
    missing = index.shards[0].parent / "shard-000009.tar"
    with pytest.raises(FileNotFoundError, match=r"s3://corpus/train/shard-000009.tar: the server has no such file"):
        PayloadReader().read(missing, offset=0, size=10)
    with pytest.raises(ValueError, match=r"shard-000000.tar: ends before a byte"):
        PayloadReader().read(index.shards[0], offset=10**9, size=10)
