"""Divergence of two vocabulary heads that never holds the logits of all tokens, of neither head.

As in head_cross_entropy/chunked.py: forward by chunks of tokens, with d kl_n / d h_n at once but for the factor of each
token; backward, only for a student's head that learns, by chunks of the vocabulary, with both logits once more and
softmax by the kept logsumexps. With logits z = h . w + b of the student, d kl_n / d z_nv = T (q_nv - p_nv).

Shape letters: N tokens, L width of the student's hidden states, M of the teacher's, V vocabulary, R tokens of a chunk,
C words of one.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..head_cross_entropy.chunked import chunks


class Head(NamedTuple):
    """Logits as the product that they are: hidden_NL weight_VL^T + bias_V."""

    hidden_NL: Tensor
    weight_VL: Tensor
    bias_V: Tensor | None

    def detached(self) -> "Head":
        bias_V = None if self.bias_V is None else self.bias_V.detach()
        return Head(self.hidden_NL.detach(), self.weight_VL.detach(), bias_V)

    def logits(self, *, rows: slice = slice(None), words: slice = slice(None)) -> Tensor:
        """Return those of some tokens and some words."""
        bias_C = None if self.bias_V is None else self.bias_V[words]
        return nn.functional.linear(self.hidden_NL[rows], self.weight_VL[words], bias_C)

    def softened(self, temperature: float, **part: slice) -> Tensor:
        """Return logits / temperature of a part, at least float32, in a tensor of their own."""
        logits_RC = self.logits(**part)
        return logits_RC.to(torch.promote_types(logits_RC.dtype, torch.float32)).div_(temperature)


class ChunkedKL(torch.autograd.Function):
    """Takes the student's `Head` and the teacher's, one tensor after the other."""

    @staticmethod
    def forward(ctx, *given) -> Tensor:
        *tensors, temperature, chunk_logits, with_gradient = given
        student, teacher = Head(*tensors[:3]), Head(*tensors[3:])
        N, V = len(student.hidden_NL), len(student.weight_VL)
        kl_N, student_sum_N, teacher_sum_N = (
            student.hidden_NL.new_empty(N, dtype=torch.promote_types(student.hidden_NL.dtype, torch.float32))
            for _ in range(3)
        )
        to_head = with_gradient and any(ctx.needs_input_grad[1:3])
        slope_NL = torch.empty_like(student.hidden_NL) if with_gradient and ctx.needs_input_grad[0] else None
        for rows in chunks(N, chunk_logits // V):
            student_RV = _log_probs(student, temperature, rows, student_sum_N if to_head else None)
            teacher_RV = _log_probs(teacher, temperature, rows, teacher_sum_N if to_head else None)
            slope_RL = None if slope_NL is None else slope_NL[rows]
            kl_N[rows] = _divergence(student_RV, teacher_RV, student, slope_RL)
            del student_RV, teacher_RV  # or two chunks would be in memory at once
        kept = (*tensors, student_sum_N, teacher_sum_N) if to_head else (None,) * 8
        ctx.save_for_backward(slope_NL, *kept)
        ctx.temperature, ctx.chunk_logits = temperature, chunk_logits
        return kl_N.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        slope_NL, *kept = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        factor_N1 = ctx.temperature * grad_N[:, None]
        hidden_gradient = (slope_NL * factor_N1).to(slope_NL.dtype) if to_hidden else None
        head_gradients = (None, None)
        if to_weight or to_bias:
            head_gradients = _head_gradients(
                Head(*kept[:3]),
                Head(*kept[3:6]),
                sums_N=kept[6:],
                factor_N1=factor_N1,
                temperature=ctx.temperature,
                to_weight=to_weight,
                to_bias=to_bias,
                chunk_logits=ctx.chunk_logits,
            )
        return hidden_gradient, *head_gradients, *[None] * 6


def _log_probs(head: Head, temperature: float, rows: slice, sum_N: Tensor | None) -> Tensor:
    """Return log p_RV; write the logsumexp of softened logits to `sum_N`."""
    logits_RV = head.softened(temperature, rows=rows)
    if sum_N is not None:
        sum_N[rows] = logits_RV.logsumexp(-1)
    return logits_RV.log_softmax(-1)


def _divergence(student_RV: Tensor, teacher_RV: Tensor, student: Head, slope_RL: Tensor | None) -> Tensor:
    """Return sum_v p (log p - log q) of log q and log p, which it writes over; write (q - p) . w to `slope_RL`."""
    probs_RV = teacher_RV.exp()
    kl_R = teacher_RV.sub_(student_RV).mul_(probs_RV).sum(-1)
    if slope_RL is not None:
        slopes_RV = student_RV.exp_().sub_(probs_RV)
        torch.mm(slopes_RV.to(student.weight_VL.dtype), student.weight_VL, out=slope_RL)
    return kl_R


def _head_gradients(
    student: Head,
    teacher: Head,
    *,
    sums_N: list[Tensor],
    factor_N1: Tensor,
    temperature: float,
    to_weight: bool,
    to_bias: bool,
    chunk_logits: int,
) -> tuple[Tensor | None, Tensor | None]:
    hidden_NL, weight_VL, bias_V = student
    student_sum_N, teacher_sum_N = sums_N
    weight_gradient_VL = torch.empty_like(weight_VL) if to_weight else None
    bias_gradient_V = torch.empty_like(bias_V) if to_bias and bias_V is not None else None
    for words in chunks(len(weight_VL), chunk_logits // max(1, len(hidden_NL))):
        slopes_NC = student.softened(temperature, words=words).sub_(student_sum_N[:, None]).exp_()
        slopes_NC -= teacher.softened(temperature, words=words).sub_(teacher_sum_N[:, None]).exp_()
        slopes_NC *= factor_N1
        if bias_gradient_V is not None:
            bias_gradient_V[words] = slopes_NC.sum(0)
        if weight_gradient_VL is not None:
            torch.mm(slopes_NC.to(weight_VL.dtype).T, hidden_NL, out=weight_gradient_VL[words])
        del slopes_NC
    return weight_gradient_VL, bias_gradient_V
