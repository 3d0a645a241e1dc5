"""The engine against arithmetic: ranks, ZeRO stages and accumulation change nothing; nor does a bad step."""

from itertools import product

import pytest
import torch
from toy_jobs import Job, largest_difference, load_weights, read_lines
from toy_stage import ToyStage, toy_config

from seedling.stages.runtime.engine import Engine
from seedling.stages.runtime.feed import feed
from seedling.stages.runtime.parameters import digest
from seedling.stages.runtime.world import init_world

ZERO_STAGES = (0, 1, 2, 3)


def build_engine(tmp_path, *, zero_stage=0, precision="fp32", grad_clip=1.0, nan_keys=(), inf_gradient_keys=()):
    """Return an engine and the batches of its first steps."""
    cfg = toy_config(
        tmp_path,
        train={"zero_stage": zero_stage, "precision": precision, "grad_clip": grad_clip},
        nan_keys=list(nan_keys),
        inf_gradient_keys=list(inf_gradient_keys),
    )
    stage = ToyStage()
    torch.manual_seed(0)
    model = stage.build(cfg, {})
    engine = Engine(stage, model, cfg.train, world=init_world(), seed=cfg.seed)
    engine.set_lr(1.0)
    steps = feed(stage.batches(cfg, "train"), world=engine.world, epochs=1)
    return engine, [step.batches for step in steps]


def total(batches) -> float:
    return sum(ToyStage().count(batch) for batch in batches)


def weights(engine) -> str:
    with engine.whole_model() as model:
        return digest(model.parameters())


def optimizer_state(engine) -> list[str]:
    optimizer = getattr(engine.ds.optimizer, "optimizer", engine.ds.optimizer)
    return [digest(t.reshape(-1) for t in state.values()) for state in optimizer.state.values()]


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """Toy runs of all ZeRO stages on one and on two processes, half of them with an utterance whose loss is NaN."""
    kinds = {"fp32": {}, "bf16": {}, "nan": {"nan_keys": ["u0051"]}}
    runs = {
        f"{kind}-{zero}": {
            "train": {"zero_stage": zero, "precision": kind.replace("nan", "fp32"), "save_every": 0, "max_steps": 12},
            **poison,
        }
        for kind, poison in kinds.items()
        for zero in ZERO_STAGES
        if kind != "bf16" or zero in (1, 2)
    }
    jobs = {n: Job(tmp_path_factory.mktemp(f"ranks{n}"), runs, ranks=n) for n in (1, 2)}
    return {n: job.finish() for n, job in jobs.items()}


@pytest.mark.parametrize(("kind", "zero_stage"), [*product(("fp32", "nan"), ZERO_STAGES), ("bf16", 1), ("bf16", 2)])
def test_two_processes_equal_one_on_the_same_micro_batches(matrix, kind, zero_stage):
    reference = load_weights(matrix[1].root / f"{kind}-{1 if kind == 'bf16' else 0}")
    for ranks, job in matrix.items():
        found = load_weights(job.root / f"{kind}-{zero_stage}")
        error = largest_difference(found, reference)
        # fp32: sums in another order. bf16: exported weights are rounded to bf16, so one step of rounding.
        assert error <= (1e-6 if kind != "bf16" else 1e-2), f"{ranks} ranks, ZeRO {zero_stage}: differs by {error}"


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_a_bad_utterance_on_one_rank_is_skipped_by_all_and_named(matrix, zero_stage):
    for job in matrix.values():
        last = [line for line in read_lines(job.root / f"nan-{zero_stage}" / "metrics.jsonl") if "train/loss" in line][
            -1
        ]
        ledger = read_lines(job.root / f"nan-{zero_stage}" / "ledger.jsonl")
        hit = [line["step"] for line in ledger if [0, 51] in line["utterances"]]
        assert last["train/nonfinite_steps"] == len(hit) >= 1
        for step in hit:
            assert f"step {step} skipped, not finite: loss of " in job.output()
        assert "u0051" in job.output()


def test_micro_batches_equal_one_gradient_of_the_whole_step(tmp_path):
    """Accumulation against plain autograd on sum(loss) / total count, dropout off."""
    engine, steps = build_engine(tmp_path)
    engine.model.body[2].p = 0.0
    model = ToyStage().build(toy_config(tmp_path, dropout=0.0), {})
    model.load_state_dict(engine.model.state_dict())
    stage = ToyStage()
    stage.cfg = toy_config(tmp_path)
    loss = sum(stage.loss(model, batch).loss_sum for batch in steps[0]) / total(steps[0])
    trained = [p for name, p in model.named_parameters() if stage.trainable(name)]
    gradients = torch.autograd.grad(loss, trained)
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
    result = engine.step(steps[0], total(steps[0]))
    assert result.grad_norm == pytest.approx(float(expected), rel=1e-5)
    assert float(result.loss_sum) / total(steps[0]) == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize("poison", ["nan_keys", "inf_gradient_keys"])
@pytest.mark.parametrize(
    ("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")]
)
def test_a_step_that_is_not_finite_leaves_no_trace(tmp_path, zero_stage, precision, poison):
    _, steps = build_engine(tmp_path)
    bad_key = steps[1][2].keys[0]
    kind = {"zero_stage": zero_stage, "precision": precision}
    clean, _ = build_engine(tmp_path, **kind)
    hit, _ = build_engine(tmp_path, **kind, **{poison: [bad_key]})
    for engine in (clean, hit):
        assert engine.step(steps[0], total(steps[0])).applied
    before = weights(hit), optimizer_state(hit)
    assert not hit.step(steps[1], total(steps[1])).applied
    blames = hit.blame(steps[1], total(steps[1]))
    assert (weights(hit), optimizer_state(hit)) == before
    assert [bad_key in blame.keys for blame in blames] == [True]
    assert blames[0].where.startswith("loss" if poison == "nan_keys" else "gradient of ")
    for engine in (clean, hit):
        assert engine.step(steps[2], total(steps[2])).applied
    assert weights(hit) == weights(clean)


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")])
def test_the_dry_run_leaves_no_trace(tmp_path, zero_stage, precision):
    kind = {"zero_stage": zero_stage, "precision": precision}
    plain, steps = build_engine(tmp_path, **kind)
    dry, _ = build_engine(tmp_path, **kind)
    dry.dry_run(steps[3][0])
    for engine in (plain, dry):
        for batches in steps[:3]:
            assert engine.step(batches, total(batches)).applied
    assert weights(dry) == weights(plain)
    assert optimizer_state(dry) == optimizer_state(plain)


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(tmp_path, zero_stage):
    engine, steps = build_engine(tmp_path, zero_stage=zero_stage)
    before = engine.frozen_digest()
    engine.step(steps[0], total(steps[0]))
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in engine.trainable)
    # ZeRO pads its flat partitions to even sizes, by a few elements for each of the four groups.
    assert trainable <= engine.optimizer_numel() <= trainable + 16
    assert engine.frozen_digest() == before


@pytest.mark.parametrize("zero_stage", ZERO_STAGES)
def test_clipping_scales_the_gradient_to_the_limit(tmp_path, zero_stage):
    """Adam's first moment after one step is (1 - beta1) times the gradient that it was given, clipped or not."""
    engine, steps = build_engine(tmp_path, zero_stage=zero_stage, grad_clip=0.01)
    norm = engine.step(steps[0], total(steps[0])).grad_norm
    optimizer = getattr(engine.ds.optimizer, "optimizer", engine.ds.optimizer)
    moments = torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
    assert norm > 0.1, "the norm is that before clipping"
    assert float(moments.norm()) == pytest.approx(0.01 * (1 - engine.cfg.betas[0]), rel=1e-3)


def test_a_model_cut_up_is_whole_beside_its_shards_and_trains_on_as_if_it_had_not_been(tmp_path):
    """Gathered all at once, a large model would not fit where it was trained."""
    plain, steps = build_engine(tmp_path)
    looked_at, left_alone = (build_engine(tmp_path, zero_stage=3)[0] for _ in range(2))
    for engine in (plain, looked_at, left_alone):
        engine.step(steps[0], total(steps[0]))
    own = list(looked_at.model.parameters())
    with looked_at.whole_model() as model:
        assert not any(p.numel() for p in own), "what the device holds is still cut up"
        whole = {name: value.clone() for name, value in model.state_dict().items()}
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in own]
    expected = plain.model.state_dict()
    assert whole.keys() == expected.keys()
    assert max(float((whole[name] - value).abs().max()) for name, value in expected.items()) < 1e-6
    assert all(a is b for a, b in zip(own, looked_at.model.parameters()))
    for engine in (looked_at, left_alone):
        assert engine.step(steps[1], total(steps[1])).applied
    assert weights(looked_at) == weights(left_alone)


def test_groups_get_their_own_learning_rate(tmp_path):
    engine, _ = build_engine(tmp_path)
    engine.set_lr(0.5)
    found = {group["name"]: group["lr"] for group in engine.ds.optimizer.param_groups}
    assert found == {"body": 5e-3, "head": 1e-2}


def test_a_group_without_a_learning_rate_is_an_error(tmp_path):
    cfg = toy_config(tmp_path, train={"lr": {"body": 1e-2}})
    stage = ToyStage()
    with pytest.raises(ValueError, match=r"parameter group 'head'.*set train.lr.head"):
        Engine(stage, stage.build(cfg, {}), cfg.train, world=init_world(), seed=1)


def test_processes_that_cannot_share_the_micro_batches_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"= 4 micro-batches per step, which 3 processes.*1, 2, 4 processes.*=72"):
        toy_config(tmp_path).train.accumulation_steps(3)


def test_a_parameter_whose_gradient_is_zero_on_all_ranks_takes_no_step(tmp_path):
    """Ranks without a gradient for a part are given zeros by DeepSpeed, a single process is not: both pass it over."""
    engine, _ = build_engine(tmp_path)
    before = [p.detach().clone() for p in engine.trainable]
    engine.trainable[0].grad = torch.zeros_like(engine.trainable[0])
    for p in engine.trainable[1:]:
        p.grad = torch.ones_like(p)
    engine.ds.set_gradient_accumulation_boundary(True)
    _, applied = engine._update()
    moved = [not torch.equal(p, old) for p, old in zip(engine.trainable, before)]
    assert applied and moved == [False, *[True] * (len(moved) - 1)]
