"""Conformer encoder: log-mel features at 100 Hz to frames of 40 ms.

Gulati et al. 2020 (https://arxiv.org/abs/2005.08100): half a feed-forward layer, attention, convolution, the other
half. Five choices differ from the paper:
- One norm at the end of the encoder instead of one after every layer: an unbroken residual path seemed to let CTC
  leave its blank-only plateau sooner (docs/log.md says how far that was tested).
- Rotary positions (https://arxiv.org/abs/2104.09864) instead of relative-position scores: attention stays one call to
  scaled_dot_product_attention (flash kernels, memory linear in T), and there is neither a parameter nor a table that
  ends at some length.
- LayerNorm instead of BatchNorm after the depthwise convolution: a frame's output then depends on its own utterance
  only, not on the batch or the padding in it, and is the same in training and inference and on any number of ranks.
- Attention can be kept within chunks (model/chunked_attention.py), for long audio; the parameters are the same.
- Padding is cut off in front of whatever mixes frames (two subsampling convolutions, attention, depthwise convolution),
  so NaN in the padding changes neither outputs nor gradients.

Layout is [B, T, D] throughout, with D contiguous: the convolutions see it as channels-last, so nothing is transposed.
Shape letters: B utterances, T frames, F mel bins, D width, H heads, K head width, C subsampling channels.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from .chunked_attention import chunked_attention

ROTARY_BASE = 10000.0
SUBSAMPLING = 4  # frames of 10 ms in a frame of the output


@dataclass
class ConformerConfig:
    num_mel_bins: int = 80
    dim: int = 512
    num_layers: int = 12
    num_heads: int = 8
    ff_mult: int = 4
    conv_kernel: int = 15  # frames of 40 ms; odd
    subsampling_channels: int = 128
    dropout: float = 0.1
    activation_checkpointing: bool = False  # recompute each layer in the backward pass: memory of one layer, +1/3 time
    # Frames of 40 ms that see each other, 200 for 8 s, and how many chunks before their own they see; 0: everything.
    # None: chunks as the encoder has that is gone on from, and none where there is no such encoder.
    attention_chunk: int | None = None
    attention_left_chunks: int = 0
    train_attention_chunks: list[int] = field(default_factory=list)  # each micro-batch of training draws one; 0: all

    @property
    def varies_in_training(self) -> bool:
        """Whether chance decides what training hears: dropout, or the size of its attention chunks."""
        return bool(self.dropout or self.train_attention_chunks)

    def __post_init__(self):
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"encoder.dim ({self.dim}) must be divisible by 2 x encoder.num_heads ({self.num_heads}): rotary "
                "positions turn pairs of a head's values"
            )
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"encoder.conv_kernel ({self.conv_kernel}) must be odd, to be centred on its frame")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"encoder.dropout ({self.dropout}) must lie within 0 and 1")
        for name in ("attention_chunk", "attention_left_chunks"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"encoder.{name} ({getattr(self, name)}) must not be negative; 0 switches it off")
        if any(chunk < 0 for chunk in self.train_attention_chunks):
            raise ValueError(
                f"encoder.train_attention_chunks ({list(self.train_attention_chunks)}) must not be negative; 0 stands "
                "for all frames"
            )
        if self.attention_left_chunks and not (self.attention_chunk or any(self.train_attention_chunks)):
            raise ValueError(
                f"encoder.attention_left_chunks is {self.attention_left_chunks} and there are no chunks; set "
                "encoder.attention_chunk=200 (8 s) or leave it out"
            )


# Shapes of Seed-ASR's scaling study; width, heads and kernel of the two USM sizes (0.6B, 2B) are USM's. In the demo, on
# a CPU, dropout's random numbers would be 15 % of a step.
PRESETS: dict[str, ConformerConfig] = {
    "demo": ConformerConfig(
        dim=160, num_layers=4, num_heads=4, ff_mult=2, conv_kernel=15, subsampling_channels=16, dropout=0.0
    ),
    "75M": ConformerConfig(dim=512, num_layers=12, num_heads=8),
    "0.2B": ConformerConfig(dim=640, num_layers=24, num_heads=8),
    "0.6B": ConformerConfig(dim=1024, num_layers=24, num_heads=8, conv_kernel=5, subsampling_channels=256),
    "2B": ConformerConfig(dim=1536, num_layers=32, num_heads=16, conv_kernel=5, subsampling_channels=512),
    "5B": ConformerConfig(dim=2304, num_layers=40, num_heads=18, conv_kernel=5, subsampling_channels=512),
}


def valid_frames(lengths_B: Tensor, T: int) -> Tensor:
    """Return valid_BT1, boolean: True inside each utterance."""
    return (torch.arange(T, device=lengths_B.device) < lengths_B[:, None])[..., None]


def halved(lengths_B: Tensor) -> Tensor:
    """Return ceil(lengths / 2), the frames that a convolution of kernel 3, stride 2, padding 1 makes."""
    return (lengths_B + 1) // 2


class NarrowLinear(nn.Linear):
    """A linear layer for few inputs and very many rows: the same parameters, another order in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        # With the weight transposed its gradient is nine rows of 32, and takes a ninth of the time of 32 rows of
        # nine, as Linear has it, which fill no vector register: 4 % of a step of the demo's encoder.
        y_NC = torch.addmm(self.bias, x.flatten(0, -2), self.weight.t().contiguous())
        return y_NC.view(*x.shape[:-1], -1)


class Subsampling(nn.Module):
    """Two 3 x 3 convolutions of stride 2 over (time, frequency), then one linear layer per frame."""

    def __init__(self, cfg: ConformerConfig):
        super().__init__()
        channels = cfg.subsampling_channels
        self.conv1 = NarrowLinear(9, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.proj = nn.Linear(channels * -(-cfg.num_mel_bins // 4), cfg.dim)

    def forward(self, features_BTF: Tensor, frames_B: Tensor) -> Tensor:
        """Return h_BTD, T over 4 rounded up; frames past an utterance's end are finite but not zero."""
        features_BTF = torch.where(valid_frames(frames_B, features_BTF.shape[1]), features_BTF, 0.0)
        # The first convolution is patches times a matrix: over one input channel, conv2d's weight gradient alone takes
        # 56 ms a minute of audio on one core (32 channels); this takes 14 ms in all.
        padded_BTF = nn.functional.pad(features_BTF.to(self.conv2.weight.dtype), (1, 1, 1, 1))  # proj may be packed
        patches_BTF9 = padded_BTF.unfold(1, 3, 2).unfold(2, 3, 2).flatten(-2)
        x_BTFC = nn.functional.relu(self.conv1(patches_BTF9))
        x_BTFC = x_BTFC * valid_frames(halved(frames_B), x_BTFC.shape[1])[..., None].to(x_BTFC.dtype)
        # Seen as [B, C, T, F] this is channels-last: 32 ms forward and backward, and 87 ms were it contiguous.
        x_BCTF = nn.functional.relu(self.conv2(x_BTFC.permute(0, 3, 1, 2)))
        return self.proj(x_BCTF.permute(0, 2, 3, 1).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self, cfg: ConformerConfig):
        super().__init__(
            nn.LayerNorm(cfg.dim),
            nn.Linear(cfg.dim, cfg.ff_mult * cfg.dim),
            nn.SiLU(),
            nn.Linear(cfg.ff_mult * cfg.dim, cfg.dim),
            nn.Dropout(cfg.dropout),
        )


def rotary_angles(T: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin, [T, 1, K / 2] in float32: bf16 could not tell positions above 256 apart."""
    rate = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(T, device=device, dtype=torch.float32)[:, None, None] * rate
    return angle.cos(), angle.sin()


def rotate(x_BTHK: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the pair (x_i, x_{i + K/2}) of frame t by t * rate_i."""
    cos, sin = rotary
    a, b = x_BTHK.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).type_as(x_BTHK)


class Span(NamedTuple):
    """What a frame sees in one pass: its chunk of so many frames, and chunks before it. A chunk of 0 is everything."""

    chunk: int
    left: int


class Attention(nn.Module):
    def __init__(self, cfg: ConformerConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.norm = nn.LayerNorm(cfg.dim)
        self.qkv = nn.Linear(cfg.dim, 3 * cfg.dim)
        self.out = nn.Linear(cfg.dim, cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x_BTD: Tensor, valid_BT1: Tensor, rotary: tuple[Tensor, Tensor], span: Span) -> Tensor:
        q_BTHK, k_BTHK, v_BTHK = self.qkv(self.norm(x_BTD)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q_BTHK, k_BTHK = rotate(q_BTHK, rotary), rotate(k_BTHK, rotary)
        if 0 < span.chunk < x_BTD.shape[1]:
            context_BTHK = chunked_attention(
                q_BTHK, k_BTHK, v_BTHK, valid_BT1[..., 0], chunk=span.chunk, left=span.left
            )
            return self.dropout(self.out(context_BTHK.flatten(2)))
        mask_B11T = valid_BT1[:, None, None, :, 0]
        context_BHTK = scaled_dot_product_attention(
            q_BTHK.transpose(1, 2), k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2), attn_mask=mask_B11T
        )
        return self.dropout(self.out(context_BHTK.transpose(1, 2).flatten(2)))


class DepthwiseConv(nn.Module):
    """One filter per channel over time, zero-padded to keep the length."""

    def __init__(self, dim: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(dim, 1, 1, kernel) / math.sqrt(kernel))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_BTD: Tensor) -> Tensor:
        # As a 1 x kernel conv2d over channels-last images, [B, T, D] needs no copy. One core, fp32, 24 x 125 x 144,
        # kernel 15, forward / with backward: this 0.7 / 9.5 ms; conv1d 16 / 21 ms; a sum of shifted products
        # 2.2 / 17 ms; unfold and einsum 19 / 75 ms. In bf16 on the CPU this takes 85 / 270 ms: hence float32 there.
        dtype = torch.float32 if x_BTD.device.type == "cpu" else x_BTD.dtype
        with torch.autocast(x_BTD.device.type, enabled=False):
            y_BD1T = nn.functional.conv2d(
                x_BTD.to(dtype).transpose(1, 2).unsqueeze(2),
                self.weight.to(dtype),
                self.bias.to(dtype),
                padding=(0, self.weight.shape[-1] // 2),
                groups=self.weight.shape[0],
            )
        return y_BD1T.squeeze(2).transpose(1, 2).to(x_BTD.dtype)


class Convolution(nn.Module):
    def __init__(self, cfg: ConformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.dim)
        self.expand = nn.Linear(cfg.dim, 2 * cfg.dim)
        self.depthwise = DepthwiseConv(cfg.dim, cfg.conv_kernel)
        self.depthwise_norm = nn.LayerNorm(cfg.dim)
        self.out = nn.Linear(cfg.dim, cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x_BTD: Tensor, valid_BT1: Tensor) -> Tensor:
        x_BTD = nn.functional.glu(self.expand(self.norm(x_BTD)))
        x_BTD = x_BTD * valid_BT1.to(x_BTD.dtype)
        x_BTD = nn.functional.silu(self.depthwise_norm(self.depthwise(x_BTD)))
        return self.dropout(self.out(x_BTD))


class ConformerLayer(nn.Module):
    def __init__(self, cfg: ConformerConfig):
        super().__init__()
        self.ff1 = FeedForward(cfg)
        self.attention = Attention(cfg)
        self.convolution = Convolution(cfg)
        self.ff2 = FeedForward(cfg)

    def forward(self, x_BTD: Tensor, valid_BT1: Tensor, rotary: tuple[Tensor, Tensor], span: Span) -> Tensor:
        x_BTD = torch.add(x_BTD, self.ff1(x_BTD), alpha=0.5)
        x_BTD = x_BTD + self.attention(x_BTD, valid_BT1, rotary, span)
        x_BTD = x_BTD + self.convolution(x_BTD, valid_BT1)
        return torch.add(x_BTD, self.ff2(x_BTD), alpha=0.5)


class ConformerEncoder(nn.Module):
    def __init__(self, cfg: ConformerConfig):
        super().__init__()
        self.cfg = cfg
        self.subsampling = Subsampling(cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        # Torch's own initialisation: its small branches start to learn sooner. CTC on spoken digits, nats a label over
        # steps 1-20, 21-40, 41-60: 3.5, 2.7, 2.7; with Xavier's three times larger variance 6.2, 5.7, 3.3.
        self.layers = nn.ModuleList(ConformerLayer(cfg) for _ in range(cfg.num_layers))
        self.norm = nn.LayerNorm(cfg.dim)

    @staticmethod
    def output_lengths(frames_B: Tensor) -> Tensor:
        """Return the 40 ms frames made of frames_B frames of 10 ms: ceil(frames / 4)."""
        return halved(halved(frames_B))

    def forward(
        self, features_BTF: Tensor, frames_B: Tensor, *, return_layers: bool = False
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, list[Tensor]]:
        """Return h_BTD and lengths_B at 40 ms, zero past each utterance's end.

        `return_layers` adds the list of every layer's output, in order, normalised and masked alike; its last entry is
        h_BTD.
        """
        x_BTD = self.dropout(self.subsampling(features_BTF, frames_B))
        lengths_B = self.output_lengths(frames_B)
        valid_BT1 = valid_frames(lengths_B, x_BTD.shape[1])
        rotary = rotary_angles(x_BTD.shape[1], self.cfg.dim // self.cfg.num_heads, x_BTD.device)
        span = self._span()
        recompute = self.cfg.activation_checkpointing and self.training and torch.is_grad_enabled()
        layers: list[Tensor] = []
        for layer in self.layers:
            if recompute:
                x_BTD = checkpoint(layer, x_BTD, valid_BT1, rotary, span, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, valid_BT1, rotary, span)
            if return_layers:
                layers.append(self.norm(x_BTD) * valid_BT1.to(x_BTD.dtype))
        h_BTD = layers[-1] if return_layers else self.norm(x_BTD) * valid_BT1.to(x_BTD.dtype)
        return (h_BTD, lengths_B, layers) if return_layers else (h_BTD, lengths_B)

    def _span(self) -> Span:
        """What frames see in this pass. The draw is the CPU generator's, which is seeded by the micro-batch."""
        choices, chunk = self.cfg.train_attention_chunks, self.cfg.attention_chunk or 0
        if self.training and choices:
            chunk = choices[int(torch.randint(len(choices), (), device="cpu"))]
        return Span(chunk, self.cfg.attention_left_chunks)
