"""What a student has not yet learnt of its teacher: divergence of the next token, error of the encoder's frames.

Both are sums over target tokens, in nats and in relative squared error, so that they add up with the cross-entropy
whatever else is in a batch. The teacher's tensors carry no gradient.

Shape letters: B utterances, N target tokens, V vocabulary, T encoder frames, D encoder width.
"""

import torch
from torch import Tensor

from ..kernels.head_kl import Head, head_kl, reference
from .conformer import valid_frames


def token_kl(teacher: Tensor | Head, student: Tensor | Head, *, temperature: float = 1.0) -> Tensor:
    """Return kl_N, KL(teacher || student) of each target token in nats, float32, from logits_NV or what makes them.

    Both are softened by `temperature` and the result multiplied by its square, so that gradients keep their size. Where
    the logits of both are given as products, only a part of them is in memory at a time (kernels/head_kl).
    """
    if isinstance(teacher, Head) and isinstance(student, Head):
        return head_kl(teacher, student, temperature=temperature)
    teacher_NV, student_NV = (one.logits() if isinstance(one, Head) else one for one in (teacher, student))
    if teacher_NV.shape != student_NV.shape:
        raise ValueError(f"the teacher's logits are {list(teacher_NV.shape)}, the student's {list(student_NV.shape)}")
    return reference(teacher_NV, student_NV, temperature=temperature)


def relative_frame_error(teacher_BTD: Tensor, student_BTD: Tensor, lengths_B: Tensor) -> Tensor:
    """Return error_B, |student - teacher|^2 / |teacher|^2 over an utterance's valid frames, float32."""
    if teacher_BTD.shape != student_BTD.shape:
        raise ValueError(f"the teacher's frames are {list(teacher_BTD.shape)}, the student's {list(student_BTD.shape)}")
    valid_BT1 = valid_frames(lengths_B, teacher_BTD.shape[1])
    teacher_BTD = teacher_BTD.detach().float() * valid_BT1
    apart_B = ((student_BTD.float() * valid_BT1 - teacher_BTD) ** 2).sum((1, 2))
    return apart_B / (teacher_BTD**2).sum((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
