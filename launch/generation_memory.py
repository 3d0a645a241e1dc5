"""Keys and values that an LLM keeps while hypotheses are made: measured on fake tensors, for the rows and lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..model.llm import token_embeddings
from ..model.llm_scorer import takes_trees
from ..stages.runtime.allocations import Allocations

MEASURED = 16  # positions, enough to tell a cache that grows from one that does not


def cache_bytes_per_position(llm: nn.Module, *, autocast: bool) -> float:
    """Return the bytes that one position of one row adds to the cache of an LLM on fake tensors.

    Under autocast keys and values come in the type of their products, whatever that of the weights is.
    """
    weight = token_embeddings(llm).weight
    # Without the copies of weights that autocast keeps: they are no part of the cache.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
        with Allocations(llm.parameters()) as memory:
            embeddings_BTL = weight.new_zeros(1, MEASURED, weight.shape[1])
            out = llm.get_decoder()(inputs_embeds=embeddings_BTL, use_cache=True)
            cache = out.past_key_values
            del out, embeddings_BTL
            held = memory.live
    assert cache is not None, f"{type(llm).__name__} keeps no cache"
    return held / MEASURED


def generation_bytes(stage: Any, model: nn.Module, cfg: Any, batch: Any) -> int:
    """Return the bytes of the cache while the hypotheses of a batch are searched; 0 for stages that make none.

    Each hypothesis has as many tokens as the decoding settings allow. Where the LLM can share it, an utterance's prompt
    is kept once, else for each of its hypotheses; all are as long as the longest prompt of the batch, context included.
    Joint search keeps a second row, without the context, for each utterance that has one.
    """
    if not hasattr(cfg, "nbest"):
        return 0
    beam = cfg.nbest.draw == "beam"
    config = cfg.nbest.search(model.decode_config) if beam else model.decode_config
    hypotheses = config.beam_size if beam else cfg.nbest.size
    prompts = stage.prompts(batch)
    contexts = prompts.contexts_ids or [None] * len(batch)
    longest = max(
        len(model.prompt_tokens.before_speech(context, language))
        for context, language in zip(contexts, prompts.languages or [None] * len(batch))
    )
    prompt = longest + len(model.prompt_tokens.after) + _speech_positions(model, batch)
    tokens = config.limit(seconds=int(batch.lengths_B.max()) / batch.sample_rate)
    rows = len(batch) + (sum(map(bool, contexts)) if beam and config.context_search == "joint" else 0)
    positions = prompt + hypotheses * tokens if takes_trees(model.llm) else hypotheses * (prompt + tokens)
    per_position = cache_bytes_per_position(model.llm, autocast=cfg.train.precision != "fp32")
    return int(rows * positions * per_position)


def _speech_positions(model: nn.Module, batch: Any) -> int:
    """Return the positions of the longest utterance's speech."""
    frames = model.encoder.output_lengths(model.fbank.output_lengths(batch.lengths_B.max()[None]))
    return -(-int(frames) // model.converter.stride)
