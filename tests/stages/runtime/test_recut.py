"""A run that changes its number of ranks and its ZeRO stage on the way ends as the one that never did."""

import argparse
import contextlib
import io
import shutil
from itertools import pairwise

import pytest
import torch
from forked_jobs import ForkedJob
from torch import nn
from toy_jobs import largest_difference, load_weights, read_lines

from seedling.stages.runtime.checkpoint import SHARDS, list_checkpoints
from seedling.stages.runtime.recut import load_buffers
from seedling.stages.runtime.shards import Shards, layout_by_group, layout_by_parameter
from seedling.stages.runtime.signals import EXIT_INTERRUPTED

RANKS = (1, 2, 4, 1)
STOPS = (4, 8, 12, 0)  # an epoch has 17 steps
KINDS = {
    "zero0": {},
    "zero1": {"zero_stage": 1},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
    "bf16": {"zero_stage": 2, "precision": "bf16"},
    "autocast": {"zero_stage": 1, "precision": "autocast"},
    "muon": {"optimizer": "muon", "lr": {"body": 1e-2, "head": 2e-2, "layers": 1e-2}},
    "stages": {"zero_stage": (1, 3, 2, 3)},
}


def settings(train: dict, *, part: int | None = None) -> dict:
    stage = train.get("zero_stage", 0)
    stage = stage[part or 0] if isinstance(stage, tuple) else stage
    train = {"epochs": 1, "eval_every": 6, "log_every": 1, "save_every": 0, **train, "zero_stage": stage}
    layers = 1 if train.get("optimizer") == "muon" else 0
    return {"train": train, "layers": layers, "stop_after": STOPS[part] if part is not None else 0}


@pytest.fixture(scope="module", params=[pytest.param(k, marks=() if k == "zero2" else pytest.mark.slow) for k in KINDS])
def trained(request, tmp_path_factory):
    """A kind, and a folder with its runs: `straight` on one rank, `elastic` on RANKS one after the other."""
    root, train = tmp_path_factory.mktemp(request.param), KINDS[request.param]
    ForkedJob(root, {"straight": settings(train)}).finish()
    for part, ranks in enumerate(RANKS):
        # A process that is asked to stop leaves, so a job has one run.
        job = ForkedJob(root / f"job{part}", {"../elastic": settings(train, part=part)}, ranks=ranks)
        assert job.wait() == [EXIT_INTERRUPTED if STOPS[part] else 0] * ranks, job.output()[-3000:]
        if ranks == 2:
            shutil.copytree(root / "elastic", root / "two")
    return request.param, root


def test_one_two_four_and_one_ranks_train_what_one_rank_does(trained):
    kind, root = trained
    elastic, straight = root / "elastic", root / "straight"
    ledger = read_lines(elastic / "ledger.jsonl")
    assert ledger == read_lines(straight / "ledger.jsonl")
    seen = [tuple(pair) for line in ledger for pair in line["utterances"]]
    assert sorted(seen) == [(0, row) for row in range(120)]
    # fp32: sums in another order. With bf16 gradients that order is worth a step of rounding.
    noise = 1e-6 if kind not in ("bf16", "autocast") else 1e-2
    assert largest_difference(load_weights(elastic), load_weights(straight)) <= noise
    for metric in ("train/loss", "train/lr", "valid/dev/loss"):
        curves = [
            [(m["step"], m[metric]) for m in read_lines(d / "metrics.jsonl") if metric in m]
            for d in (elastic, straight)
        ]
        assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
        for (step, found), (_, expected) in zip(*curves):
            assert found == pytest.approx(expected, rel=max(noise, 1e-5)), f"{metric} of step {step}"


def test_what_two_ranks_wrote_reads_as_deepspeeds_own_converter_has_it(trained, tmp_path):
    """Weights, moments and steps of every parameter, bit for bit."""
    from deepspeed.checkpoint import ds_to_universal

    kind, root = trained
    checkpoint = list_checkpoints(root / "two" / "checkpoints")[0]
    folder = checkpoint / SHARDS
    if kind in ("zero0", "muon"):
        pytest.skip("stage 0 has no shards")
    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    paths = {"input_folder": str(folder), "output_folder": str(tmp_path / "universal")}
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(argparse.Namespace(**options, **paths, inject_missing_state=True))
    shards = Shards(folder)
    assert len(shards.ranks) == 2 and set(shards.shapes) == {
        f"model.{part}.{which}" for part in ("body.0", "head") for which in ("weight", "bias")
    }
    for name in shards.shapes:
        assert shards.moments(name) == ["exp_avg", "exp_avg_sq"]
        for what in ("fp32", "exp_avg", "exp_avg_sq"):
            expected = torch.load(tmp_path / "universal" / "zero" / name / f"{what}.pt", weights_only=False)
            expected = expected["param"] if isinstance(expected, dict) else expected  # under stage 3 the tensor itself
            assert torch.equal(shards.read(name, what), expected.flatten()), f"{name} {what}"
        assert float(shards.step(name)) == int(checkpoint.name[5:])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_element_of_every_parameter_is_in_one_piece(ranks):
    shapes = [{"a": torch.Size([5, 3]), "b": torch.Size([1])}, {"c": torch.Size([64])}]
    layouts = [layout_by_parameter(shapes, ranks=ranks)]
    # Stages 1 and 2: 16 and 64 elements, cut at equal places.
    room = [-(-sum(shape.numel() for shape in group.values()) // ranks) for group in shapes]
    slices = []
    for rank in range(ranks):
        flats = []
        for group, size in zip(shapes, room):
            ends = [0]
            for shape in group.values():
                ends.append(ends[-1] + shape.numel())
            flat = {}
            for name, (begin, end) in zip(group, pairwise(ends)):
                first, last = max(begin, rank * size), min(end, (rank + 1) * size)
                if first < last:
                    flat[name] = (first - rank * size, last - first)
            flats.append(flat)
        slices.append(flats)
    layouts.append(layout_by_group(slices))
    for layout in layouts:
        for name, numel in (("a", 15), ("b", 1), ("c", 64)):
            held = [i for piece in layout[name] for i in range(piece.offset, piece.offset + piece.numel)]
            assert held == list(range(numel)), name


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_checkpoint_from_before_the_first_step_serves_any_number_of_ranks(tmp_path, zero_stage):
    """No moments are in it yet; keep_best may want it."""
    train = {"zero_stage": zero_stage, "max_steps": 6, "save_every": 0, "eval_every": 6}
    ForkedJob(
        tmp_path / "jobs", {"../run": {"train": {**train, "eval_first": True, "keep_best": "valid/dev/loss"}}}, ranks=2
    ).finish()
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in list_checkpoints(checkpoints)) == ["step_000000", "step_000006"]
    shutil.rmtree(checkpoints / "step_000006")
    ForkedJob(tmp_path / "jobs", {"../run": {"train": train}, "../straight": {"train": train}}, ranks=1).finish()
    assert "resuming from" in (tmp_path / "jobs" / "rank0.log").read_text()
    assert largest_difference(load_weights(tmp_path / "run"), load_weights(tmp_path / "straight")) <= 1e-6


def test_buffers_come_from_the_model_file():
    module, saved = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    saved(torch.randn(8, 3))
    load_buffers(module, saved.state_dict())
    assert torch.equal(module.running_mean, saved.running_mean) and int(module.num_batches_tracked) == 1
