"""The shipped configs of a size say the same as the preset of that size."""

from dataclasses import asdict
from pathlib import Path

import pytest

from seedling.launch.stage_lookup import load_stage_config
from seedling.model.conformer import PRESETS

SHAPE = ("dim", "num_layers", "num_heads", "ff_mult", "conv_kernel", "subsampling_channels")


@pytest.mark.parametrize("size", ["demo", "75M", "0.6B", "2B"])
@pytest.mark.parametrize("stage", ["sft", "encoder_pretrain"])
def test_the_config_of_a_size_has_the_shape_of_the_preset(stage, size):
    file = Path(__file__).parents[2] / f"configs/stages/{stage.removeprefix('encoder_')}_{size.lower()}.yaml"
    _, loaded = load_stage_config(stage, file, overrides=["run_dir=somewhere"])
    configured, preset = asdict(loaded.config.encoder), asdict(PRESETS[size])
    assert {key: configured[key] for key in SHAPE} == {key: preset[key] for key in SHAPE}
