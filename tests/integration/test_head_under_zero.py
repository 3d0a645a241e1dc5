"""Losses by chunks under DeepSpeed: the weights that whole logits train, and at ZeRO 3 the head's own call."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from seedling.kernels.head_cross_entropy import head_cross_entropy
from seedling.model import target_losses as target_losses_file
from seedling.model.prompt import AnswerTargets
from seedling.stages.runtime.world import import_deepspeed, init_world

TARGETS = AnswerTargets(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 4, 0, 3]), torch.tensor([7, 1, 9, 299]))
SHAPE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}


class Loss(nn.Module):
    def __init__(self, llm: LlamaForCausalLM):
        super().__init__()
        self.llm = llm

    def forward(self, ids_BT: Tensor) -> Tensor:
        embeddings_BTL = self.llm.get_input_embeddings()(ids_BT)
        return target_losses_file.target_losses(self.llm, embeddings_BTL, TARGETS).nll_N.sum()


@pytest.fixture(scope="module")
def llm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS))


def trained(llm: LlamaForCausalLM, *, zero_stage: int, bf16: bool) -> list[Tensor]:
    """Return the weights after three steps."""
    init_world()
    deepspeed, loss = import_deepspeed(), Loss(copy.deepcopy(llm))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=loss, optimizer=torch.optim.SGD(loss.parameters(), lr=0.1), config=config)
    for _ in range(3):
        engine.backward(engine(torch.arange(10).view(2, 5)))
        engine.step()
    parameters = list(loss.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=zero_stage == 3):
        return [parameter.detach().float().clone() for parameter in parameters]


@pytest.mark.parametrize("zero_stage, bf16", [(0, False), (1, True), (2, False), (3, False)])
def test_chunks_train_what_whole_logits_train(zero_stage, bf16, llm, monkeypatch):
    found, calls = {}, []

    def losses(*args, impl: str, **how):
        calls.append(impl)
        return head_cross_entropy(*args, impl=impl, chunk_logits=600, **how)

    for impl in ("reference", "chunked"):
        monkeypatch.setattr(target_losses_file, "head_cross_entropy", partial(losses, impl=impl))
        found[impl] = trained(llm, zero_stage=zero_stage, bf16=bf16)
    assert calls == ([] if zero_stage == 3 else ["reference"] * 3 + ["chunked"] * 3)
    before = [parameter.detach() for parameter in llm.parameters()]
    assert any((now - then).abs().max() > 1e-2 for now, then in zip(found["chunked"], before))
    for ours, theirs in zip(found["chunked"], found["reference"]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 if bf16 else 1e-5)
