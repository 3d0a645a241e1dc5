"""Chunked divergence of two heads: torch's own values and gradients, whatever the chunks, and never all the logits."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from seedling.kernels.head_kl import Head, head_kl

# (N, V, L, M, logits of a chunk): one of everything, primes, chunks that divide nothing, one word or token at a time
SIZES = [(1, 1, 1, 1, 1), (1, 7, 3, 2, 100), (13, 17, 11, 5, 50), (64, 101, 16, 24, 640), (31, 64, 8, 8, 1)]


class Heads:
    """A student and a teacher with random hidden states and heads, and a factor for each token's divergence."""

    def __init__(self, N: int, V: int, L: int, M: int, *, dtype=torch.float64, bias=True, learns=True):
        generator = torch.Generator().manual_seed(N * V + L)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.student, self.teacher = (
            Head(random(N, width), random(V, width), random(V) if bias else None) for width in (L, M)
        )
        self.factor_N = random(N).double()
        for tensor in self.student if learns else self.student[:1]:
            if tensor is not None:
                tensor.requires_grad_()

    def divergences(self, *, impl="chunked", **how) -> torch.Tensor:
        return head_kl(self.teacher, self.student, impl=impl, **how)

    def gradients(self, kl_N: torch.Tensor, student: Head | None = None) -> dict[str, torch.Tensor]:
        named = zip(Head._fields, student or self.student)
        leaves = {name: leaf for name, leaf in named if leaf is not None and leaf.requires_grad}
        return dict(zip(leaves, torch.autograd.grad((kl_N * self.factor_N).sum(), list(leaves.values()))))

    def by_torch(self, *, temperature=1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return kl_N and gradients by name of torch's functions in float64."""
        student = Head(*(None if x is None else x.detach().double().requires_grad_() for x in self.student))
        teacher = Head(*(None if x is None else x.double() for x in self.teacher))
        student_NV, teacher_NV = (
            (nn.functional.linear(*head) / temperature).log_softmax(-1) for head in (student, teacher)
        )
        kl_NV = nn.functional.kl_div(student_NV, teacher_NV, reduction="none", log_target=True)
        kl_N = temperature**2 * kl_NV.sum(-1)
        return kl_N.detach(), self.gradients(kl_N, student)


@pytest.mark.parametrize(("bias", "temperature"), [(True, 1.0), (False, 2.5)])
@pytest.mark.parametrize(("N", "V", "L", "M", "chunk_logits"), SIZES)
def test_divergences_and_gradients_are_those_of_torch(N, V, L, M, chunk_logits, bias, temperature):
    heads = Heads(N, V, L, M, bias=bias)
    wanted_N, gradients = heads.by_torch(temperature=temperature)
    for impl in ("chunked", "reference"):
        kl_N = heads.divergences(impl=impl, temperature=temperature, chunk_logits=chunk_logits)
        torch.testing.assert_close(kl_N, wanted_N, rtol=1e-11, atol=1e-12)
        found = heads.gradients(kl_N)
        assert set(found) == set(gradients)
        for name, gradient in found.items():
            assert torch.allclose(gradient, gradients[name], rtol=1e-10, atol=1e-12), f"{name} by {impl}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_is_as_exact_as_all_logits_in_the_same_type(dtype, autocast):
    heads = Heads(61, 331, 24, 16, dtype=dtype)
    wanted_N, gradients = heads.by_torch(temperature=2.0)
    truth, found = {"kl": wanted_N} | gradients, {}
    for impl in ("reference", "chunked"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            kl_N = heads.divergences(impl=impl, temperature=2.0, chunk_logits=2000)
        assert kl_N.dtype == torch.float32
        found[impl] = {"kl": kl_N.detach()} | heads.gradients(kl_N)
    for name, true in truth.items():
        assert found["chunked"][name].dtype == found["reference"][name].dtype, name
        theirs, ours = (float((found[impl][name] - true).abs().max()) for impl in ("reference", "chunked"))
        assert ours <= 2 * theirs + 1e-6, f"{name}: ours {ours:.3g}, all logits {theirs:.3g}"


def test_the_teacher_gets_no_gradient_and_a_student_like_it_has_nothing_to_learn():
    heads = Heads(20, 50, 4, 4)
    same = Head(*(tensor.detach().clone().requires_grad_() for tensor in heads.student))
    for impl in ("reference", "chunked"):
        kl_N = head_kl(same, heads.student, impl=impl, chunk_logits=300)
        torch.testing.assert_close(kl_N, torch.zeros_like(kl_N))
        kl_N.sum().backward()
        assert all(tensor.grad is None for tensor in same)
        torch.testing.assert_close(heads.student.hidden_NL.grad, torch.zeros(20, 4, dtype=torch.float64))


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


@pytest.mark.parametrize("learns", [True, False])
def test_no_tensor_is_larger_than_a_chunk_or_the_head(learns):
    N, V, L, M, chunk_logits = 300, 1000, 4, 6, 8000
    heads = Heads(N, V, L, M, learns=learns, bias=False)
    with LargestTensor() as reference:
        heads.gradients(heads.divergences(impl="reference"))
    with LargestTensor() as chunked:
        heads.gradients(heads.divergences(chunk_logits=chunk_logits))
    assert reference.elements == N * V
    assert chunked.elements <= max(chunk_logits, V * L)


def test_a_frozen_head_keeps_one_gradient_of_the_hidden_states_and_nothing_without_grad():
    heads, kept = Heads(50, 200, 4, 6, learns=False), []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda nothing: None):
        heads.divergences(chunk_logits=1000)
        assert kept == [50 * 4]
        with torch.no_grad():
            assert not heads.divergences(chunk_logits=1000).requires_grad
        assert kept == [50 * 4]


def test_auto_takes_chunks_only_where_there_is_more_than_one():
    heads = Heads(20, 50, 4, 4, bias=False)
    for chunk_logits, largest in ((20 * 50, 20 * 50), (20 * 50 - 1, 20 * 50 - 50)):
        with LargestTensor() as seen:
            heads.divergences(impl="auto", chunk_logits=chunk_logits)
        assert seen.elements == largest


def test_no_tokens_diverge_by_nothing():
    heads = Heads(0, 12, 5, 3)
    kl_N = heads.divergences(chunk_logits=30)
    assert kl_N.shape == (0,) and not heads.gradients(kl_N)["weight_VL"].any()


def test_what_does_not_fit_is_named():
    heads = Heads(3, 5, 4, 4)
    fewer = Head(heads.teacher.hidden_NL, heads.teacher.weight_VL[:4], None)
    with pytest.raises(ValueError, match=r"the teacher's logits are \[3, 4\], the student's \[3, 5\]"):
        head_kl(fewer, heads.student)
    for how in ({"impl": "triton"}, {"chunk_logits": 0}):
        with pytest.raises(ValueError, match=next(iter(how))):
            head_kl(heads.teacher, heads.student, **how)
