"""Where batches stand between blocks, against whole forward passes with hooks, and what lies between two blocks."""

import torch
from streamed_models import make_llm, reader, token_batches
from thread_ranks import on_ranks

from seedling.quant.activations import ActivationStore
from seedling.quant.blocks import Part, parts_of
from seedling.quant.streams import Stream, touched, within
from seedling.quant.targets import Target


def inputs_of(model, name, batches):
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    hook.remove()
    return seen


def stream_of(model, batches, folder, **ranks):
    (part,) = parts_of(model)
    store = ActivationStore(folder, "llm", limit_bytes=0)
    return Stream.at_the_door(model, part, part.blocks, reader(batches, **ranks), store=store), part.blocks


def test_a_stream_advances_block_by_block_as_the_whole_model_does(tmp_path):
    model, batches = make_llm("llama", layers=3), token_batches(3)
    stream, blocks = stream_of(model, batches, tmp_path)
    for block in blocks:
        found = stream.inputs(block)
        assert found.batches == [0, 1, 2]
        for given, expected, batch in zip(found, inputs_of(model, block, batches), batches):
            torch.testing.assert_close(given.args[0], expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(given.valid_BT, batch["attention_mask"].bool())
        stream.advance(block)


def test_what_lies_behind_a_block_is_another_stream_and_this_one_stays_before_it(tmp_path):
    model, batches = make_llm("llama", layers=3), token_batches(2)
    stream, blocks = stream_of(model, batches, tmp_path)
    behind = stream.behind(blocks[0], store=ActivationStore(tmp_path, "other", limit_bytes=1e9))
    expected = [inputs_of(model, block, batches) for block in blocks]
    for at in range(2):
        torch.testing.assert_close(stream.hidden(blocks[0])[at], expected[0][at], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(behind.hidden(blocks[1])[at], expected[1][at], rtol=1e-6, atol=1e-6)


def test_the_batches_of_all_ranks_come_in_their_order_whoever_had_them(tmp_path):
    models, batches = [make_llm("llama") for _ in range(2)], token_batches(5)
    expected = inputs_of(models[0], "model.layers.0", batches)

    def run(ranks):
        stream, blocks = stream_of(models[ranks.rank], batches, tmp_path, rank=ranks.rank, size=2)
        own = stream.numbers
        ranks.barrier()
        every = stream.of_all_ranks(blocks[0], ranks).inputs(blocks[0])
        return own, every.batches, [(given.args[0], given.valid_BT) for given in every]

    for rank, (own, numbers, found) in enumerate(on_ranks(2, run)):
        assert own == list(range(rank, 5, 2)) and numbers == [0, 1, 2, 3, 4]
        for (hidden, valid), wanted, batch in zip(found, expected, batches):
            torch.testing.assert_close(hidden, wanted, rtol=1e-6, atol=1e-6)
            assert torch.equal(valid, batch["attention_mask"].bool())


def test_a_part_is_run_from_its_first_block_with_something_to_do_to_its_last():
    part = Part("llm", [f"l.{number}" for number in range(12)], True, lambda batch: batch)
    targets = {name: Target(2, 64) for name in ("l.1.q", "l.10.k", "l.10.v", "l.3", "other.l.0")}
    assert touched(part, targets) == [f"l.{number}" for number in range(1, 11)]
    assert touched(part, {"other.l.0": Target(2, 64)}) == []
    assert list(within(targets, "l.1")) == ["l.1.q"] and list(within(targets, "l.3")) == ["l.3"]
    assert list(within(targets, "l.10")) == ["l.10.k", "l.10.v"]
