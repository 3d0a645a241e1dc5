"""Divergence of two vocabulary heads as an equation: kl_n = T^2 sum_v p_nv (log p_nv - log q_nv).

p = softmax(teacher's logits / T), q = softmax(student's logits / T). The square keeps the size of gradients whatever T
is (https://arxiv.org/abs/1503.02531, section 2.1). Shape letters: N tokens, V vocabulary.
"""

import torch
from torch import Tensor


def reference(teacher_NV: Tensor, student_NV: Tensor, *, temperature: float) -> Tensor:
    """Return kl_N, at least float32, of logits; the teacher's carry no gradient."""
    teacher_NV, student_NV = (
        (logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature).log_softmax(-1)
        for logits_NV in (teacher_NV.detach(), student_NV)
    )
    return temperature**2 * (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)
