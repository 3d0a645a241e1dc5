"""Chunked cross-entropy of a head: torch's own losses and gradients, whatever the chunks, and never all the logits."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from seedling.kernels.head_cross_entropy import head_cross_entropy

IGNORED = -100
# (N, V, L, logits of a chunk): one of everything, primes, chunks that divide nothing, one word or token at a time
SIZES = [
    (1, 1, 1, 1),
    (1, 7, 3, 100),
    (5, 2, 4, 3),
    (13, 17, 11, 50),
    (64, 101, 16, 640),
    (31, 64, 8, 1),
    (7, 97, 5, 7),
]


class Head:
    """Random hidden states, a head, targets of which some are ignored, and a factor for each token's loss."""

    def __init__(self, N: int, V: int, L: int, *, dtype=torch.float64, bias=True, scale=1.0, ignored=True):
        generator = torch.Generator().manual_seed(N * V + L)

        def random(*shape: int) -> torch.Tensor:
            return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

        self.hidden_NL, self.weight_VL, self.bias_V = random(N, L), random(V, L), random(V) if bias else None
        self.targets_N = torch.randint(0, V, (N,), generator=generator)
        if ignored:
            self.targets_N[::4] = IGNORED
        self.factor_N = torch.randn(N, generator=generator, dtype=torch.float64)

    @property
    def leaves(self) -> dict[str, torch.Tensor]:
        return {"hidden": self.hidden_NL, "weight": self.weight_VL} | (
            {} if self.bias_V is None else {"bias": self.bias_V}
        )

    def losses(self, *, impl="chunked", **how):
        return head_cross_entropy(self.hidden_NL, self.weight_VL, self.targets_N, bias_V=self.bias_V, impl=impl, **how)

    def by_torch(self, dtype=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return nll_N and gradients by name of torch's functions, everything in `dtype`."""
        leaves = {name: leaf.detach().to(dtype or leaf.dtype).requires_grad_() for name, leaf in self.leaves.items()}
        logits_NV = nn.functional.linear(leaves["hidden"], leaves["weight"], leaves.get("bias"))
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        nll_N = nn.functional.cross_entropy(logits_NV.to(wide), self.targets_N, reduction="none")
        return nll_N.detach(), self._gradients(nll_N, leaves)

    def gradients(self, nll_N: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._gradients(nll_N, {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad})

    def _gradients(self, nll_N, leaves) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad((nll_N * self.factor_N.to(nll_N.dtype)).sum(), list(leaves.values()))
        return dict(zip(leaves, found))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("N, V, L, chunk_logits", SIZES)
def test_losses_and_gradients_are_those_of_torch(N, V, L, chunk_logits, bias):
    head = Head(N, V, L, bias=bias)
    nll_N, gradients = head.by_torch()
    for impl in ("chunked", "reference"):
        out = head.losses(impl=impl, chunk_logits=chunk_logits)
        torch.testing.assert_close(out.nll_N, nll_N, rtol=1e-12, atol=1e-12)
        for name, gradient in head.gradients(out.nll_N).items():
            assert torch.allclose(gradient, gradients[name], rtol=1e-11, atol=1e-12), f"{name} by {impl}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_as_exact_as_torch_in_the_same_type(dtype):
    head = Head(61, 331, 24, dtype=dtype, scale=0.5)
    exact_nll_N, exact = head.by_torch(torch.float64)
    torch_nll_N, by_torch = head.by_torch()
    out = head.losses(chunk_logits=2000)
    assert out.nll_N.dtype == torch.float32
    ours = {"nll": out.nll_N.detach()} | head.gradients(out.nll_N)
    theirs, truth = {"nll": torch_nll_N} | by_torch, {"nll": exact_nll_N} | exact
    assert_as_exact(ours, theirs, truth)


def assert_as_exact(ours: dict, theirs: dict, truth: dict) -> None:
    """Ours may be at most twice as far from float64 as torch in the same type."""
    assert set(ours) == set(theirs) == set(truth)
    for name, true in truth.items():
        assert ours[name].dtype == theirs[name].dtype, name
        torch_error, our_error = ((one[name].double() - true).abs().max() for one in (theirs, ours))
        assert our_error <= 2 * torch_error + 1e-6, f"{name}: ours {our_error:.3g}, torch {torch_error:.3g}"


@pytest.mark.parametrize("learns", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_only_what_learns_gets_a_gradient(learns):
    head = Head(13, 17, 11)
    _, gradients = head.by_torch()
    for name, leaf in head.leaves.items():
        leaf.requires_grad_(name in learns)
    found = head.gradients(head.losses(chunk_logits=50).nll_N)
    assert set(found) == set(learns)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-11, atol=1e-12)


def test_a_head_tied_to_the_embeddings_gets_both_gradients():
    weight_VL = torch.randn(29, 6, dtype=torch.float64, requires_grad=True)
    ids_N, targets_N = torch.arange(10), torch.arange(10, 20)
    gradients = [
        torch.autograd.grad(
            head_cross_entropy(weight_VL[ids_N].tanh(), weight_VL, targets_N, impl=impl, chunk_logits=60).nll_N.sum(),
            weight_VL,
        )[0]
        for impl in ("reference", "chunked")
    ]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


def test_ignored_targets_have_no_loss_and_no_gradient():
    head = Head(9, 12, 5)
    head.targets_N[:] = IGNORED
    out = head.losses(chunk_logits=30)
    assert not out.nll_N.any() and not out.correct_N.any()
    assert not any(gradient.any() for gradient in head.gradients(out.nll_N).values())


def test_no_tokens_give_no_losses_and_zero_gradients():
    head = Head(0, 12, 5)
    for impl in ("chunked", "reference", "auto"):
        out = head.losses(impl=impl)
        assert out.nll_N.shape == out.correct_N.shape == (0,)
        gradients = head.gradients(out.nll_N)
        assert gradients["weight"].shape == (12, 5) and not gradients["weight"].any(), impl


@pytest.mark.parametrize("target", [12, -1, 1 << 40])
def test_a_target_beyond_the_vocabulary_is_named(target):
    head = Head(9, 12, 5, ignored=False)
    head.targets_N[4] = target
    for impl in ("chunked", "reference"):
        with pytest.raises(ValueError, match=rf"target {target} of token 4 is none of the head's 12 words"):
            head.losses(impl=impl)


def test_shapes_and_settings_that_do_not_fit_are_named():
    h, w, t = torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.int64)
    for wrong, message in [
        ((torch.zeros(3, 6), w, t), r"hidden \[3, 6\], weight \[5, 4\]"),
        ((h, w, t[:2]), "one for each hidden state"),
        ((h, w, t.int()), "int32.*must be int64"),
    ]:
        with pytest.raises(ValueError, match=message):
            head_cross_entropy(*wrong)
    for how in ({"impl": "triton"}, {"chunk_logits": 0}, {"bias_V": torch.zeros(4)}):
        with pytest.raises(ValueError, match=next(iter(how)).split("_")[0]):
            head_cross_entropy(h, w, t, **how)
    with pytest.raises(ValueError, match=r"bfloat16.*float32"):
        head_cross_entropy(h.bfloat16(), w, t, impl="chunked")


def test_words_that_are_masked_out_and_huge_logits_do_not_spoil_the_rest():
    head = Head(6, 10, 4, ignored=False)
    with torch.no_grad():
        head.bias_V[3] = -torch.inf
        head.bias_V[5] += 1e5
    head.targets_N = torch.tensor([0, 1, 2, 4, 5, 3])  # the last one cannot be
    nll_N, gradients = head.by_torch()
    out = head.losses(chunk_logits=25)
    assert out.nll_N[5] == nll_N[5] == torch.inf
    torch.testing.assert_close(out.nll_N, nll_N, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(head.gradients(out.nll_N)["hidden"][:5], gradients["hidden"][:5], rtol=1e-9, atol=1e-9)


def test_correct_is_the_highest_logit_and_ignored_targets_never_are():
    head = Head(40, 6, 5)
    best_N = (head.hidden_NL @ head.weight_VL.T + head.bias_V).argmax(-1)
    head.targets_N = torch.where(torch.arange(40) % 3 == 0, best_N, head.targets_N)
    for impl in ("chunked", "reference"):
        out = head.losses(impl=impl, chunk_logits=20)
        assert torch.equal(out.correct_N, best_N == head.targets_N) and out.correct_N.any(), impl
        assert not out.correct_N.requires_grad


def test_autocast_multiplies_in_its_type_and_gives_gradients_in_the_weights():
    head = Head(33, 67, 16, dtype=torch.float32)

    def run(impl: str):
        with torch.autocast("cpu", torch.bfloat16):
            out = head.losses(impl=impl, chunk_logits=500)
        return {"nll": out.nll_N.detach()} | head.gradients(out.nll_N)

    reference, chunked = run("reference"), run("chunked")
    nll_N, gradients = head.by_torch(torch.float64)
    assert_as_exact(chunked, reference, {"nll": nll_N} | gradients)
    assert {value.dtype for value in chunked.values()} == {torch.float32}
    assert (chunked["nll"] - nll_N).abs().max() > 1e-3  # or nothing was cast


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
    N, V, L, chunk_logits = 300, 1000, 4, 8000
    head = Head(N, V, L, bias=False)
    head.weight_VL.requires_grad_(learns)
    with LargestTensor() as reference:
        head.gradients(head.losses(impl="reference").nll_N)
    with LargestTensor() as chunked:
        head.gradients(head.losses(chunk_logits=chunk_logits).nll_N)
    assert reference.elements == N * V
    assert chunked.elements <= max(chunk_logits, V * L)


def test_a_frozen_head_keeps_one_gradient_of_the_hidden_states_and_nothing_without_grad():
    head = Head(50, 200, 4, bias=False)
    head.weight_VL.requires_grad_(False)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda nothing: None):
        head.losses(chunk_logits=1000)
        assert sum(kept) <= 50 * 4 + 50, kept
        kept.clear()
        with torch.no_grad():
            assert not head.losses(chunk_logits=1000).nll_N.requires_grad
    assert not kept


def test_without_grad_only_one_product_is_computed():
    head = Head(50, 200, 4, bias=False)
    counted = FlopCounterMode(display=False)
    with counted, torch.no_grad():
        head.losses(chunk_logits=1000)
    assert counted.get_total_flops() == 2 * 50 * 200 * 4


def test_it_gives_the_same_bits_every_time():
    head = Head(61, 331, 24, dtype=torch.float32)
    runs = [head.losses(chunk_logits=2000).nll_N for _ in range(3)]
    gradients = [head.gradients(run) for run in runs]
    for run, found in zip(runs[1:], gradients[1:]):
        assert torch.equal(run, runs[0])
        assert all(torch.equal(found[name], gradients[0][name]) for name in found)


def test_auto_takes_chunks_only_where_there_is_more_than_one():
    head = Head(20, 50, 4, bias=False)
    for chunk_logits, largest in ((20 * 50, 20 * 50), (20 * 50 - 1, 20 * 50 - 50)):
        with LargestTensor() as seen:
            head.losses(impl="auto", chunk_logits=chunk_logits)
        assert seen.elements == largest


def test_shapes_without_values_are_enough():
    hidden_NL = torch.empty(9, 4, device="meta", requires_grad=True)
    weight_VL = torch.empty(30, 4, device="meta", requires_grad=True)
    targets_N = torch.empty(9, dtype=torch.int64, device="meta")
    out = head_cross_entropy(hidden_NL, weight_VL, targets_N, impl="chunked", chunk_logits=50)
    out.nll_N.sum().backward()
    assert out.nll_N.shape == (9,) and weight_VL.grad.shape == (30, 4)
