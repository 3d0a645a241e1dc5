"""A cache in the system's temporary folder is this user's alone, or none at all."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from seedling.data.range_cache import RangeCache
from seedling.data.remote import RemoteConfig, RemoteStore


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Where the default cache will be, below a temporary folder of the test's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"seedling-{os.getuid()}"


def cache() -> RangeCache:
    return RemoteStore(RemoteConfig()).cache


def somebody_elses(folder: Path, monkeypatch) -> None:
    """Make `folder` as it is where another user was first: this process has another number."""
    folder.mkdir(exist_ok=True)
    monkeypatch.setattr(os, "getuid", lambda owner=os.getuid(): owner + 1)


@pytest.mark.parametrize("there_before", [False, True])
def test_nobody_else_can_look_into_it(place, there_before):
    before = os.umask(0)
    try:
        if there_before:
            place.mkdir(mode=0o777)
        cache().put("a", b"content")
    finally:
        os.umask(before)
    assert place.stat().st_mode & 0o777 == 0o700
    assert cache().get("a") == b"content"


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    somebody_elses(tmp_path / f"seedling-{os.getuid() + 1}", monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=r"and not to you.*Set remote\.cache_dir"):
        cache()
    RemoteStore(RemoteConfig(cache_dir=str(tmp_path / "named"))).cache.put("a", b"content")


@pytest.mark.parametrize("elsewhere", ["there", "missing"])
def test_a_link_is_refused(place, tmp_path, elsewhere):
    (tmp_path / "there").mkdir()
    place.symlink_to(tmp_path / elsewhere)
    with pytest.raises(ValueError, match="is a link"):
        cache()
    assert not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize(
    "use", [lambda cache: cache.get("a"), lambda cache: cache.file("a"), lambda cache: cache.put("b", b"")]
)
def test_one_that_takes_its_place_later_is_refused_too(place, monkeypatch, use):
    mine = cache()
    mine.put("a", b"content")
    planted = place.with_name("planted")
    shutil.copytree(place, planted)
    shutil.rmtree(place)
    assert mine.get("a") is None  # a cleaner of temporary files was there
    planted.rename(place)
    somebody_elses(place, monkeypatch)
    with pytest.raises(ValueError, match="and not to you"):
        use(mine)
