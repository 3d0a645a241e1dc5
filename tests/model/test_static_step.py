"""Steps on fixed buffers, run as they come or replayed from a recording, find what the tree cache finds."""

import logging
import math
import random

import pytest
import torch
from random_llms import END, make_end_likely, prompts_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seedling.model import llm_scorer, static_cache, static_step
from seedling.model.context_search import ContextPrompt, ContextScorer
from seedling.model.decoding import DecodeConfig, decode
from seedling.model.llm_scorer import TreeScorer
from seedling.model.static_step import CudaGraphs, StaticScorer, StaticSteps, is_static, takes_graphs


class Recording(TorchDispatchMode):
    """What a CUDA graph is, on a CPU: the operations on the tensors that they ran on, without any of Python's choices.

    Replaying writes each result where the first run has put it.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    def replay(self):
        for func, args, kwargs, made in self.calls:
            for place, value in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs))):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class Recorder:
    def __init__(self):
        self.recorded = self.replayed = 0

    def __call__(self, run):
        run()
        with Recording() as recording:
            result = run()
        self.recorded += 1

        def replay():
            self.replayed += 1
            recording.replay()

        return replay, result


@pytest.fixture(params=[True, False], ids=["little room", "room"])
def room(request, monkeypatch):
    """With little room the cache is thinned out at nearly every step, and buffers grow."""
    if request.param:
        for module in (llm_scorer, static_step):
            monkeypatch.setattr(module, "ROOM", 1)
        monkeypatch.setattr(llm_scorer, "STEPS_OF_ROOM", 2)
        monkeypatch.setattr(static_cache, "COLUMNS", 4)


def assert_alike(found, wanted):
    for these, those in zip(found, wanted, strict=True):
        assert [h.ids for h in these] == [h.ids for h in those]
        assert all(math.isclose(a.score, b.score, abs_tol=1e-3) for a, b in zip(these, those))


@pytest.mark.parametrize("family, attention", [("qwen3", "sdpa"), ("llama", "sdpa"), ("llama", "eager")])
@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "as they come"])
def test_searches_one_after_another_find_what_trees_find(family, attention, recorded, room, tiny_llm):
    """Longer and shorter ones, wider and narrower ones: what one leaves behind is not seen by the next."""
    llm, rng, recorder = tiny_llm(family), random.Random(0), Recorder()
    llm.set_attn_implementation(attention)
    make_end_likely(llm, by=3.0)
    steps = StaticSteps(llm, record=recorder if recorded else None)
    for beam_size, lengths in ((3, [3, 17, 9, 9, 1]), (1, [60, 12, 5]), (5, [8]), (3, [4, 30, 9, 9, 2, 2, 2])):
        prompts = prompts_of(llm, lengths, seed=beam_size)
        config = DecodeConfig(beam_size=beam_size, nbest=beam_size)
        limits = [rng.randint(1, 16) for _ in prompts]
        wanted = decode(TreeScorer(llm), prompts, limits=limits, end=END, config=config)
        found = decode(StaticScorer(steps), prompts, limits=limits, end=END, config=config)
        assert_alike(found, wanted)
    assert (recorder.recorded > 3 and recorder.replayed > recorder.recorded) == recorded


@torch.no_grad()
def test_rows_may_be_chosen_in_any_number(room, tiny_llm):
    """As when samples of an utterance end one by one."""
    llm, rng = tiny_llm("qwen3"), random.Random(1)
    prompts = prompts_of(llm, [6, 2, 11, 30])
    trees, static = TreeScorer(llm), StaticScorer(StaticSteps(llm, record=Recorder()))
    torch.testing.assert_close(static.start(prompts), trees.start(prompts))
    rows = 4
    for _ in range(10):
        chosen = torch.tensor([rng.randrange(rows) for _ in range(rng.randint(1, 9))])
        tokens = torch.tensor([rng.randrange(2, 300) for _ in chosen])
        found = []
        for scorer in (static, trees):
            scorer.select(chosen)
            found.append(scorer.step(tokens))
        torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)
        rows = len(chosen)


def test_joint_context_search_runs_on_them(tiny_llm):
    llm = tiny_llm("qwen3")
    make_end_likely(llm, by=2.0)
    plain, context = prompts_of(llm, [5, 9, 7]), prompts_of(llm, [20, 3, 11], seed=1)
    prompts = [ContextPrompt(plain[0], context[0]), ContextPrompt(plain[1], None), ContextPrompt(plain[2], context[2])]
    config = DecodeConfig(beam_size=4, nbest=4)
    found = [
        decode(ContextScorer(llm, config=config), prompts, limits=[12] * 3, end=END, config=config)
        for llm in (TreeScorer(llm), StaticScorer(StaticSteps(llm, record=Recorder())))
    ]
    assert_alike(found[1], found[0])


def test_a_bucket_is_recorded_once_and_again_where_weights_have_moved(tiny_llm):
    llm, recorder = tiny_llm("llama"), Recorder()
    steps, prompts, config = StaticSteps(llm, record=recorder), prompts_of(llm, [4, 6]), DecodeConfig(beam_size=2)

    def search():
        return decode(StaticScorer(steps), prompts, limits=[8, 8], end=END, config=config)

    first = search()
    recorded = recorder.recorded
    assert_alike(search(), first)
    assert recorder.recorded == recorded
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.mul_(0.9)  # in place: what is replayed reads the new values
    wanted = decode(TreeScorer(llm), prompts, limits=[8, 8], end=END, config=config)
    assert wanted[0][0].score != first[0][0].score
    assert_alike(search(), wanted)
    assert recorder.recorded == recorded
    layer = llm.model.layers[0].mlp.down_proj
    layer.weight = torch.nn.Parameter(-layer.weight.detach())
    assert_alike(search(), decode(TreeScorer(llm), prompts, limits=[8, 8], end=END, config=config))
    assert recorder.recorded > recorded


def test_an_llm_may_change_its_type_between_searches(tiny_llm):
    llm = tiny_llm("llama")
    steps, prompts, config = StaticSteps(llm, record=Recorder()), prompts_of(llm, [4, 6]), DecodeConfig(beam_size=2)
    for dtype in (torch.float32, torch.float64):
        llm.to(dtype)
        given = [prompt.to(dtype) for prompt in prompts]
        found = decode(StaticScorer(steps), given, limits=[8, 8], end=END, config=config)
        assert steps.cache.layers[0].keys.dtype == dtype
        assert_alike(found, decode(TreeScorer(llm), given, limits=[8, 8], end=END, config=config))


def test_searches_under_inference_mode_and_without_may_follow_each_other(tiny_llm):
    llm = tiny_llm("llama")
    steps, prompts, config = StaticSteps(llm, record=None), prompts_of(llm, [4, 6]), DecodeConfig(beam_size=2)
    wanted = decode(TreeScorer(llm), prompts, limits=[8, 8], end=END, config=config)
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            found = decode(StaticScorer(steps), prompts, limits=[8, 8], end=END, config=config)
        assert_alike(found, wanted)


def test_where_nothing_can_be_recorded_steps_run_as_they_come_and_a_line_says_so(tiny_llm, caplog):
    def refuses(run):
        raise RuntimeError("operation not permitted when stream is capturing")

    llm = tiny_llm("llama")
    prompts, config = prompts_of(llm, [4, 6]), DecodeConfig(beam_size=2)
    with caplog.at_level(logging.WARNING):
        found = decode(StaticScorer(StaticSteps(llm, record=refuses)), prompts, limits=[8, 8], end=END, config=config)
    assert_alike(found, decode(TreeScorer(llm), prompts, limits=[8, 8], end=END, config=config))
    assert [r.getMessage() for r in caplog.records] == [
        "decoding runs without CUDA graphs, several times slower: operation not permitted when stream is capturing"
    ]


def test_who_takes_them(tiny_llm):
    assert is_static(tiny_llm("qwen3")) and not takes_graphs(tiny_llm("qwen3")), "there are no graphs on a CPU"
    assert not is_static(tiny_llm("gemma2")) and not is_static(tiny_llm("granite"))
    assert not is_static(tiny_llm("llama").train())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
def test_cuda_graphs_find_what_trees_find(tiny_llm):
    llm = tiny_llm("qwen3").cuda()
    make_end_likely(llm, by=3.0)
    llm.get_output_embeddings().bias.data = llm.get_output_embeddings().bias.data.cuda()
    assert takes_graphs(llm) and not takes_graphs(tiny_llm("mixtral").cuda())
    steps, rng = StaticSteps(llm, record=CudaGraphs(llm.device)), random.Random(0)
    for beam_size in (3, 1, 4):
        prompts = [prompt.cuda() for prompt in prompts_of(llm.cpu(), [3, 17, 9, 9, 1], seed=beam_size)]
        llm.cuda()
        config, limits = DecodeConfig(beam_size=beam_size, nbest=beam_size), [rng.randint(1, 16) for _ in prompts]
        wanted = decode(TreeScorer(llm), prompts, limits=limits, end=END, config=config)
        assert_alike(decode(StaticScorer(steps), prompts, limits=limits, end=END, config=config), wanted)
    assert steps.record is not None and all(step.recording for step in steps.steps.values())
