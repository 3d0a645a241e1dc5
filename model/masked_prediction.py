"""Masked prediction: an encoder that hears noise in place of some frames tells which codes those frames have.

Codes come from the clean features of all frames, or from whoever passes `labels_BLN`; heads, loss and codes are
computed at masked label frames alone. The heads are thrown away after training: what stays is the encoder with its
features.

Shape letters: B utterances, N codebooks (samples in `waveforms_BN`), V codes each, T frames of 10 ms, F mel bins, L
label frames of 40 ms, D encoder width, M masked label frames of the batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .conformer import ConformerEncoder
from .features import Fbank
from .masking import MaskConfig, replace_by_noise
from .random_quantizer import RandomProjectionQuantizer, stacked
from .speech_encoder import SpeechEncoder


class MaskedPredictionOutput(NamedTuple):
    """Sums over the batch's masked label frames."""

    loss_sum: Tensor  # cross-entropy in nats, the mean over codebooks summed over frames
    correct_N: Tensor  # frames whose code has the highest logit
    code_counts_NV: Tensor  # int64: how often each code was the target


class CodeHead(nn.Linear):
    """One codebook's softmax."""

    def forward(self, h_MD: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy summed over M, in float32, and the number of correct guesses."""
        logits_MV = super().forward(h_MD)
        nll = nn.functional.cross_entropy(logits_MV.float(), labels_M, reduction="sum")
        return nll, (logits_MV.detach().argmax(-1) == labels_M).sum()


class MaskedPrediction(nn.Module):
    """Parameters are encoder.* and heads.*; the quantizer holds buffers only."""

    def __init__(
        self,
        *,
        fbank: Fbank,
        encoder: ConformerEncoder,
        mask: MaskConfig,
        codebook_size: int,
        quantizer: RandomProjectionQuantizer | None = None,
    ):
        super().__init__()
        self.fbank, self.encoder, self.mask, self.quantizer = fbank, encoder, mask, quantizer
        self.codebook_size = codebook_size
        num_codebooks = quantizer.cfg.num_codebooks if quantizer else 1
        self.heads = nn.ModuleList(CodeHead(encoder.cfg.dim, codebook_size) for _ in range(num_codebooks))

    def forward(
        self,
        waveforms_BN: Tensor,
        lengths_B: Tensor,
        *,
        mask_BL: Tensor,
        masked_M: Tensor,
        labels_BLN: Tensor | None = None,
    ) -> MaskedPredictionOutput:
        """Return loss and counts for waveforms in [-1, 1] and lengths in samples.

        `masked_M` are the true places of `mask_BL`, flattened: to find them here would make the host wait for the GPU.
        `labels_BLN` are given targets; without them the quantizer makes its own.
        """
        features_BTF, frames_B = self.fbank(waveforms_BN, lengths_B)
        if labels_BLN is not None:
            labels_MN = labels_BLN.flatten(0, 1)[masked_M]
        else:
            assert self.quantizer is not None, "without a quantizer labels must be given"
            labels_MN = self.quantizer.codes(stacked(features_BTF, frames_B)[0].flatten(0, 1)[masked_M])
        h_BLD, _ = self.encoder(replace_by_noise(features_BTF, mask_BL, self.mask), frames_B)
        assert h_BLD.shape[:2] == mask_BL.shape, f"{h_BLD.shape[:2]} frames, a mask of {mask_BL.shape}"
        return self.predict(h_BLD.flatten(0, 1)[masked_M], labels_MN)

    def predict(self, h_MD: Tensor, labels_MN: Tensor) -> MaskedPredictionOutput:
        losses, correct = [], []
        for head, labels_M in zip(self.heads, labels_MN.unbind(-1)):
            if len(self.heads) > 1 and torch.is_grad_enabled():
                # One codebook's logits in memory, not 16: a minute of audio has 16 x 500 x 8192 of them, 0.3 GB.
                nll, right = checkpoint(head, h_MD, labels_M, use_reentrant=False)
            else:
                nll, right = head(h_MD, labels_M)
            losses.append(nll)
            correct.append(right)
        return MaskedPredictionOutput(
            loss_sum=torch.stack(losses).mean(),
            correct_N=torch.stack(correct),
            code_counts_NV=code_counts(labels_MN, self.codebook_size),
        )

    def no_output(self) -> MaskedPredictionOutput:
        """Return what an empty batch gives: all sums are zero."""
        device = self.heads[0].weight.device
        nothing_MN = torch.zeros(0, len(self.heads), dtype=torch.int64, device=device)
        zeros_N = torch.zeros(len(self.heads), dtype=torch.int64, device=device)
        return MaskedPredictionOutput(zeros_N.sum().float(), zeros_N, code_counts(nothing_MN, self.codebook_size))

    def speech_encoder(self) -> SpeechEncoder:
        """Return what outlives pretraining, in place and not copied."""
        return SpeechEncoder.assemble(fbank=self.fbank, encoder=self.encoder)


def code_counts(labels_MN: Tensor, codebook_size: int) -> Tensor:
    """Return counts_NV (int64) of how often each code occurs; nothing waits for the device, unlike bincount."""
    N = labels_MN.shape[1]
    flat = (labels_MN + codebook_size * torch.arange(N, device=labels_MN.device)).flatten()
    counts = torch.zeros(N * codebook_size, dtype=torch.int64, device=labels_MN.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat)).view(N, codebook_size)
