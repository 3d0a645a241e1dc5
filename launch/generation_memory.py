"""Keys and values that an LLM keeps while hypotheses are made: measured on fake tensors, for the rows and lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..model.llm import token_embeddings
from ..stages.runtime.allocations import Allocations

MEASURED = 16  # positions, enough to tell a cache that grows from one that does not


def cache_bytes_per_position(llm: nn.Module) -> float:
    """Return the bytes that one position of one row adds to the cache of an LLM on fake tensors."""
    weight = token_embeddings(llm).weight
    with torch.no_grad(), Allocations(llm.parameters()) as memory:
        embeddings_BTL = weight.new_zeros(1, MEASURED, weight.shape[1])
        out = llm.get_decoder()(inputs_embeds=embeddings_BTL, use_cache=True)
        cache = out.past_key_values
        del out, embeddings_BTL
        held = memory.live
    assert cache is not None, f"{type(llm).__name__} keeps no cache"
    return held / MEASURED


def generation_bytes(model: nn.Module, cfg: Any, batch: Any) -> int:
    """Return the bytes of the cache while the hypotheses of a batch are searched; 0 for stages that make none.

    Every hypothesis has a row, as long as the prompt and the most tokens that the decoding settings allow.
    """
    if not hasattr(cfg, "nbest"):
        return 0
    seconds = int(batch.lengths_B.max()) / batch.sample_rate
    tokens = model.prompt_tokens
    around = len(tokens.before_speech(None, None)) + len(tokens.after)
    frames = model.encoder.output_lengths(model.fbank.output_lengths(batch.lengths_B.max()[None]))
    speech = -(-int(frames) // model.converter.stride)
    positions = around + speech + model.decode_config.limit(seconds=seconds)
    return int(len(batch) * cfg.nbest.size * positions * cache_bytes_per_position(model.llm))
