"""Divergence of a student's vocabulary head from a teacher's, from hidden states, without all logits of either.

At 152 thousand words a thousand tokens have 152 million logits, in distillation twice, each with a softmax and a
gradient of its size. `reference.py` is the equation on logits; `chunked.py` gives the same values and gradients with
`CHUNK_LOGITS` of each head at a time. Both are torch on any device.

Shape letters: N tokens, V vocabulary.
"""

import torch
from torch import Tensor

from ..head_cross_entropy import CHUNK_LOGITS, IMPLS
from .chunked import ChunkedKL, Head
from .reference import reference

__all__ = ["Head", "head_kl", "reference"]


def head_kl(
    teacher: Head,
    student: Head,
    *,
    temperature: float = 1.0,
    impl: str = "auto",
    chunk_logits: int = CHUNK_LOGITS,
) -> Tensor:
    """Return kl_N, KL(teacher || student) of each token in nats, differentiable in what the student has.

    `auto` takes the reference where all logits of a head are no more than one chunk. Under autocast the products are in
    its type. Divergences are float32, of float64 inputs float64. The widths of the two may differ, the words may not.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; it must be one of {', '.join(IMPLS)}")
    if chunk_logits < 1:
        raise ValueError(f"chunk_logits is {chunk_logits}; it must be at least 1")
    shapes = [[len(head.hidden_NL), len(head.weight_VL)] for head in (teacher, student)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the teacher's logits are {shapes[0]}, the student's {shapes[1]}")
    teacher, student = _cast(teacher).detached(), _cast(student)
    if impl == "reference" or (impl == "auto" and shapes[1][0] * shapes[1][1] <= chunk_logits):
        return reference(teacher.logits(), student.logits(), temperature=temperature)
    # Inside a Function gradients are always off; whether somebody wants them shows only here.
    return ChunkedKL.apply(*student, *teacher, temperature, chunk_logits, torch.is_grad_enabled())


def _cast(head: Head) -> Head:
    """Return a head in the type that autocast multiplies in, where it is on."""
    device = head.hidden_NL.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return head
    hidden_NL, weight_VL, bias_V = head
    dtype = torch.get_autocast_dtype(device)
    return Head(hidden_NL.to(dtype), weight_VL.to(dtype), None if bias_V is None else bias_V.to(dtype))
