"""The split into training and held-out sequences: disjoint, complete, seeded, whole batches where there are enough."""

import pytest
import torch

from seedling.quant.held_out import split_sequences


def usable(*sizes: int, empty: tuple[tuple[int, int], ...] = ()) -> list[torch.Tensor]:
    made = [torch.ones(size, dtype=torch.bool) for size in sizes]
    for at, row in empty:
        made[at][row] = False
    return made


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("sizes", [(2,), (1, 1), (3, 2), (1,) * 10, (4,) * 33])
def test_every_usable_sequence_either_trains_or_is_held_out(sizes, fraction):
    given = usable(*sizes)
    given[0][0] = len(sizes) == 1 or sizes[0] == 1  # a sequence without valid positions where others are left
    split = split_sequences(given, fraction=fraction, seed=0, name="block")
    train, held_out = torch.cat(split.train), torch.cat(split.held_out)
    assert not (train & held_out).any() and torch.equal(train | held_out, torch.cat(given))
    assert train.any() and held_out.any()


def test_whole_batches_are_held_out_where_there_are_enough():
    split = split_sequences(usable(*[4] * 30), fraction=0.1, seed=0, name="block")
    assert sorted(int(held_B.sum()) for held_B in split.held_out) == [0] * 27 + [4] * 3


def test_few_batches_are_split_by_sequence():
    split = split_sequences(usable(8, 8, 4), fraction=0.1, seed=0, name="block")
    assert sum(int(held_B.sum()) for held_B in split.held_out) == 2


def test_the_split_hangs_on_the_seed_alone():
    def held_out(seed):
        torch.rand(3)
        return torch.cat(split_sequences(usable(*[2] * 40), fraction=0.1, seed=seed, name="block").held_out)

    assert torch.equal(held_out(1), held_out(1))
    assert len({tuple(held_out(seed).tolist()) for seed in range(10)}) > 5


def test_one_sequence_cannot_be_split():
    with pytest.raises(ValueError, match="layer 4: 1 calibration sequence"):
        split_sequences(usable(1, 2, empty=((1, 0), (1, 1))), fraction=0.1, seed=0, name="layer 4")
