"""What training asks of an LM at its target positions: -log p of each target, and whether it was the first choice.

Logits are no part of the answer, and at 152 thousand words they would be gigabytes. Where the LM's head is nothing
but a product, its weight goes to `head_cross_entropy`, which holds a part of them at a time. The head is called as a
module, with all logits, where that would go past something:
- a scale or soft cap after the head, adapters on it, weights that are packed, a forward of its own (as accelerate puts
  in its place to bring weights from elsewhere);
- hooks, which run only when it is called. ZeRO 3 has one on every module that fetches its weights from the other ranks,
  and outside of the call there are none to multiply with.

Shape letters: B utterances, T positions, L LM width, N target positions, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from ..kernels.head_cross_entropy import head_cross_entropy
from ..kernels.head_kl import Head
from .llm import head_is_plain, hidden_at, logits_at
from .prompt import AnswerTargets


class TargetLosses(NamedTuple):
    """`logits_NV` where they were asked for; where the product was, `product`, or logits of a head that is none."""

    nll_N: Tensor  # nats, float32 or better
    correct_N: Tensor
    logits_NV: Tensor | None
    product: Head | None = None


def target_losses(
    llm: PreTrainedModel,
    embeddings_BTL: Tensor,
    targets: AnswerTargets,
    *,
    return_logits: bool = False,
    return_product: bool = False,
    **forward,
) -> TargetLosses:
    """Run the LM once. A position may have several targets; `forward` are arguments of the LM beside its embeddings."""
    where = {"rows_N": targets.rows_N, "columns_N": targets.columns_N, "use_cache": False}
    head = llm.get_output_embeddings()
    if is_only_a_product(llm, head) and not return_logits:
        hidden_NL, _ = hidden_at(llm, embeddings_BTL, **where, **forward)
        losses = head_cross_entropy(hidden_NL, head.weight, targets.tokens_N, bias_V=head.bias)
        return TargetLosses(*losses, None, Head(hidden_NL, head.weight, head.bias) if return_product else None)
    logits_NV, _ = logits_at(llm, embeddings_BTL, **where, **forward)
    # Sums over many words need more digits than a half-precision LM has.
    wide_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    nll_N = nn.functional.cross_entropy(wide_NV, targets.tokens_N, reduction="none")
    correct_N = logits_NV.detach().argmax(-1) == targets.tokens_N
    return TargetLosses(nll_N, correct_N, logits_NV if return_logits or return_product else None)


def is_only_a_product(llm: PreTrainedModel, head: nn.Module | None) -> bool:
    """Whether calling the head does no more than multiply with its weight."""
    hooks = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    is_linear = type(head) is nn.Linear and "forward" not in vars(head)
    return head_is_plain(llm) and is_linear and not any(getattr(head, name) for name in hooks)
