"""Converter: encoder frames to LLM embeddings.

Normalises each frame, stacks `stride` of them and projects once, so 25 Hz frames become 6.25 Hz at stride 4.
Shape letters: B utterances, T encoder frames, D encoder width, S = ceil(T / stride) LLM positions, L LLM width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class ConverterConfig:
    stride: int = 4  # encoder frames per LLM position: 4 x 40 ms = 160 ms

    def __post_init__(self):
        if self.stride < 1:
            raise ValueError(f"converter.stride ({self.stride}) must be at least 1")


class Converter(nn.Module):
    def __init__(self, cfg: ConverterConfig | None = None, *, encoder_dim: int, llm_dim: int):
        super().__init__()
        self.stride = (cfg or ConverterConfig()).stride
        self.norm = nn.LayerNorm(encoder_dim)
        self.proj = nn.Linear(encoder_dim * self.stride, llm_dim)

    @torch.no_grad()
    def match_scale(self, embeddings_VL: Tensor) -> None:
        """Make a fresh projection's output as large as the LLM's token embeddings.

        torch's default would start speech 20 times as large as the tokens of a typical LLM, whose first layers then see
        little else in the residual stream.
        """
        token_rms = embeddings_VL.float().square().mean().sqrt()
        # The norm hands on values of variance 1, so outputs vary as the root of a row's sum of squares.
        own_rms = self.proj.weight.float().square().sum(1).mean().sqrt()
        self.proj.weight.mul_(token_rms / own_rms)
        self.proj.bias.zero_()

    def output_lengths(self, lengths_B: Tensor) -> Tensor:
        """Return ceil(lengths / stride)."""
        return -(-lengths_B // self.stride)

    def forward(self, h_BTD: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return speech_BSL and its lengths. Frames past an utterance's end count as zeros, whatever they hold."""
        B, T, D = h_BTD.shape
        valid_BT1 = (torch.arange(T, device=h_BTD.device) < lengths_B[:, None])[..., None]
        # Masked twice: before the norm, because the gradient of a norm of NaN is NaN even under a zero; after it,
        # because the norm of zeros is its bias.
        h_BTD = self.norm(torch.where(valid_BT1, h_BTD, 0.0)) * valid_BT1
        h_BTD = nn.functional.pad(h_BTD, (0, 0, 0, -T % self.stride))
        return self.proj(h_BTD.reshape(B, -1, D * self.stride)), self.output_lengths(lengths_B)
