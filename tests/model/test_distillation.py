"""Distillation losses against numpy in float64 and torch's own: values, gradients, padding, and what is refused."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from seedling.kernels.head_kl import Head
from seedling.model.distillation import relative_frame_error, token_kl


@pytest.fixture
def logits() -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return tuple(3 * torch.randn(7, 11, generator=draws) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_is_that_of_its_definition(logits, temperature):
    teacher, student = (x.double().numpy() / temperature for x in logits)
    wanted = temperature**2 * (softmax(teacher, -1) * (log_softmax(teacher, -1) - log_softmax(student, -1))).sum(-1)
    np.testing.assert_allclose(token_kl(*logits, temperature=temperature).numpy(), wanted, rtol=2e-6)


def test_it_is_torchs_own_and_in_float32_from_bfloat16(logits):
    teacher, student = (x.bfloat16() for x in logits)
    wanted = torch.nn.functional.kl_div(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    found = token_kl(teacher, student)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted)


def test_the_student_is_pulled_towards_the_teacher_and_the_teacher_nowhere(logits):
    teacher, student = (x.clone().requires_grad_() for x in logits)
    token_kl(teacher, student, temperature=2.0).sum().backward()
    assert teacher.grad is None
    wanted = 2 * ((student / 2).softmax(-1) - (teacher / 2).softmax(-1))  # T (q - p)
    torch.testing.assert_close(student.grad, wanted.detach(), atol=1e-6, rtol=1e-4)
    assert torch.equal(token_kl(teacher, teacher), torch.zeros(7))


def test_logits_and_what_makes_them_diverge_alike(logits):
    teacher, student = logits
    heads = [Head(logits_NV, torch.eye(11), None) for logits_NV in logits]
    wanted = token_kl(teacher, student, temperature=2.0)
    for given in (heads, (heads[0], student), (teacher, heads[1])):
        torch.testing.assert_close(token_kl(*given, temperature=2.0), wanted)


def test_a_frame_error_is_relative_and_padding_has_no_part_in_it():
    draws, lengths = np.random.default_rng(0), [4, 6, 1]
    teacher, student = draws.normal(size=(2, 3, 6, 5))
    wanted = [
        np.sum((student[b, :n] - teacher[b, :n]) ** 2) / np.sum(teacher[b, :n] ** 2) for b, n in enumerate(lengths)
    ]
    for factor in (1.0, 1e3):
        found = relative_frame_error(
            torch.tensor(factor * teacher), torch.tensor(factor * student), torch.tensor(lengths)
        )
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-5)
    silent = relative_frame_error(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), torch.tensor([2]))
    assert silent.tolist() == [0.0]


def test_another_vocabulary_or_width_is_refused():
    with pytest.raises(ValueError, match=r"\[2, 5\], the student's \[2, 6\]"):
        token_kl(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match=r"\[1, 2, 3\], the student's \[1, 2, 4\]"):
        relative_frame_error(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4), torch.tensor([2]))
