"""What a student has not yet learnt of its teacher: divergence of the next token, error of the encoder's frames.

Both are sums over target tokens, in nats and in relative squared error, so that they add up with the cross-entropy
whatever else is in a batch. The teacher's tensors carry no gradient.

Shape letters: B utterances, N target tokens, V vocabulary, T encoder frames, D encoder width.
"""

import torch
from torch import Tensor

from .conformer import valid_frames


def token_kl(teacher_NV: Tensor, student_NV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return kl_N, KL(teacher || student) of each target token in nats, float32, from logits of any type.

    Both are softened by `temperature` and the result multiplied by its square, so that gradients keep their size
    (https://arxiv.org/abs/1503.02531, section 2.1).
    """
    if teacher_NV.shape != student_NV.shape:
        raise ValueError(f"the teacher's logits are {list(teacher_NV.shape)}, the student's {list(student_NV.shape)}")
    teacher_NV = (teacher_NV.detach().float() / temperature).log_softmax(-1)
    student_NV = (student_NV.float() / temperature).log_softmax(-1)
    return temperature**2 * (teacher_NV.exp() * (teacher_NV - student_NV)).sum(-1)


def relative_frame_error(teacher_BTD: Tensor, student_BTD: Tensor, lengths_B: Tensor) -> Tensor:
    """Return error_B, |student - teacher|^2 / |teacher|^2 over an utterance's valid frames, float32."""
    if teacher_BTD.shape != student_BTD.shape:
        raise ValueError(f"the teacher's frames are {list(teacher_BTD.shape)}, the student's {list(student_BTD.shape)}")
    valid_BT1 = valid_frames(lengths_B, teacher_BTD.shape[1])
    teacher_BTD = teacher_BTD.detach().float() * valid_BT1
    apart_B = ((student_BTD.float() * valid_BT1 - teacher_BTD) ** 2).sum((1, 2))
    return apart_B / (teacher_BTD**2).sum((1, 2)).clamp_min(torch.finfo(torch.float32).tiny)
