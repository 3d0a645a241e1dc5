"""A causal LM as the search's step scorer: one row of its key-value cache per beam.

Prefixes are padded on the left, so that all rows end together.
Shape letters: R rows, P prefix positions, T positions in the cache, L LLM width, V vocabulary.
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import PreTrainedModel

from .llm import logits_at


class RowScorer:
    """A causal LM with its key-value cache. Prefixes are padded on the left: all rows end together."""

    def __init__(self, llm: PreTrainedModel):
        self.llm = llm
        self.cache: DynamicCache
        self.length_R: Tensor
        self.mask_RT: Tensor | None = None  # None: no row is padded

    def start(self, prefixes: list[Tensor]) -> Tensor:
        longest = max(len(prefix) for prefix in prefixes)
        device = prefixes[0].device
        embeddings_RTL = torch.stack([_pad_left(prefix, longest) for prefix in prefixes])
        self.length_R = torch.tensor([len(prefix) for prefix in prefixes], device=device)
        ragged = any(len(prefix) != longest for prefix in prefixes)
        position_T = torch.arange(longest, device=device)
        self.mask_RT = (position_T >= longest - self.length_R[:, None]).long() if ragged else None
        self.cache = DynamicCache(config=self.llm.config.get_text_config())
        position_RT = (position_T - (longest - self.length_R[:, None])).clamp(min=0)
        return self._forward(embeddings_RTL, position_RT)

    def step(self, tokens_R: Tensor) -> Tensor:
        if self.mask_RT is not None:
            self.mask_RT = torch.nn.functional.pad(self.mask_RT, (0, 1), value=1)
        position_R1 = self.length_R[:, None]
        self.length_R = self.length_R + 1
        return self._forward(self.llm.get_input_embeddings()(tokens_R[:, None]), position_R1)

    def select(self, rows_R: Tensor) -> None:
        self.cache.reorder_cache(rows_R)
        self.length_R = self.length_R[rows_R]
        if self.mask_RT is not None:
            self.mask_RT = self.mask_RT[rows_R]

    def _forward(self, embeddings_RTL: Tensor, position_RT: Tensor) -> Tensor:
        R, T, _ = embeddings_RTL.shape
        row_R = torch.arange(R, device=embeddings_RTL.device)
        logits_RV, _ = logits_at(
            self.llm,
            embeddings_RTL,
            rows_N=row_R,
            columns_N=torch.full_like(row_R, T - 1),
            attention_mask=self.mask_RT,
            # Rows without padding need no positions either: the cache's length gives them.
            position_ids=None if self.mask_RT is None else position_RT,
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits_RV.float().log_softmax(-1)


def _pad_left(prefix_PL: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(prefix_PL, (0, 0, length - len(prefix_PL), 0))


def llm_scorer(llm: PreTrainedModel) -> RowScorer:
    """Return the step scorer of a causal LM."""
    return RowScorer(llm)
