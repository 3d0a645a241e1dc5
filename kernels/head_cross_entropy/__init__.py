"""Cross-entropy of target tokens under a vocabulary head, from hidden states, without all their logits at once.

At 152 thousand words a thousand tokens have 152 million logits, and in a training step each takes about 12 bytes: 1.8
GB for numbers of which one per token is wanted. `reference.py` is the equation and holds them; `chunked.py` gives the
same losses and gradients with `CHUNK_LOGITS` of them at a time. Both are torch on any device.

Shape letters: N tokens, L width of a hidden state, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .chunked import ChunkedCrossEntropy
from .reference import reference

IMPLS = ("auto", "chunked", "reference")
# Logits in memory at once. Of 152 thousand words that is 441 tokens: enough for a GPU to be busy with the products and
# not with reading the head's weights again (an H100 in bf16 needs 295), at 0.6 GB.
CHUNK_LOGITS = 1 << 26


class HeadCrossEntropy(NamedTuple):
    """`nll_N` in nats, float32; `correct_N` says where the target has the highest logit. Ignored: 0 and False."""

    nll_N: Tensor
    correct_N: Tensor


def head_cross_entropy(
    hidden_NL: Tensor,
    weight_VL: Tensor,
    targets_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
    chunk_logits: int = CHUNK_LOGITS,
) -> HeadCrossEntropy:
    """Return -log softmax(hidden W^T + bias) at each target, differentiable in hidden states, weight and bias.

    `auto` takes the reference where all logits are no more than one chunk. Under autocast the products are in its type.
    Losses are float32, of float64 inputs float64. A target beyond the vocabulary is a ValueError on a CPU; on a GPU,
    where looking would make the host wait, it fails in the device's own check, as in torch's cross_entropy.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}")
    if chunk_logits < 1:
        raise ValueError(f"chunk_logits is {chunk_logits}; it must be at least 1")
    device = hidden_NL.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden_NL, weight_VL = hidden_NL.to(dtype), weight_VL.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    _check(hidden_NL, weight_VL, targets_N, bias_V=bias_V, ignore_index=ignore_index)
    if impl == "reference" or (impl == "auto" and len(hidden_NL) * len(weight_VL) <= chunk_logits):
        return HeadCrossEntropy(*reference(hidden_NL, weight_VL, targets_N, bias_V=bias_V, ignore_index=ignore_index))
    ignored_N = targets_N == ignore_index
    targets_N = torch.where(ignored_N, 0, targets_N)
    # Inside a Function gradients are always off; whether somebody wants them shows only here.
    wanted = torch.is_grad_enabled()
    return HeadCrossEntropy(
        *ChunkedCrossEntropy.apply(hidden_NL, weight_VL, bias_V, targets_N, ignored_N, chunk_logits, wanted)
    )


def _check(
    hidden_NL: Tensor, weight_VL: Tensor, targets_N: Tensor, *, bias_V: Tensor | None, ignore_index: int
) -> None:
    shapes = f"hidden {list(hidden_NL.shape)}, weight {list(weight_VL.shape)}, targets {list(targets_N.shape)}"
    if hidden_NL.ndim != 2 or weight_VL.ndim != 2 or hidden_NL.shape[1] != weight_VL.shape[1]:
        raise ValueError(f"{shapes}: hidden must be [N, L] and weight [V, L]")
    if targets_N.shape != hidden_NL.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(f"{shapes} ({targets_N.dtype}): targets must be int64, one for each hidden state")
    dtypes = {str(tensor.dtype) for tensor in (hidden_NL, weight_VL, bias_V) if tensor is not None}
    if len(dtypes) > 1:
        raise ValueError(
            f"hidden states, weight and bias are {', '.join(sorted(dtypes))}; cast them to one, or use autocast"
        )
    if bias_V is not None and bias_V.shape != weight_VL.shape[:1]:
        raise ValueError(f"{shapes}, bias {list(bias_V.shape)}: the bias must be [V]")
    if targets_N.device.type == "cpu" and type(targets_N) is Tensor:  # a fake tensor has no values
        wrong_N = ((targets_N < 0) | (targets_N >= len(weight_VL))) & (targets_N != ignore_index)
        if wrong_N.any():
            at = int(wrong_N.nonzero()[0])
            raise ValueError(
                f"target {int(targets_N[at])} of token {at} is none of the head's {len(weight_VL)} words (ignored: "
                f"{ignore_index}); tokenizer and LLM must be of one model"
            )
