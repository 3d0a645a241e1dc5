"""Settings, the call of `generate`, and generation in the training process."""

import pytest
import torch
from speaking_toy import SpeakingToy, speaking_config
from toy_jobs import load_weights

from seedling.stages.reinforcement.generation import GenerationConfig, InProcess, generate
from seedling.stages.runtime.trainer import run_training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": -1}, "generation.workers is -1; it must be at least 0"),
        ({"every": 0}, "generation.every is 0; it must be at least 1"),
        ({"every": 4}, "generation.every is 4 and generation.workers is 0.*set generation.workers=1 or generation.eve"),
        ({"workers": 2, "worker_threads": 0}, "worker_threads is 0; it must be at least 1"),
        ({"workers": 2, "timeout_seconds": 0}, "timeout_seconds is 0"),
        (
            {"workers": 2, "every": 4, "max_staleness": 2},
            "max_staleness is 2 and generation.every is 4.*up to 3 steps old; set generation.every=3, or .*=3 or null",
        ),
        ({"workers": 2, "every": 4, "max_staleness": 0}, "max_staleness is 0 and generation.every is 4.*every=1"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_way_out(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**settings)


@pytest.mark.parametrize(("every", "max_staleness", "oldest"), [(1, None, 0), (4, None, 3), (4, 3, 3), (1, 5, 5)])
def test_the_oldest_hypotheses_allowed(every, max_staleness, oldest):
    assert GenerationConfig(workers=1, every=every, max_staleness=max_staleness).oldest == oldest


def test_zero_3_is_refused_in_the_training_process_only(tmp_path):
    with pytest.raises(
        ValueError, match=r"zero_stage is 3 and generation.workers is 0.*workers=1 or train.zero_stage=2"
    ):
        SpeakingToy().build(speaking_config(tmp_path, train={"zero_stage": 3}), {})
    SpeakingToy().build(speaking_config(tmp_path, train={"zero_stage": 3}, generation={"workers": 1}), {})


def test_generating_leaves_no_trace_and_depends_on_weights_and_micro_batch_alone(tmp_path):
    stage, cfg = SpeakingToy(), speaking_config(tmp_path)
    model = stage.build(cfg, {})
    data = stage.batches(cfg, "train")
    first, second = [data.dataset[m] for m in next(data.plan.steps()).micro_batches[:2]]
    modes = []
    model.register_forward_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    torch.manual_seed(5)
    once = generate(stage, model, first, seed=1)
    after = torch.rand(3)
    generate(stage, model, second, seed=1)
    assert generate(stage, model, first, seed=1) == once
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3)) and model.training and modes == [(False, False)] * 3
    assert generate(stage, model, first, seed=2) != once
    with torch.no_grad():
        model.head.bias += 1e-6
    assert generate(stage, model, first, seed=1) != once
    model.eval()
    generate(stage, model, first, seed=1)
    assert not model.training


def test_the_mode_is_restored_where_generate_raises(tmp_path):
    stage, cfg = SpeakingToy(), speaking_config(tmp_path, refuse_keys=[f"u{i:04d}" for i in range(120)])
    model = stage.build(cfg, {})
    data = stage.batches(cfg, "train")
    with pytest.raises(ValueError, match="cannot be said"):
        InProcess(stage, cfg).of(model, data.dataset[next(data.plan.steps()).micro_batches[0]])
    assert model.training


def test_hypotheses_of_the_training_process_are_those_of_the_step_and_a_resumed_run_has_the_same(tmp_path):
    def train(name: str, steps: int) -> SpeakingToy:
        stage = SpeakingToy()
        train = {"max_steps": steps, "save_every": 4, "schedule": "constant", "warmup_steps": 0}
        run_training(stage, speaking_config(tmp_path / name, train=train), run_dir=tmp_path / name)
        return stage

    straight = train("straight", 6)
    assert [straight.heard[index].version for index in range(24)] == [step for step in range(6) for _ in range(4)]
    assert all(heard.age == 0 and heard.seconds == heard.waited > 0 for heard in straight.heard.values())
    train("resumed", 4)
    resumed = train("resumed", 6)
    for index in range(16, 24):
        assert resumed.heard[index].hypotheses == straight.heard[index].hypotheses
        assert resumed.heard[index].version == straight.heard[index].version
    a, b = load_weights(tmp_path / "straight"), load_weights(tmp_path / "resumed")
    assert all(torch.equal(a[name], b[name]) for name in b)
