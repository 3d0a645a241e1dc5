"""Facts of this process."""

import shutil
from types import SimpleNamespace

import torch

from seedling.launch.rank_facts import gather_facts, installed, read_first
from seedling.stages.runtime.world import World


def test_a_rank_tells_of_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    asked = []

    def disk_usage(place):  # the disk's own would change from one look to the next: it is not ours alone
        asked.append(place)
        return SimpleNamespace(free=41)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    (facts,) = gather_facts(World(0, 1, torch.device("cpu")), run_dir=str(tmp_path / "not" / "yet"))
    assert facts.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert facts.environment["NCCL_DEBUG"] == "INFO"
    assert facts.disk_free == 41 and asked[-1] == tmp_path  # the folder in which the run's will be made
    assert facts.open_files > 0 and facts.bandwidth == 0 and facts.data_error == ""


def test_versions_are_those_that_ranks_must_agree_on():
    assert {"seedling", "python", "torch", "deepspeed"} <= set(installed())


def test_data_that_cannot_be_read_is_an_error_of_the_rank_not_of_the_command():
    class Unmounted:
        def __getitem__(self, micro_batch):
            raise FileNotFoundError(2, "No such file or directory", "a.tar")

    step = SimpleNamespace(micro_batches=[0, 1])
    planned = SimpleNamespace(plan=SimpleNamespace(steps=lambda epochs: iter([step])), dataset=Unmounted())
    error, _ = read_first(planned, rank=3)
    assert "a.tar" in error
    planned.dataset = {1: SimpleNamespace(bad=["s.tar: k: broken", "another"])}
    assert read_first(planned, rank=3)[0] == "s.tar: k: broken, and 1 more"
