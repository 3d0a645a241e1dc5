"""Span masks: how much they cover, that they stay inside, and that a seed and the lengths are all they depend on."""

import pytest
import torch

from seedling.model.masking import MaskConfig, draw_spans, replace_by_noise


def spans(row_L: torch.Tensor) -> list[int]:
    """Lengths of the runs of True."""
    text = "".join("x" if value else " " for value in row_L.tolist())
    return [len(run) for run in text.split()]


@pytest.mark.parametrize(("p", "S"), [(0.01, 40), (0.02, 20), (0.065, 4), (0.005, 80)])
def test_the_masked_share_is_that_of_the_formula_at_every_place(p, S):
    cfg = MaskConfig(start_probability=p, span_frames=S)
    mask_BL = draw_spans(torch.full((4000,), 250), cfg, seed=1)
    expected = 1 - (1 - p) ** S
    assert cfg.share == pytest.approx(expected)
    assert mask_BL.float().mean().item() == pytest.approx(expected, abs=0.01)
    # The first and the last frames no less than the others: 4000 draws have a deviation of 0.8 points.
    for part in (mask_BL[:, :5], mask_BL[:, -5:]):
        assert part.float().mean().item() == pytest.approx(expected, abs=0.025)


def test_spans_have_their_length_unless_they_meet_or_an_end_cuts_them():
    mask_BL = draw_spans(torch.full((500,), 200), MaskConfig(start_probability=0.001), seed=2)
    runs = [n for row_L in mask_BL for n in spans(row_L[1:-1])]
    whole = [n for row_L in mask_BL if not (row_L[0] or row_L[-1]) for n in spans(row_L)]
    assert min(whole) >= 10 and runs.count(10) > 0.5 * len(runs)


def test_no_utterance_is_without_a_mask_and_no_mask_is_outside():
    lengths_B = torch.tensor([1, 2, 3, 9, 10, 11, 40, 150] * 50)
    mask_BL = draw_spans(lengths_B, MaskConfig(start_probability=0.0), seed=3)
    inside_BL = torch.arange(150) < lengths_B[:, None]
    assert mask_BL.any(1).all() and not (mask_BL & ~inside_BL).any()
    assert all(len(spans(row_L)) == 1 for row_L in mask_BL)
    assert not torch.equal(mask_BL[7], mask_BL[15])  # not always the same place


def test_masks_are_a_function_of_seed_and_lengths_and_leave_the_global_random_numbers_alone():
    lengths_B, cfg = torch.tensor([30, 77, 150]), MaskConfig()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first_BL = draw_spans(lengths_B, cfg, seed=11)
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(8)
    assert torch.equal(draw_spans(lengths_B, cfg, seed=11), first_BL)
    assert not torch.equal(draw_spans(lengths_B, cfg, seed=12), first_BL)


def test_masked_frames_become_noise_and_the_others_stay_as_they_are():
    torch.manual_seed(0)
    features_BTF = 5 + torch.randn(2, 203, 80)
    mask_BL = draw_spans(torch.tensor([51, 40]), MaskConfig(start_probability=0.03), seed=4)
    noisy_BTF = replace_by_noise(features_BTF, mask_BL, MaskConfig())
    mask_BT = mask_BL.repeat_interleave(4, dim=1)[:, :203]
    assert torch.equal(noisy_BTF[~mask_BT], features_BTF[~mask_BT])
    noise = noisy_BTF[mask_BT]
    assert noise.mean().abs() < 0.005 and noise.std().item() == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"span_frames": 10}, "multiple of 4"),
        ({"span_frames": 0}, "multiple of 4"),
        ({"start_probability": 1.5}, "within 0 and 1"),
        ({"noise_std": -1.0}, "must not be negative"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        MaskConfig(**settings)
