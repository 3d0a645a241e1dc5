"""What DeepSpeed is told, and that a user's extra keys cannot contradict it."""

import pytest

from seedling.stages.runtime.ds_config import MAX_BUCKET, deepspeed_config
from seedling.stages.runtime.train_config import TrainConfig


def config(**train) -> dict:
    return deepspeed_config(TrainConfig(**train), accumulation_steps=3, world_size=2, trainable_numel=1000)


def test_batch_sizes_multiply_out():
    made = config()
    assert (
        made["train_batch_size"]
        == made["train_micro_batch_size_per_gpu"] * made["gradient_accumulation_steps"] * 2
        == 6
    )


def test_the_reduce_bucket_is_no_larger_than_the_model():
    assert config(zero_stage=2)["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    large = deepspeed_config(TrainConfig(), accumulation_steps=1, world_size=1, trainable_numel=10**12)
    assert large["zero_optimization"]["reduce_bucket_size"] == MAX_BUCKET


def test_bf16_runs_with_fp32_master_weights_and_sums():
    made = config(precision="bf16", zero_stage=0)
    assert made["zero_optimization"]["stage"] == 1
    assert made["bf16"]["enabled"] and made["data_types"]["grad_accum_dtype"] == "fp32"


def test_extra_keys_merge_into_sections():
    extra = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "comms_logger": {"enabled": True}}
    made = config(zero_stage=2, deepspeed_extra=extra)
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert made["comms_logger"] == {"enabled": True}


@pytest.mark.parametrize(
    "extra", [{"zero_optimization": {"stage": 3}}, {"gradient_clipping": 5.0}, {"zero_optimization": "none"}]
)
def test_an_extra_key_that_is_generated_is_refused(extra):
    with pytest.raises(ValueError, match=r"train.deepspeed_extra.*set the train.\* field instead"):
        config(deepspeed_extra=extra)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"zero_stage": 4}, "train.zero_stage is 4; choose one of 0, 1, 2, 3"),
        ({"precision": "fp16"}, "train.precision is 'fp16'; choose one of fp32, bf16"),
        ({"micro_batch_seconds": 100.0}, "lower the latter"),
        ({"log_every": 0}, "train.log_every is 0"),
    ],
)
def test_values_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong)
