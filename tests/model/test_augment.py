"""SpecAugment: what it masks, what it leaves alone, and that a seed decides."""

import pytest
import torch

from seedling.model.augment import SpecAugment, SpecAugmentConfig


def masked(cfg, frames, *, T=200, F=80, seed=0):
    """Return masked_BTF, true where ones became zero."""
    torch.manual_seed(seed)
    return SpecAugment(cfg)(torch.ones(len(frames), T, F), torch.tensor(frames)) == 0


def test_the_same_seed_gives_the_same_masks_and_another_seed_others():
    cfg, frames = SpecAugmentConfig(), [200, 120]
    assert torch.equal(masked(cfg, frames, seed=1), masked(cfg, frames, seed=1))
    assert not torch.equal(masked(cfg, frames, seed=1), masked(cfg, frames, seed=2))


def test_evaluation_leaves_features_alone():
    features_BTF = torch.randn(2, 50, 80)
    assert torch.equal(SpecAugment().eval()(features_BTF, torch.tensor([50, 30])), features_BTF)


def test_time_masks_lie_inside_the_valid_frames_and_within_both_limits():
    cfg = SpecAugmentConfig(num_time_masks=1, max_time_frames=30, max_time_fraction=0.1, num_freq_masks=0)
    widths = {200: set(), 500: set(), 9: set()}
    for seed in range(200):
        time_BT = masked(cfg, list(widths), T=500, F=2, seed=seed).all(-1)
        for frames, row_T in zip(widths, time_BT):
            assert not row_T[frames:].any()
            widths[frames].add(int(row_T.sum()))
    assert max(widths[200]) == 20  # the fraction
    assert max(widths[500]) == 30  # the frames
    assert widths[9] == {0}  # a tenth of 9 frames is none
    assert min(widths[200]) == 0


def test_every_valid_frame_and_bin_can_be_masked():
    cfg = SpecAugmentConfig(num_time_masks=1, num_freq_masks=0, max_time_fraction=0.5)
    hit_T = sum(masked(cfg, [10], T=12, F=1, seed=seed)[0, :, 0].int() for seed in range(60))
    assert (hit_T > 0).tolist() == [True] * 10 + [False] * 2
    cfg = SpecAugmentConfig(num_time_masks=0, num_freq_masks=1, max_freq_bins=3)
    hit_F = sum(masked(cfg, [1], T=1, F=8, seed=seed)[0, 0].int() for seed in range(60))
    assert (hit_F > 0).all()


def test_frequency_masks_cover_whole_bins_and_differ_between_utterances():
    masked_BTF = masked(SpecAugmentConfig(num_time_masks=0, num_freq_masks=2, max_freq_bins=20), [200] * 8)
    assert torch.equal(masked_BTF, masked_BTF[:, :1].expand_as(masked_BTF))
    assert 0 < masked_BTF[:, 0].sum(-1).max() <= 40
    assert len({tuple(row.tolist()) for row in masked_BTF[:, 0]}) > 1


def test_unmasked_cells_keep_their_values_and_gradients():
    features_BTF = torch.randn(2, 100, 80, requires_grad=True)
    out_BTF = SpecAugment()(features_BTF, torch.tensor([100, 60]))
    out_BTF.sum().backward()
    kept_BTF = out_BTF != 0
    assert torch.equal(out_BTF[kept_BTF], features_BTF[kept_BTF])
    assert torch.equal(features_BTF.grad, kept_BTF.float())
    assert 0.2 < kept_BTF.float().mean() < 1


@pytest.mark.parametrize("options", [{"num_time_masks": -1}, {"max_freq_bins": -1}, {"max_time_fraction": 1.5}])
def test_impossible_options_are_errors(options):
    with pytest.raises(ValueError, match=f"specaugment.{next(iter(options))}"):
        SpecAugmentConfig(**options)
