"""Cross-entropy of a vocabulary head that never holds the logits of all tokens.

Forward, by chunks of tokens, because a softmax needs a token's whole row: logits, loss, and at once d nll_n / d h_n,
which is one number short of the gradient, the factor that the backward pass brings for each token. A frozen head is
done with that: no product is computed twice and nothing of size V is kept.

Backward, only for a head that learns, by chunks of the vocabulary, because a row of its gradient needs every token:
logits once more, softmax by the kept logsumexp, and a finished part of the gradient. Chunks of tokens would have to add
up gradients of size V x L, in half precision with a rounding each.

Every sum is one matrix product or runs along one row, in an order that does not vary. Shape letters: N tokens, L width
of a hidden state, V vocabulary, R tokens of a chunk, C words of one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class ChunkedCrossEntropy(torch.autograd.Function):
    """`targets_N` and `ignored_N`: a target that is ignored may be any word, its loss and gradient are zero."""

    @staticmethod
    def forward(
        ctx,
        hidden_NL: Tensor,
        weight_VL: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        ignored_N: Tensor,
        chunk_logits: int,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_NL.dtype, torch.float32)
        nll_N, logsumexp_N = (hidden_NL.new_empty(len(hidden_NL), dtype=wide) for _ in range(2))
        correct_N = torch.empty_like(ignored_N)
        slope_NL = torch.empty_like(hidden_NL) if with_gradient and ctx.needs_input_grad[0] else None
        for rows in chunks(len(hidden_NL), chunk_logits // len(weight_VL)):
            logits_RV = nn.functional.linear(hidden_NL[rows], weight_VL, bias_V)
            slope_RL = None if slope_NL is None else slope_NL[rows]
            nll_N[rows], logsumexp_N[rows], best_R = _losses(logits_RV, targets_N[rows], weight_VL, slope_RL, wide=wide)
            correct_N[rows] = best_R == targets_N[rows]
            del logits_RV  # or two chunks would be in memory at once
        nll_N.masked_fill_(ignored_N, 0.0)
        correct_N.logical_and_(~ignored_N)
        to_head = with_gradient and any(ctx.needs_input_grad[1:3])
        kept = (hidden_NL, weight_VL, bias_V, targets_N, logsumexp_N) if to_head else (None,) * 5
        ctx.save_for_backward(slope_NL, ignored_N, *kept)
        ctx.chunk_logits = chunk_logits
        ctx.mark_non_differentiable(correct_N)
        return nll_N, correct_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor, _) -> tuple[Tensor | None, ...]:
        slope_NL, ignored_N, *kept = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        grad_N1 = grad_N.masked_fill(ignored_N, 0.0)[:, None]
        hidden_gradient = (slope_NL * grad_N1).to(slope_NL.dtype) if to_hidden else None
        head_gradients = (None, None)
        if to_weight or to_bias:
            head_gradients = _head_gradients(
                *kept, grad_N1, to_weight=to_weight, to_bias=to_bias, chunk_logits=ctx.chunk_logits
            )
        return hidden_gradient, *head_gradients, None, None, None, None


def _losses(
    logits_RV: Tensor, targets_R: Tensor, weight_VL: Tensor, slope_RL: Tensor | None, *, wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return nll_R, logsumexp_R and the word of the highest logit; write d nll_r / d h_r to `slope_RL`."""
    highest_R, best_R = logits_RV.max(-1)
    log_probs_RV = logits_RV.log_softmax(-1, dtype=wide)
    nll_R = -log_probs_RV.gather(1, targets_R[:, None])[:, 0]
    # At the highest logit: a target's may be minus infinity.
    logsumexp_R = highest_R - log_probs_RV.gather(1, best_R[:, None])[:, 0]
    if slope_RL is not None:
        slopes_RV = subtract_one_(log_probs_RV.exp_(), targets_R[:, None])
        torch.mm(slopes_RV.to(weight_VL.dtype), weight_VL, out=slope_RL)
    return nll_R, logsumexp_R, best_R


def _head_gradients(
    hidden_NL: Tensor,
    weight_VL: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    logsumexp_N: Tensor,
    grad_N1: Tensor,
    *,
    to_weight: bool,
    to_bias: bool,
    chunk_logits: int,
) -> tuple[Tensor | None, Tensor | None]:
    weight_gradient_VL = torch.empty_like(weight_VL) if to_weight else None
    bias_gradient_V = torch.empty_like(bias_V) if to_bias else None
    for words in chunks(len(weight_VL), chunk_logits // max(1, len(hidden_NL))):
        logits_NC = nn.functional.linear(hidden_NL, weight_VL[words], None if bias_V is None else bias_V[words])
        slopes_NC = logits_NC.to(logsumexp_N.dtype).sub_(logsumexp_N[:, None]).exp_()
        subtract_one_(slopes_NC, targets_N[:, None] - words.start).mul_(grad_N1)
        if bias_gradient_V is not None:
            bias_gradient_V[words] = slopes_NC.sum(0)
        if weight_gradient_VL is not None:
            torch.mm(slopes_NC.to(weight_VL.dtype).T, hidden_NL, out=weight_gradient_VL[words])
        del logits_NC, slopes_NC  # or two chunks would be in memory at once
    return weight_gradient_VL, bias_gradient_V


def subtract_one_(probs_NC: Tensor, place_N1: Tensor) -> Tensor:
    """Subtract 1 at each row's place, in place; rows whose place lies outside stay as they are."""
    inside_N1 = (place_N1 >= 0) & (place_N1 < probs_NC.shape[1])
    place_N1 = torch.where(inside_N1, place_N1, 0)
    return probs_NC.scatter_(1, place_N1, probs_NC.gather(1, place_N1) - inside_N1.to(probs_NC.dtype))


def chunks(total: int, size: int) -> Iterator[slice]:
    """Yield slices of `size`, at least 1, that cover `total`."""
    size = max(1, size)
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
