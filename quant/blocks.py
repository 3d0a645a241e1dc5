"""The parts of a model that can be quantised, and the blocks of each in the order in which activations pass them.

A recogniser has three parts: its encoder's Conformer layers, the converter (whose one linear layer is a block of its
own) and the LLM's decoder layers; a speech encoder and a causal LM have one. Decoder layers are found by structure, so
that any Hugging Face causal LM will do. Embeddings, output head, features, subsampling and CTC head lie in no block.
Shape letters: B utterances, N samples, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..model.audio_llm import AudioLLM
from ..model.speech_encoder import SpeechEncoder
from .expert_layout import fused_experts, routing_layers


class Start(NamedTuple):
    """`run` takes one calibration batch through a part; of its positions those count that `valid` says.

    `valid` is a boolean mask [B, T], lengths [B] where padding is on the right, or None where there is no padding.
    """

    run: Callable[[], Any]
    valid: Tensor | None


class Part(NamedTuple):
    """`blocks` are module names; `start` makes a calibration batch ready to run."""

    name: str
    blocks: list[str]
    by_default: bool  # whether it is quantised where no rule says anything
    start: Callable[[Any], Start]


class SpeechPrompts(NamedTuple):
    """A calibration batch of a recogniser: as in training, the transcript is part of what the LLM reads."""

    waveforms_BN: Tensor
    lengths_B: Tensor
    transcripts_ids: list[list[int]]
    contexts_ids: list[list[int] | None] | None = None
    languages: list[str | None] | None = None


def parts_of(model: nn.Module) -> list[Part]:
    """Return the parts of a model in the order in which speech passes them.

    Calibration batches are SpeechPrompts for a recogniser and for a speech encoder, and for a causal LM the dict of
    what it is called with (input_ids, attention_mask).
    """
    if isinstance(model, AudioLLM):
        return _recogniser_parts(model)
    if isinstance(model, SpeechEncoder):
        return [_encoder_part(model, lambda batch: model(batch.waveforms_BN, batch.lengths_B))]
    return [Part("llm", _named(model, decoder_layers(model)), True, lambda batch: _start_llm(model, batch))]


def _recogniser_parts(model: AudioLLM) -> list[Part]:
    def start_converter(batch: SpeechPrompts) -> Start:
        lengths_B = model.encoder.output_lengths(model.fbank.output_lengths(batch.lengths_B))
        return Start(
            lambda: model.encode_speech(batch.waveforms_BN, batch.lengths_B), model.converter.output_lengths(lengths_B)
        )

    def start_llm(batch: SpeechPrompts) -> Start:
        speech = model.encode_speech(batch.waveforms_BN, batch.lengths_B)
        embeddings_BTL, lengths = model.embed(
            speech, batch.contexts_ids, batch.languages, transcripts_ids=batch.transcripts_ids
        )
        decoder = model.llm.get_decoder()
        return Start(
            lambda: decoder(inputs_embeds=embeddings_BTL, use_cache=False), batch.lengths_B.new_tensor(lengths)
        )

    return [
        _encoder_part(model, lambda batch: model.encode_speech(batch.waveforms_BN, batch.lengths_B)),
        Part("converter", _named(model, [model.converter.proj]), False, start_converter),
        Part("llm", _named(model, decoder_layers(model.llm)), True, start_llm),
    ]


def _encoder_part(model: AudioLLM | SpeechEncoder, run: Callable[[SpeechPrompts], Any]) -> Part:
    def start(batch: SpeechPrompts) -> Start:
        lengths_B = model.encoder.output_lengths(model.fbank.output_lengths(batch.lengths_B))
        return Start(lambda: run(batch), lengths_B)

    return Part("encoder", _named(model, model.encoder.layers), True, start)


def _start_llm(model: nn.Module, batch: dict[str, Tensor]) -> Start:
    mask_BT = batch.get("attention_mask")
    return Start(lambda: model(**batch, use_cache=False), None if mask_BT is None else mask_BT.bool())


def decoder_layers(llm: nn.Module) -> Sequence[nn.Module]:
    """Return the decoder layers of a Hugging Face causal LM; ValueError where its structure does not show them."""
    wanted = llm.config.get_text_config().num_hidden_layers
    lists = [m for m in llm.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == wanted]
    if not lists:
        raise ValueError(
            f"{type(llm).__name__}: no ModuleList of {wanted} decoder layers (num_hidden_layers) lies in it; such an "
            "LLM cannot be quantised block by block"
        )
    return lists[0]


def _named(model: nn.Module, blocks: Sequence[nn.Module]) -> list[str]:
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(block)] for block in blocks]


def quantisable(model: nn.Module, block: str) -> dict[str, nn.Module]:
    """Return what can be quantised in a block by its full name: linear layers, and modules of fused experts.

    Only nn.Linear itself: a subclass may do something else with its weight than multiply. What only routes tokens to
    experts stays as it is.
    """
    module = model.get_submodule(block)
    experts, routing = fused_experts(module), routing_layers(module)
    found = {
        name: m
        for name, m in module.named_modules()
        if name in experts or (type(m) is nn.Linear and name not in routing)
    }
    return {f"{block}.{name}" if name else block: m for name, m in found.items()}
