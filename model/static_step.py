"""The LLM's decoding step on fixed buffers, which a GPU replays as a CUDA graph instead of launching it anew.

A step of few rows is a thousand small kernels, and launching them takes longer than running them. Here the beams of all
utterances are laid into buffers of a bucketed number of utterances, beams and columns, and all that changes from step
to step is in tensors, the columns to write too. A bucket is recorded when it first comes. The search is TreeScorer's.

Shape letters: U utterances, Q beams of the widest one, T columns in the cache, L LLM width, R rows of the search, V
vocabulary.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_utils import PreTrainedModel

from .llm import head_is_plain
from .llm_scorer import TreeScorer, attention_mask, takes_trees
from .static_cache import COLUMNS, StaticCache, StaticLayer, bucket
from .tree_cache import ROOM

log = logging.getLogger(__name__)

Recording = tuple[Callable[[], None], Tensor]  # what runs it again, and the tensor that its result is written to
Recorder = Callable[[Callable[[], Tensor]], Recording]


def takes_graphs(llm: PreTrainedModel) -> bool:
    """Whether the LLM's step can be recorded: on a GPU, and the same kernels run whatever the tokens are.

    Not with experts, whose routing decides what runs, nor with rotary embeddings that depend on the longest position.
    """
    rope = getattr(llm.config.get_text_config(), "rope_parameters", None) or {}
    return (
        llm.device.type == "cuda"
        and is_static(llm)
        and rope.get("rope_type", "default") not in ("dynamic", "longrope")
        and not any(name.rpartition(".")[2] == "experts" for name, _ in llm.named_modules())
    )


def is_static(llm: PreTrainedModel) -> bool:
    """Whether a step of this LLM can run on fixed buffers."""
    return takes_trees(llm) and head_is_plain(llm) and not llm.training


class CudaGraphs:
    """Records steps as CUDA graphs of one device, which share their memory: only one runs at a time."""

    def __init__(self, device: torch.device):
        self.pool = torch.cuda.graph_pool_handle()
        # Of this device: a stream of another would record nothing, and the replay do nothing.
        self.stream = torch.cuda.Stream(device)

    def __call__(self, run: Callable[[], Tensor]) -> Recording:
        side, current = self.stream, torch.cuda.current_stream(self.stream.device)
        # What is set up on first use (workspaces, tuned kernels) cannot be recorded: run once before.
        side.wait_stream(current)
        with torch.cuda.stream(side):
            run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=side):
            result = run()
        return graph.replay, result


class Bucket(NamedTuple):
    U: int
    Q: int
    T: int


class Step:
    """The step of one bucket. Seats that no row has taken see every column; nobody reads what they compute."""

    def __init__(self, llm: PreTrainedModel, cache: StaticCache, size: Bucket):
        self.llm, device = llm, cache.layers[0].keys.device
        U, Q, T = size
        self.tokens_UQ = torch.zeros(U, Q, dtype=torch.long, device=device)
        self.position_UQ = torch.zeros_like(self.tokens_UQ)
        self.mask_UQT = torch.ones(U, Q, T, dtype=torch.bool, device=device)
        self.write_Q = torch.arange(Q, device=device)
        self.cache = Cache(
            layers=[StaticLayer(layer.keys[:U, :, :T], layer.values[:U, :, :T], self.write_Q) for layer in cache.layers]
        )
        self.recording: Recording | None = None

    def fill(self, tokens_UQ: Tensor, position_UQ: Tensor, mask_UQT: Tensor, *, first: int) -> None:
        """Lay in the inputs of fewer utterances and columns; the new columns begin at `first`."""
        U, Q, T = mask_UQT.shape
        self.tokens_UQ[:U], self.position_UQ[:U] = tokens_UQ, position_UQ
        self.mask_UQT[:U, :, :T], self.mask_UQT[:U, :, T:], self.mask_UQT[U:] = mask_UQT, False, True
        torch.arange(first, first + Q, out=self.write_Q)

    def run(self) -> Tensor:
        """Write the new columns and return hidden_UQL. It depends on tensors alone, and running it twice changes
        nothing."""
        out = self.llm.get_decoder()(
            inputs_embeds=self.llm.get_input_embeddings()(self.tokens_UQ),
            attention_mask=attention_mask(self.llm, self.mask_UQT),
            position_ids=self.position_UQ,
            past_key_values=self.cache,
            use_cache=True,
        )
        return out.last_hidden_state


class StaticSteps:
    """The buffers and recorded steps of an LLM; they outlive a search, and are made anew where what they use moves.

    `record` None runs every step as it comes.
    """

    def __init__(self, llm: PreTrainedModel, *, record: Recorder | None):
        self.llm, self.record = llm, record
        self.cache: StaticCache | None = None
        self.steps: dict[Bucket, Step] = {}
        self._weights: list[int] = []
        self._buffer: Tensor | None = None

    def begin(self, groups: list[DynamicCache]) -> StaticCache:
        """Return the cache of a search that begins with these prompts."""
        weights = [tensor.data_ptr() for tensor in [*self.llm.parameters(), *self.llm.buffers()]]
        if weights != self._weights:  # perhaps they are of another type now, or on another device
            self.steps, self.cache, self._weights = {}, None, weights
        if self.cache is None:
            self.cache = StaticCache(groups, room=ROOM)
        else:
            self.cache.load(groups, room=ROOM)
        return self.cache

    def hidden_UQL(self, tokens_UQ: Tensor, position_UQ: Tensor, mask_UQT: Tensor) -> Tensor:
        """Append the tokens' columns to the cache; return the hidden states, to be read before the next step."""
        assert self.cache is not None, "begin() comes first"
        U, Q, T = mask_UQT.shape
        buffer = self.cache.layers[0].keys
        if buffer is not self._buffer:
            self.steps, self._buffer = {}, buffer
        size = Bucket(min(bucket(U), buffer.shape[0]), Q, min(bucket(T, least=COLUMNS), buffer.shape[2]))
        if size not in self.steps:
            with torch.inference_mode(False):  # as the cache's buffers are
                self.steps[size] = Step(self.llm, self.cache, size)
        step = self.steps[size]
        step.fill(tokens_UQ, position_UQ, mask_UQT, first=self.cache.append(Q))
        return self._result(step)[:U]

    def _result(self, step: Step) -> Tensor:
        if step.recording is None and self.record is not None:
            try:
                step.recording = self.record(step.run)
            except RuntimeError as error:
                log.warning("decoding runs without CUDA graphs, several times slower: %s", error)
                self.record = None
        if step.recording is None:
            return step.run()
        replay, result = step.recording
        replay()
        return result


class StaticScorer(TreeScorer):
    """A tree scorer whose steps run on the fixed buffers of `steps`, one search at a time."""

    def __init__(self, steps: StaticSteps):
        super().__init__(steps.llm)
        self.steps = steps

    def _cache_of(self, groups: list[DynamicCache]) -> StaticCache:
        return self.steps.begin(groups)

    def _logits(self, tokens_UQ: Tensor, position_UQ: Tensor, mask_UQT: Tensor) -> Tensor:
        hidden_UQL = self.steps.hidden_UQL(tokens_UQ, position_UQ, mask_UQT)
        return self.llm.get_output_embeddings()(hidden_UQL[self.utterance_R, self.slot_R])

    def _seat(self, utterances: list[int]) -> None:
        super()._seat(utterances)
        self.slots = bucket(self.slots)
