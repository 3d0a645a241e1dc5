"""Kept work: comes back as saved, whole or not at all, and only to whom began it."""

import pytest
import torch

from seedling.data import whole_file
from seedling.stages.runtime.kept_work import KeptWork
from seedling.stages.runtime.world import World

ALONE = World(0, 1, torch.device("cpu"))
BEGUN = {"encoder": "abc", "data": "def"}


def opened(folder, begun_with=BEGUN, *, anew=False) -> KeptWork:
    return KeptWork.open(folder / "checkpoints", begun_with=begun_with, anew=anew, world=ALONE)


def test_what_was_saved_last_comes_back_with_its_facts(tmp_path):
    assert opened(tmp_path).load("kmeans") is None
    for iteration in (1, 2):
        opened(tmp_path).save(
            "kmeans", {"x": torch.full((3,), iteration / 3).double()}, iteration=iteration, done=False
        )
    tensors, facts = opened(tmp_path).load("kmeans")
    assert torch.equal(tensors["x"], torch.full((3,), 2 / 3).double()) and facts == {"iteration": 2, "done": False}


def test_a_kill_while_saving_leaves_what_was_there(tmp_path, monkeypatch):
    kept = opened(tmp_path)
    kept.save("kmeans", {"x": torch.ones(2)}, iteration=1)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(whole_file.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        kept.save("kmeans", {"x": torch.zeros(2)}, iteration=2)
    assert kept.load("kmeans")[1] == {"iteration": 1}


def test_work_begun_with_something_else_is_refused_and_anew_deletes_it(tmp_path):
    opened(tmp_path).save("kmeans", {"x": torch.ones(2)})
    with pytest.raises(
        ValueError, match="begun with data def, which is now xyz; go on in another run_dir, or start anew"
    ):
        opened(tmp_path, BEGUN | {"data": "xyz"})
    assert opened(tmp_path).load("kmeans") is not None
    assert opened(tmp_path, BEGUN | {"data": "xyz"}, anew=True).load("kmeans") is None


def test_a_subfolder_is_made_once(tmp_path):
    kept = opened(tmp_path)
    (kept.subfolder("labels") / "a").touch()
    assert [file.name for file in opened(tmp_path).subfolder("labels").iterdir()] == ["a"]
