"""SpecAugment (Park et al. 2019, https://arxiv.org/abs/1904.08779): masks over time and frequency, in training only.

Masked cells become zero, which is each mel bin's mean after CMVN. Masks cover valid frames only: padding is zero
already, and a mask drawn over the padded length would be spent on it. The draws come from the CPU's generator, so a
seed gives the same masks on every device; three uniform numbers a mask make the copy negligible.

Shape letters: B utterances, T frames, F mel bins, M masks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class SpecAugmentConfig:
    num_time_masks: int = 2
    max_time_frames: int = 40  # longest time mask, in frames of 10 ms
    max_time_fraction: float = 0.2  # ... and as a share of the utterance, so that a short one is not wiped out
    num_freq_masks: int = 2
    max_freq_bins: int = 27  # widest frequency mask, in mel bins

    @property
    def masks(self) -> bool:
        """Whether anything is masked in training."""
        return bool(self.num_time_masks or self.num_freq_masks)

    def __post_init__(self):
        for name in ("num_time_masks", "max_time_frames", "num_freq_masks", "max_freq_bins"):
            if getattr(self, name) < 0:
                raise ValueError(f"specaugment.{name} ({getattr(self, name)}) must not be negative; 0 switches it off")
        if not 0 <= self.max_time_fraction <= 1:
            raise ValueError(f"specaugment.max_time_fraction ({self.max_time_fraction}) must lie within 0 and 1")


class SpecAugment(nn.Module):
    def __init__(self, cfg: SpecAugmentConfig | None = None):
        super().__init__()
        self.cfg = cfg or SpecAugmentConfig()

    def forward(self, features_BTF: Tensor, frames_B: Tensor) -> Tensor:
        """Return features_BTF with masked cells set to zero; unchanged in eval mode."""
        cfg = self.cfg
        if not (self.training and cfg.masks):
            return features_BTF
        T, F = features_BTF.shape[1:]
        widest_B = (frames_B * cfg.max_time_fraction).clamp(max=cfg.max_time_frames)
        time_BT = draw_masks(widest_B, frames_B, size=T, count=cfg.num_time_masks)
        bins_B = torch.full_like(frames_B, F)
        freq_BF = draw_masks(bins_B.clamp(max=cfg.max_freq_bins), bins_B, size=F, count=cfg.num_freq_masks)
        return features_BTF.masked_fill(time_BT[:, :, None] | freq_BF[:, None, :], 0.0)


def draw_masks(widest_B: Tensor, extent_B: Tensor, *, size: int, count: int) -> Tensor:
    """Return a boolean [B, size]: the union of `count` masks, each of a width uniform in 0..widest inside 0..extent."""
    draws = torch.rand(2, len(extent_B), count, device="cpu").to(extent_B.device)
    width_BM = (draws[0] * (widest_B.floor()[:, None] + 1)).floor()
    start_BM = (draws[1] * (extent_B[:, None] - width_BM + 1)).floor()
    position = torch.arange(size, device=extent_B.device)
    inside_BMS = (position >= start_BM[..., None]) & (position < (start_BM + width_BM)[..., None])
    return inside_BMS.any(1)
