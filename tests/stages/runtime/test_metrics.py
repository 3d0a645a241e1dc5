"""What adds up over steps and ranks: sums with counts, and histograms, of which numbers are made at the end."""

import pytest
import torch

from seedling.stages.runtime.meters import mean_metrics
from seedling.stages.runtime.metrics import Histogram, add_metrics
from seedling.stages.runtime.world import World


class TwoRanks(World):
    """Rank 0 of two, the other of which has `theirs` as well."""

    theirs = ({}, torch.zeros(0))

    def gather(self, value):
        return [value, self.theirs[0]]

    def sum_integers(self, values):
        return values + self.theirs[1]


def occupied(counts: torch.Tensor) -> dict[str, float]:
    return {"occupied": int((counts > 0).sum()), "largest": int(counts.max())}


def test_a_histogram_is_added_up_before_a_number_is_made_of_it():
    total = {}
    for counts in ([1, 0, 0, 2], [0, 0, 5, 2]):
        add_metrics(total, {"codes": Histogram(torch.tensor(counts), occupied), "acc": (1.0, 4)})
    alone = World(0, 1, torch.device("cpu"))
    assert mean_metrics(total, world=alone) == {"acc": 0.25, "largest": 5, "occupied": 3}


def test_ranks_are_added_up_too():
    world = TwoRanks(0, 2, torch.device("cpu"))
    world.__dict__["theirs"] = ({"acc": (5.0, 4), "theirs_only": (2.0, 2)}, torch.tensor([0, 9, 0]))
    sums = {"codes": Histogram(torch.tensor([1, 1, 0]), occupied), "acc": (1.0, 2)}
    assert mean_metrics(sums, world=world) == {"acc": 1.0, "largest": 10, "occupied": 2, "theirs_only": 1.0}


def test_what_is_added_is_left_as_it_was_and_carries_no_gradient():
    loss, counts = torch.ones((), requires_grad=True), torch.tensor([1, 2])
    total = {}
    for _ in range(3):
        add_metrics(total, {"loss": (loss * 2, torch.tensor(1)), "codes": Histogram(counts, occupied)})
    assert not total["loss"][0].requires_grad and [int(part) for part in total["loss"]] == [6, 3]
    assert total["codes"].counts.tolist() == [3, 6] and counts.tolist() == [1, 2]


def test_one_name_cannot_be_both():
    total = {"codes": (1.0, 1)}
    with pytest.raises(AssertionError, match="codes"):
        add_metrics(total, {"codes": Histogram(torch.tensor([1]), occupied)})
