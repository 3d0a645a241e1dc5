"""Losses of target tokens under an LM: those of its logits, whichever way its head is computed."""

from functools import partial

import pytest
import torch
from torch import nn

from seedling.kernels.head_cross_entropy import head_cross_entropy
from seedling.model import target_losses as target_losses_file
from seedling.model.llm import LoraSettings, add_lora, logits_at
from seedling.model.prompt import AnswerTargets
from seedling.model.target_losses import is_only_a_product, target_losses

PLAIN = ["qwen2", "llama", "mixtral"]
AFTER_HEAD = ["gemma2", "granite", "cohere"]
TARGETS = AnswerTargets(torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1, 4, 0, 3, 4]), torch.tensor([7, 1, 9, 299, 1]))


@pytest.fixture
def in_chunks(monkeypatch):
    """Two tokens' logits at a time: the tiny LMs have fewer than a chunk."""
    chunked = partial(head_cross_entropy, impl="chunked", chunk_logits=600)
    monkeypatch.setattr(target_losses_file, "head_cross_entropy", chunked)


def embeddings(llm) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8, 9], [15, 16, 17, 18, 19]])
    return llm.get_input_embeddings()(ids).detach().requires_grad_()


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("family", PLAIN + AFTER_HEAD)
def test_losses_and_gradients_are_those_of_the_logits(family, learns, tiny_llm, in_chunks):
    llm = tiny_llm(family).requires_grad_(learns)
    embedded_BTL = embeddings(llm)
    wanted = [embedded_BTL, *(p for p in llm.parameters() if p.requires_grad)]
    logits_NV, _ = logits_at(llm, embedded_BTL, rows_N=TARGETS.rows_N, columns_N=TARGETS.columns_N, use_cache=False)
    expected = nn.functional.cross_entropy(logits_NV, TARGETS.tokens_N, reduction="none")
    losses = target_losses(llm, embedded_BTL, TARGETS)
    torch.testing.assert_close(losses.nll_N, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(losses.correct_N, logits_NV.argmax(-1) == TARGETS.tokens_N)
    assert losses.logits_NV is None
    gradients = [
        torch.autograd.grad(nll_N.square().sum(), wanted, allow_unused=True) for nll_N in (losses.nll_N, expected)
    ]
    for ours, theirs in zip(*gradients):
        assert (ours is None) == (theirs is None)  # the table of an LM that ties nothing
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", PLAIN)
def test_a_plain_head_is_not_called_unless_logits_are_asked_for(family, tiny_llm, monkeypatch):
    llm, calls = tiny_llm(family), []
    product = nn.functional.linear
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: calls.append(self) or product(x, self.weight, self.bias))
    target_losses(llm, embeddings(llm), TARGETS)
    assert llm.get_output_embeddings() not in calls
    logits_NV = target_losses(llm, embeddings(llm), TARGETS, return_logits=True).logits_NV
    assert llm.get_output_embeddings() in calls and logits_NV.shape == (5, 300)


@pytest.mark.parametrize("family", PLAIN + AFTER_HEAD)
def test_logits_are_given_as_the_product_that_they_are_or_as_they_are(family, tiny_llm):
    llm = tiny_llm(family)
    wanted_NV = target_losses(llm, embeddings(llm), TARGETS, return_logits=True).logits_NV
    losses = target_losses(llm, embeddings(llm), TARGETS, return_product=True)
    assert (losses.logits_NV is None) == (family in PLAIN) == (losses.product is not None)
    found_NV = losses.logits_NV if losses.product is None else losses.product.logits()
    torch.testing.assert_close(found_NV, wanted_NV)


def test_a_hook_on_the_head_runs(tiny_llm):
    llm, seen = tiny_llm(), []
    head = llm.get_output_embeddings()
    assert is_only_a_product(llm, head)
    for register in (head.register_forward_pre_hook, head.register_forward_hook, head.register_full_backward_hook):
        handle = register(lambda *what: seen.append(what))
        target_losses(llm, embeddings(llm), TARGETS).nll_N.sum().backward()
        handle.remove()
        assert len(seen) == 1, register
        seen.clear()


def test_a_forward_that_was_put_in_the_place_of_the_heads_runs(tiny_llm):
    llm, calls = tiny_llm(), []
    head = llm.get_output_embeddings()
    product = head.forward
    head.forward = lambda x: calls.append(x) or product(x)
    target_losses(llm, embeddings(llm), TARGETS)
    assert len(calls) == 1 and not is_only_a_product(llm, head)


def test_adapters_on_the_head_take_part(tiny_llm, in_chunks):
    llm = tiny_llm("mixtral")
    before = target_losses(llm, embeddings(llm), TARGETS).nll_N
    add_lora(llm, LoraSettings(r=2, target_modules=["lm_head"]))
    with torch.no_grad():
        for name, parameter in llm.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    assert not is_only_a_product(llm, llm.get_output_embeddings())
    assert not torch.allclose(target_losses(llm, embeddings(llm), TARGETS).nll_N, before)
