"""CTC: an auxiliary head on the encoder over the UTF-8 bytes of the transcript, its loss as a sum, greedy decoding.

Bytes rather than the LLM's tokens: letters are what frames of 40 ms tell apart, and every language and LLM has the same
257 classes (a head over 150,000 tokens would take 0.9 GB for a minute of audio). The blank is the LAST class.
An utterance whose target cannot fit its frames (one frame a token, one more between equal neighbours) has an infinite
loss; it is left out of the sum and counted in `too_short`, never zeroed in silence. Any other infinity or NaN stays in
the sum, where the trainer's finite check sees it.

Shape letters: B utterances, T encoder frames, D encoder width, V = vocab_size + 1 classes.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

BYTES = 256


def text_bytes(text: str) -> list[int]:
    """Return the CTC target of a transcript."""
    return list(text.encode("utf-8"))


def bytes_text(target: list[int]) -> str:
    """Return the text of decoded bytes; what is no UTF-8 shows as the replacement character."""
    return bytes(target).decode("utf-8", errors="replace")


class CTCHead(nn.Module):
    """Linear and log-softmax over the classes and the blank."""

    def __init__(self, dim: int, vocab_size: int = BYTES):
        super().__init__()
        self.blank = vocab_size
        self.proj = nn.Linear(dim, vocab_size + 1)

    def forward(self, h_BTD: Tensor) -> Tensor:
        """Return log_probs_BTV in float32: a sum over paths of thousands of frames loses too much in bf16."""
        return self.proj(h_BTD).float().log_softmax(-1)


class CTCLoss(NamedTuple):
    loss_sum: Tensor  # summed over the utterances that fit; zero (with a graph) if none does
    utterances: int  # in the sum
    too_short: int  # left out: more tokens than frames can carry


def frames_needed(target: list[int]) -> int:
    """Return the least number of frames that can emit the target: equal neighbours need a blank between them."""
    return len(target) + sum(a == b for a, b in itertools.pairwise(target))


def ctc_loss_sum(log_probs_BTV: Tensor, lengths_B: Tensor, targets: list[list[int]]) -> CTCLoss:
    """Return minus log P(targets | log_probs) summed over utterances, in nats; the last class is the blank."""
    B, V = len(log_probs_BTV), log_probs_BTV.shape[-1]
    if len(targets) != B:
        raise ValueError(f"{len(targets)} CTC targets for {B} utterances")
    outside = [token for target in targets for token in target if not 0 <= token < V - 1]
    if outside:
        raise ValueError(f"CTC targets must lie within 0 and vocab_size - 1 ({V - 2}), found {outside[0]}")
    lengths = lengths_B.tolist()
    fits = [b for b in range(B) if frames_needed(targets[b]) <= lengths[b]]
    if not fits:
        return CTCLoss(log_probs_BTV.sum() * 0.0, 0, B)
    kept_BTV = log_probs_BTV if len(fits) == B else log_probs_BTV[torch.tensor(fits, device=log_probs_BTV.device)]
    loss_sum = nn.functional.ctc_loss(
        kept_BTV.transpose(0, 1).float(),
        torch.tensor([token for b in fits for token in targets[b]], dtype=torch.long, device=log_probs_BTV.device),
        torch.tensor([lengths[b] for b in fits]),
        torch.tensor([len(targets[b]) for b in fits]),
        blank=V - 1,
        reduction="sum",
    )
    return CTCLoss(loss_sum, len(fits), B - len(fits))


def greedy_decode(log_probs_BTV: Tensor, lengths_B: Tensor) -> list[list[int]]:
    """Return the token ids of the best path: repeats merged, then blanks (the last class) removed."""
    blank = log_probs_BTV.shape[-1] - 1
    best_BT, lengths = log_probs_BTV.argmax(-1).tolist(), lengths_B.tolist()
    paths = [path[:length] for path, length in zip(best_BT, lengths)]
    return [[k for i, k in enumerate(path) if k != blank and (i == 0 or k != path[i - 1])] for path in paths]
