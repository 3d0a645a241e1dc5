"""A causal LM as the search's step scorer, in two ways with equal results.

`TreeScorer`: the beams of an utterance are query positions of one row ("tree attention"). The prompt's keys and values
are stored once, a step appends one column per beam, and a mask says which columns a beam sees: its prompt and its own
ancestors. To choose beams is to choose rows of that mask; the cache is not touched until an utterance leaves.

`RowScorer`: a row of the cache per beam, copied at every step. For LMs that cannot take such a mask, see `takes_trees`.

Prompts are padded on the left. Those of very different lengths, as with and without a context, are read in groups.
Shape letters: R rows of the search, U utterances (prompts) in the cache, Q beams of the widest utterance, P prompt
positions, T columns in the cache, L LLM width, V vocabulary.
"""

import inspect
from collections import Counter

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import PreTrainedModel

from .decoding import StepScorer
from .llm import logits_at
from .tree_cache import ROOM, TreeCache

GROUP_SPREAD = 0.6  # a prompt shorter than this share of the longest in its group begins a group of its own
STEPS_OF_ROOM = 16  # that a cache has after it was thinned out


def llm_scorer(llm: PreTrainedModel) -> StepScorer:
    """Return the fastest step scorer that is right for this LM."""
    return TreeScorer(llm) if takes_trees(llm) else RowScorer(llm)


def takes_trees(llm: PreTrainedModel) -> bool:
    """Whether each query may be given its own set of columns and its own position.

    Not with sliding windows (GPT-Neo keeps them from its cache: `attention_types`), recurrent layers or any other cache
    than plain columns, with attention that takes no mask (flash attention), or where columns stand for positions
    (ALiBi, an LM that takes no `position_ids`).
    """
    config = llm.config.get_text_config()
    plain_columns = all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    takes_positions = "position_ids" in inspect.signature(llm.get_decoder().forward).parameters
    masked = config._attn_implementation in ("sdpa", "eager")
    of_its_own = getattr(config, "alibi", False) or hasattr(config, "attention_types")
    return plain_columns and takes_positions and masked and not of_its_own


def attention_mask(llm: PreTrainedModel, seen_BQT: Tensor) -> Tensor:
    """Return the mask as the LM takes it: True where a query looks, or 0 there and the least number elsewhere."""
    if llm.config.get_text_config()._attn_implementation == "sdpa":
        return seen_BQT[:, None]
    least = torch.finfo(llm.dtype).min
    return torch.zeros_like(seen_BQT, dtype=llm.dtype).masked_fill(~seen_BQT, least)[:, None]


class TreeScorer:
    """Rows of an utterance share its prompt's cache. Any number of rows per utterance, not the same for all."""

    def __init__(self, llm: PreTrainedModel):
        self.llm = llm
        self.cache: TreeCache
        self.position_R: Tensor
        self.seen_RT: Tensor  # which columns of its utterance a row attends to
        self.utterances: list[int] = []  # a row's utterance, as a row of the cache; also as a tensor
        self.utterance_R: Tensor
        self.slot_R: Tensor  # a row's query position in its utterance
        self.slots = 1

    def start(self, prefixes: list[Tensor]) -> Tensor:
        groups = groups_by_length([len(prefix) for prefix in prefixes])
        read = [read_prompts(self.llm, [prefixes[i] for i in group]) for group in groups]
        self.cache = self._cache_of([cache for _, cache in read])
        device, T = prefixes[0].device, self.cache.columns
        order = torch.tensor([i for group in groups for i in group], device=device).argsort()
        self.position_R = torch.tensor([len(prefix) for prefix in prefixes], device=device)
        self.seen_RT = torch.arange(T, device=device) >= T - self.position_R[:, None]
        self._seat(order.tolist())
        return torch.cat([log_probs for log_probs, _ in read])[order]

    def step(self, tokens_R: Tensor) -> Tensor:
        U, Q = self.cache.rows, self.slots
        if not self.cache.has_room(Q):
            self._thin_out()
        seat = self.utterance_R, self.slot_R
        tokens_UQ, position_UQ = tokens_R.new_zeros(U, Q), tokens_R.new_zeros(U, Q)
        tokens_UQ[seat], position_UQ[seat] = tokens_R, self.position_R
        own_RQ = self.slot_R[:, None] == torch.arange(Q, device=tokens_R.device)
        self.seen_RT = torch.cat([self.seen_RT, own_RQ], dim=1)
        # A seat without a row sees everything: what it computes is never read, but must not be NaN.
        mask_UQT = self.seen_RT.new_ones(U, Q, self.seen_RT.shape[1])
        mask_UQT[seat] = self.seen_RT
        logits_RV = self._logits(tokens_UQ, position_UQ, mask_UQT)
        self.position_R = self.position_R + 1
        return logits_RV.float().log_softmax(-1)

    def select(self, rows_R: Tensor) -> None:
        self.seen_RT, self.position_R = self.seen_RT[rows_R], self.position_R[rows_R]
        utterances = [self.utterances[row] for row in rows_R.tolist()]
        if utterances == self.utterances:
            return
        kept = sorted(set(utterances))
        if len(kept) < self.cache.rows:
            moved = self.cache.keep(kept)
            utterances = [moved[utterance] for utterance in utterances]
        self._seat(utterances)

    def _cache_of(self, groups: list[DynamicCache]) -> TreeCache:
        return TreeCache(groups)

    def _logits(self, tokens_UQ: Tensor, position_UQ: Tensor, mask_UQT: Tensor) -> Tensor:
        """Append the tokens' columns to the cache; return logits_RV of what follows them."""
        logits_RV, _ = logits_at(
            self.llm,
            self.llm.get_input_embeddings()(tokens_UQ),
            rows_N=self.utterance_R,
            columns_N=self.slot_R,
            attention_mask=attention_mask(self.llm, mask_UQT),
            position_ids=position_UQ,
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits_RV

    def _seat(self, utterances: list[int]) -> None:
        """Give every row a query position in its utterance's row of the cache."""
        taken: Counter[int] = Counter()
        slots = []
        for utterance in utterances:
            slots.append(taken[utterance])
            taken[utterance] += 1
        self.utterances, self.slots = utterances, max(taken.values())
        device = self.position_R.device
        self.utterance_R, self.slot_R = torch.tensor(utterances, device=device), torch.tensor(slots, device=device)

    def _thin_out(self) -> None:
        """Drop the columns that no row sees."""
        live_UT = self.seen_RT.new_zeros(self.cache.rows, self.seen_RT.shape[1], dtype=torch.int)
        live_UT = live_UT.index_add(0, self.utterance_R, self.seen_RT.int()) > 0
        most = int(live_UT.sum(1).max())
        columns_UT = live_UT.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        self.cache.thin_out(columns_UT, room=max(ROOM, STEPS_OF_ROOM * self.slots))
        self.seen_RT = self.seen_RT.gather(1, columns_UT[self.utterance_R])


class RowScorer:
    """Each row has a row of the cache."""

    def __init__(self, llm: PreTrainedModel):
        self.llm = llm
        self.cache: DynamicCache
        self.length_R: Tensor
        self.mask_RT: Tensor | None = None  # None: no row is padded

    def start(self, prefixes: list[Tensor]) -> Tensor:
        log_probs_RV, self.cache = read_prompts(self.llm, prefixes)
        self.length_R = torch.tensor([len(prefix) for prefix in prefixes], device=prefixes[0].device)
        self.mask_RT = padding_mask(prefixes)
        return log_probs_RV

    def step(self, tokens_R: Tensor) -> Tensor:
        if self.mask_RT is not None:
            self.mask_RT = torch.nn.functional.pad(self.mask_RT, (0, 1), value=1)
        row_R = torch.arange(len(tokens_R), device=tokens_R.device)
        logits_RV, _ = logits_at(
            self.llm,
            self.llm.get_input_embeddings()(tokens_R[:, None]),
            rows_N=row_R,
            columns_N=torch.zeros_like(row_R),
            attention_mask=self.mask_RT,
            # Rows without padding need no positions either: the cache's length gives them.
            position_ids=None if self.mask_RT is None else self.length_R[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.length_R = self.length_R + 1
        return logits_RV.float().log_softmax(-1)

    def select(self, rows_R: Tensor) -> None:
        self.cache.reorder_cache(rows_R)
        self.length_R = self.length_R[rows_R]
        if self.mask_RT is not None:
            self.mask_RT = self.mask_RT[rows_R]


def groups_by_length(lengths: list[int]) -> list[list[int]]:
    """Return the numbers of the prompts in groups, within which little is padded."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not groups or lengths[i] < GROUP_SPREAD * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    return groups


def read_prompts(llm: PreTrainedModel, prefixes: list[Tensor]) -> tuple[Tensor, DynamicCache]:
    """Return log_probs_RV of the token that follows each prompt, and the cache of all."""
    longest, device = max(map(len, prefixes)), prefixes[0].device
    embeddings_RTL = torch.stack([torch.nn.functional.pad(p, (0, 0, longest - len(p), 0)) for p in prefixes])
    mask_RT = padding_mask(prefixes)
    row_R = torch.arange(len(prefixes), device=device)
    logits_RV, cache = logits_at(
        llm,
        embeddings_RTL,
        rows_N=row_R,
        columns_N=torch.full_like(row_R, longest - 1),
        attention_mask=mask_RT,
        position_ids=None if mask_RT is None else (mask_RT.cumsum(1) - 1).clamp_min(0),
        past_key_values=DynamicCache(config=llm.config.get_text_config()),
        use_cache=True,
    )
    assert isinstance(cache, DynamicCache)
    return logits_RV.float().log_softmax(-1), cache


def padding_mask(prefixes: list[Tensor]) -> Tensor | None:
    """Return mask_RT, 1 where a prompt padded on the left stands; None where nothing is padded."""
    longest = max(map(len, prefixes))
    if all(len(prefix) == longest for prefix in prefixes):
        return None
    length_R = torch.tensor([len(prefix) for prefix in prefixes], device=prefixes[0].device)
    return (torch.arange(longest, device=length_R.device) >= longest - length_R[:, None]).long()
