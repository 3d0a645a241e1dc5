"""A finished block put into another model gives the same bits, and ranks agree on what is kept."""

import json

import pytest
import torch
from packed_layers import nearest
from streamed_models import make_llm, token_batches
from thread_ranks import on_ranks

from seedling.quant.blocks import quantisable
from seedling.quant.kept_blocks import finished_block, install_block, kept_for_all
from seedling.quant.linear import PackedLinear
from seedling.quant.packed_model import packed_modules, replace_module
from seedling.quant.ranks import Alone

BLOCK = "model.layers.1"


def finished():
    """A model with one block packed in two forms, and its norms moved as refinement does."""
    model = make_llm("qwen2")
    for number, (name, one) in enumerate(quantisable(model, BLOCK).items()):
        solution = nearest(one.weight.detach(), bits=2 + number % 2, group_size=16)
        replace_module(model, name, PackedLinear.from_solution(solution, bias=one.bias))
    with torch.no_grad():
        model.get_submodule(BLOCK).input_layernorm.weight.mul_(1.1)
    return model


def test_a_kept_block_is_the_same_in_a_model_in_full_precision():
    model, fresh = finished(), make_llm("qwen2")
    tensors, matrices = finished_block(model, BLOCK)
    install_block(fresh, BLOCK, tensors, json.loads(json.dumps(matrices)))
    assert packed_modules(fresh).keys() == packed_modules(model).keys() and len(packed_modules(fresh)) == 7
    state = fresh.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    (batch,) = token_batches(1)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, fresh(**batch).logits)
    assert not any(p.requires_grad for one in packed_modules(fresh).values() for p in one.parameters())


def test_what_is_kept_is_a_copy():
    model = finished()
    tensors, _ = finished_block(model, BLOCK)
    before = tensors["input_layernorm.weight"].clone()
    with torch.no_grad():
        model.get_submodule(BLOCK).input_layernorm.weight.zero_()
    assert torch.equal(tensors["input_layernorm.weight"], before)


class Folder(dict):
    def load(self, name):
        return self.get(name)


@pytest.mark.parametrize("there", [True, False])
def test_rank_0_says_for_all_what_is_kept(there):
    """The other rank already sees a file that rank 0 did not find when it looked."""
    found = ({"x": torch.ones(2)}, {})

    def run(ranks):
        return kept_for_all(Folder({"block": found} if there or ranks.rank else {}), "block", ranks)

    for one in on_ranks(2, run):
        assert (one is not None) == there


def test_where_nothing_is_kept_nothing_is_found():
    assert kept_for_all(None, "block", Alone()) is None
    assert kept_for_all(Folder(), "block", Alone()) is None
