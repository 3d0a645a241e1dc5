"""The cache of ranges: what is put in comes out or nothing does; no number of processes or kills breaks its bound."""

import fcntl
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest

from seedling.data.range_cache import RangeCache


def payload(number: int, size: int = 1000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def test_a_payload_comes_back_to_any_reader_of_the_folder(tmp_path):
    RangeCache(tmp_path, limit=10**6).put("a", b"content")
    again = RangeCache(tmp_path, limit=10**6)
    assert again.get("a") == b"content"
    assert again.get("b") is None
    assert again.file("a").read_bytes().startswith(b"content") and again.file("b") is None
    again.put("empty", b"")
    assert again.get("empty") == b""


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    cache = RangeCache(tmp_path, limit=10_500)
    for number in range(10):
        cache.put(str(number), payload(number))
        time.sleep(0.02)  # two ticks of the kernel's clock, by which files are dated
    assert cache.get("0") == payload(0)  # used again: it stays
    cache.put("more", payload(99))
    kept = [number for number in range(10) if cache.get(str(number)) is not None]
    assert 0 in kept and 1 not in kept and 9 in kept
    assert cache.get("more") == payload(99)


def test_a_payload_larger_than_the_cache_is_not_kept_and_removes_nothing(tmp_path):
    cache = RangeCache(tmp_path, limit=5000)
    cache.put("small", payload(0))
    cache.put("large", payload(1, 6000))
    assert cache.get("large") is None and cache.get("small") == payload(0)


def test_a_damaged_file_is_a_miss_and_is_replaced(tmp_path):
    cache = RangeCache(tmp_path, limit=10**6)
    cache.put("a", payload(0))
    for damage in (b"", payload(0), b"\0" * 1004):
        cache.file("a").write_bytes(damage)
        assert cache.get("a") is None
        cache.put("a", payload(0))
        cache.file("a").write_bytes(damage)
        assert cache.file("a") is None
        cache.put("a", payload(0))
        assert cache.get("a") == payload(0)


def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path, monkeypatch, caplog):
    cache = RangeCache(tmp_path, limit=10**6)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    cache.put("a", payload(0))
    cache.put("b", payload(1))
    assert cache.get("a") is None
    assert caplog.text.count("No space left on device") == 1, "said once, not for every range"
    assert cache.bytes_used() == 0


@pytest.mark.parametrize("removed", ["folders", "total", "everything"])
def test_what_a_cleaner_of_temporary_files_removes_is_made_again(tmp_path, caplog, removed):
    folder = tmp_path / "cache"
    cache = RangeCache(folder, limit=10**6)
    cache.put("a", payload(0))
    gone = {"folders": [cache.file("a").parent], "total": [folder / "total"], "everything": [folder]}[removed]
    for each in gone:
        shutil.rmtree(each) if each.is_dir() else each.unlink()
    for key in ("a", "b"):
        cache.put(key, payload(1))
        cache.drop("never there")
        with cache.alone():
            assert cache.get(key) == payload(0 if (key, removed) == ("a", "total") else 1)
    assert not caplog.text


def _part(folder, size: int):
    folder.mkdir(exist_ok=True)
    part = folder / f"x.writer.{size}.part"
    part.touch()
    return part


def test_a_part_that_is_being_written_elsewhere_stays_and_one_that_was_left_goes(tmp_path):
    """Of another pod nothing is known but its lock: its processes have numbers of their own."""
    cache = RangeCache(tmp_path, limit=10_000)
    written, left = _part(tmp_path / "00", 3000), _part(tmp_path / "01", 3000)
    with open(written, "r+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with cache._total() as total:
            total.value = cache.bytes_used()
        for number in range(20):
            cache.put(str(number), payload(number))
        assert written.exists() and not left.exists()
        assert 3000 < cache.bytes_used() <= 10_000
    for number in range(20, 40):
        cache.put(str(number), payload(number))
    assert not written.exists(), "its writer is no more"


def test_nothing_is_kept_beyond_the_limit_where_parts_of_others_take_it_all(tmp_path):
    cache = RangeCache(tmp_path, limit=10_000)
    with open(_part(tmp_path / "00", 9_500), "r+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with cache._total() as total:
            total.value = cache.bytes_used()
        cache.put("a", payload(0))
        assert cache.get("a") is None and cache.bytes_used() == 9_500
    cache.put("a", payload(0))
    assert cache.get("a") == payload(0)


def test_a_payload_that_was_dropped_is_gone_and_its_room_free(tmp_path):
    cache = RangeCache(tmp_path, limit=10**6)
    cache.put("a", payload(0))
    cache.drop("a")
    assert cache.get("a") is None and cache.file("a") is None
    with cache._total() as total:
        assert total.value == 0


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"remote.cache_dir: .*file.* cannot be written"):
        RangeCache(tmp_path / "file" / "cache", limit=10)


def _fill(folder, seed, limit, rounds):
    cache, random = RangeCache(folder, limit=limit), np.random.default_rng(seed)
    for _ in range(rounds):
        number = int(random.integers(0, 400))
        size = 200 + 17 * number
        found = cache.get(str(number))
        assert found in (None, payload(number, size)), "another payload under this key, or a part of it"
        if found is None:
            cache.put(str(number), payload(number, size))


def test_processes_that_write_and_are_killed_at_any_time_keep_the_bound(tmp_path):
    limit, largest, random = 200_000, 200 + 17 * 400, np.random.default_rng(0)
    spawn = multiprocessing.get_context("fork")
    workers, most = [], 0
    for seed in range(12):
        workers.append(spawn.Process(target=_fill, args=(tmp_path, seed, limit, 10**9), daemon=True))
        workers[-1].start()
        if len(workers) < 4:
            continue
        until = time.monotonic() + 0.15 + 0.1 * random.random()
        while time.monotonic() < until:
            most = max(most, RangeCache(tmp_path, limit=limit).bytes_used())
        killed = workers.pop(0)
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
    for worker in workers:
        assert worker.is_alive(), "a worker found a wrong payload"
        worker.kill()
        worker.join()
    assert 0.5 * limit < most <= limit + 4 * largest
    # Who comes next finds what they left usable, and parts of the dead do not take room for ever.
    _fill(tmp_path, 99, limit, 300)
    cache = RangeCache(tmp_path, limit=limit)
    with cache._total() as total:
        total.value = cache._make_room(limit // 2)
    assert not list(tmp_path.rglob("*.part"))
    assert cache.bytes_used() == total.value <= limit // 2
