"""Parts and blocks: the layers of every family in order, and what in them can be quantised."""

import pytest
import torch
from streamed_models import CONFIGS, make_llm, make_recogniser, speech_batches
from torch import nn

from seedling.quant.blocks import decoder_layers, parts_of, quantisable
from seedling.quant.door import capture

ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_decoder_layers_of_a_family_are_found(family):
    llm = make_llm(family)
    (part,) = parts_of(llm)
    assert part.blocks == ["model.layers.0", "model.layers.1"]
    inside = {name.removeprefix("model.layers.1.") for name in quantisable(llm, "model.layers.1")}
    dense = family not in ("mixtral", "qwen3_moe")
    assert inside == ATTENTION | (MLP if dense else {"mlp.experts"})


def test_a_recogniser_has_three_parts_and_leaves_the_rest_alone():
    model = make_recogniser()
    parts = parts_of(model)
    assert [(part.name, part.by_default) for part in parts] == [("encoder", True), ("converter", False), ("llm", True)]
    assert [part.blocks for part in parts] == [
        ["encoder.layers.0", "encoder.layers.1"],
        ["converter.proj"],
        ["llm.model.layers.0", "llm.model.layers.1"],
    ]
    assert list(quantisable(model, "converter.proj")) == ["converter.proj"]
    names = {name for part in parts for block in part.blocks for name in quantisable(model, block)}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    left = {name.split(".")[0] + "." + name.split(".")[1] for name in linear - names}
    assert left == {"encoder.subsampling", "ctc_head.proj", "llm.lm_head"}


def test_a_subclass_of_linear_is_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, 2 * self.weight, self.bias)

    model = nn.Sequential(nn.Sequential(Doubled(3, 3), nn.Linear(3, 3)))
    assert list(quantisable(model, "0")) == ["0.1"]


def test_a_model_without_a_list_of_decoder_layers_is_refused():
    llm = make_llm("llama")
    llm.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="no ModuleList of 7 decoder layers"):
        decoder_layers(llm)


def test_the_mask_at_a_door_covers_the_valid_positions():
    model, batch = make_recogniser(), speech_batches(1)[0]
    with torch.no_grad():
        speech = model.encode_speech(batch.waveforms_BN, batch.lengths_B)
        _, lengths = model.embed(speech, transcripts_ids=batch.transcripts_ids)
        wanted = {
            "encoder": speech.encoder_lengths_B.tolist(),
            "converter": speech.lengths_B.tolist(),
            "llm": lengths,
        }
        for part in parts_of(model):
            captured = capture(model, part.blocks, part.start(batch))
            masks = [captured.surroundings[block].valid_BT for block in part.blocks]
            assert all(mask.sum(1).tolist() == wanted[part.name] for mask in masks), part.name
            assert masks[0].shape == captured.hidden_BTD.shape[:2]


def test_what_several_blocks_are_called_with_is_kept_once():
    model, batch = make_recogniser(), speech_batches(1)[0]
    part = parts_of(model)[0]
    with torch.no_grad():
        around = capture(model, part.blocks, part.start(batch)).surroundings
    first, second = (around[block].args for block in part.blocks)
    assert first[0] is second[0] and first[1][0] is second[1][0]


def test_layers_of_different_kinds_keep_their_own_masks():
    """Gemma 2's first layer sees a window of 4 positions, its second all before it."""
    model = make_llm("gemma2")
    (part,) = parts_of(model)
    batch = {"input_ids": torch.arange(2, 12)[None]}
    around = capture(model, part.blocks, part.start(batch)).surroundings
    seen = [around[block].kwargs["attention_mask"][0, 0] > -1 for block in part.blocks]
    assert seen[0].sum(1).tolist() == [min(t + 1, 4) for t in range(10)]
    assert seen[1].sum(1).tolist() == [t + 1 for t in range(10)]
