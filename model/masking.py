"""Span masks for masked prediction, on the grid of the encoder's output.

BEST-RQ lets each 10 ms frame start a mask of S frames with probability p. Here a start falls on the first of the four
frames of a 40 ms label frame, with the probability that at least one of the four starts a mask: input and label frames
are then masked together, there is no label frame masked in part, and each one is masked with probability
1 - (1 - p)^S exactly. Starts are drawn for the S frames in front of an utterance too, or its beginning would be masked
less often. An utterance that no start hits gets one span at a random place, so that every micro-batch has something to
predict; this happens to 1 % of utterances of 4 s and to a quarter of those of 1 s.

Masks are drawn on the CPU as a function of (seed, lengths): the loader's workers draw them, and the number of masked
frames, the loss's normaliser, is known before the forward pass.
Shape letters: B utterances, T frames of 10 ms, F mel bins, L label frames of 40 ms, S label frames of a span.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .conformer import SUBSAMPLING, valid_frames


@dataclass
class MaskConfig:
    start_probability: float = 0.01  # that a 10 ms frame starts a span
    span_frames: int = 40  # of 10 ms: 400 ms; masks 33 % of the frames
    noise_std: float = 0.1  # of what stands in for masked frames; features have a standard deviation of 1

    def __post_init__(self):
        if not 0 <= self.start_probability <= 1:
            raise ValueError(f"mask.start_probability ({self.start_probability}) must lie within 0 and 1")
        if self.span_frames < SUBSAMPLING or self.span_frames % SUBSAMPLING:
            raise ValueError(
                f"mask.span_frames ({self.span_frames}) must be a multiple of {SUBSAMPLING}: spans cover whole frames "
                "of the encoder's output"
            )
        if self.noise_std < 0:
            raise ValueError(f"mask.noise_std ({self.noise_std}) must not be negative; 0 masks with zeros")

    @property
    def share(self) -> float:
        """The expected share of masked frames, apart from utterances too short for it."""
        return 1 - (1 - self.start_probability) ** self.span_frames


def draw_spans(lengths_B: Tensor, cfg: MaskConfig, *, seed: int) -> Tensor:
    """Return mask_BL, boolean, on the CPU, for lengths in label frames; at least one span in every utterance."""
    lengths_B = lengths_B.cpu()
    S, L = cfg.span_frames // SUBSAMPLING, int(lengths_B.max())
    generator = torch.Generator(device="cpu").manual_seed(seed)
    starts = torch.rand(len(lengths_B), S + L, generator=generator) < 1 - (1 - cfg.start_probability) ** SUBSAMPLING
    forced_B = (torch.rand(len(lengths_B), generator=generator) * lengths_B).long()
    # Label frame l is masked if a span starts within l - S + 1 .. l; column c of `starts` is label frame c - S.
    count = starts.long().cumsum(1)
    valid_BL = valid_frames(lengths_B, L)[..., 0]
    mask_BL = (count[:, S:] > count[:, :-S]) & valid_BL
    after_BL = torch.arange(L) - forced_B[:, None]
    return mask_BL | (~mask_BL.any(1, keepdim=True) & (after_BL >= 0) & (after_BL < S) & valid_BL)


def replace_by_noise(features_BTF: Tensor, mask_BL: Tensor, cfg: MaskConfig) -> Tensor:
    """Return the features with noise N(0, noise_std^2) in the frames of masked label frames."""
    mask_BT1 = mask_BL.repeat_interleave(SUBSAMPLING, dim=1)[:, : features_BTF.shape[1], None]
    return torch.where(mask_BT1, cfg.noise_std * torch.randn_like(features_BTF), features_BTF)
