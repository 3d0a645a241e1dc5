"""Config loading: order of sources, origins, and that every mistake of the user is one line with the way out."""

import textwrap
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml

from seedling.stages.runtime.config import ConfigError, TrainingStageConfig, load_config
from seedling.stages.runtime.schema import ALIASES, all_keys


class Window(Enum):
    povey = 1
    hann = 2


@dataclass
class EncoderConfig:
    dim: int = 512
    num_heads: int = 8
    dropout: float | None = None

    def __post_init__(self):
        if self.dim % self.num_heads:
            raise ValueError(f"dim ({self.dim}) must be divisible by num_heads ({self.num_heads})")


@dataclass
class LoraConfig:
    r: int = 8


@dataclass
class DataConfig:
    train: str
    lang: str = "en"
    folders: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    window: Window = Window.povey
    noise: Path | None = None
    max_tokens: int = 0
    scale: int | float = 1


@dataclass
class ToyConfig(TrainingStageConfig):
    data: DataConfig
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    lora: LoraConfig | None = None
    parts: dict[str, EncoderConfig] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


GIVEN = {"stage": "toy", "run_dir": "runs/toy", "data": {"train": "shards"}}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text))
    return path


def error_of(file: Path | None = None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(ToyConfig, file, overrides=overrides, given=GIVEN)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_yield_to_base_to_file_to_overrides(tmp_path):
    write(tmp_path, "base.yaml", "encoder: {dim: 128, num_heads: 4}\nseed: 2\ntrain: {max_steps: 7}\n")
    file = write(tmp_path, "a.yaml", "base: base.yaml\nencoder: {dim: 256}\nseed: 3\n")
    loaded = load_config(ToyConfig, file, overrides=["seed=4", "train.lr.encoder=1e-3"], given=GIVEN)
    cfg = loaded.config
    assert (cfg.encoder.dim, cfg.encoder.num_heads, cfg.seed, cfg.train.max_steps) == (256, 4, 4, 7)
    assert cfg.train.lr == {"encoder": 0.001} and cfg.train.keep_last == type(cfg.train)().keep_last
    assert type(cfg.encoder) is EncoderConfig
    assert loaded.origin("encoder.dim") == str(file)
    assert loaded.origin("encoder.num_heads") == f"base {tmp_path / 'base.yaml'}"
    assert loaded.origin("seed") == loaded.origin("train.lr.encoder") == "override"
    assert loaded.origin("data.train") == "command"
    assert loaded.origin("train.keep_last") == "default"


def test_shown_yaml_names_the_origin_of_every_leaf_and_loads_to_the_same_config(tmp_path):
    file = write(tmp_path, "a.yaml", "data: {folders: [a, b], lang: 'no'}\nlora: {r: 4}\n")
    loaded = load_config(ToyConfig, file, overrides=["encoder.dim=64"], given=GIVEN)
    shown = loaded.to_yaml()
    leaves = [line for line in shown.splitlines() if not line.rstrip().endswith(":")]
    assert all("  # " in line for line in leaves)
    lines = {line.split("#")[0].strip(): line.rsplit("# ", 1)[1] for line in leaves}
    assert lines["dim: 64"] == "override"
    assert lines["folders: [a, b]"] == lines["r: 4"] == str(file)
    assert lines["num_heads: 8"] == "default"
    again = write(tmp_path, "shown.yaml", shown)
    assert load_config(ToyConfig, again).config == loaded.config
    assert yaml.safe_load(shown)["data"]["lang"] == "no"


def test_unknown_key_names_file_key_value_and_nearest_key(tmp_path):
    file = write(tmp_path, "a.yaml", "encoder: {num_head: 4}\n")
    assert error_of(file) == f"{file}: encoder.num_head = 4: unknown key; nearest valid key: encoder.num_heads"


def test_unknown_key_in_a_base_names_the_base_file(tmp_path):
    base = write(tmp_path, "base.yaml", "sed: 1\n")
    file = write(tmp_path, "a.yaml", "base: base.yaml\n")
    assert error_of(file) == f"base {base}: sed = 1: unknown key; nearest valid key: seed"


def test_known_key_in_the_wrong_section_is_found_elsewhere():
    message = error_of(None, "warmup_steps=5")
    assert message == "override warmup_steps=5: unknown key; nearest valid key: train.warmup_steps"


def test_a_member_of_a_mapping_typed_with_an_underscore_is_understood():
    assert error_of(None, "train.lr_encoder=1").endswith("nearest valid key: train.lr.encoder")


def test_unknown_key_that_resembles_nothing_lists_what_there_is():
    assert "valid keys of encoder: dim, num_heads, dropout" in error_of(None, "encoder.qqq=5")


def test_unknown_key_inside_a_named_section_of_a_mapping_is_found(tmp_path):
    file = write(tmp_path, "a.yaml", "parts: {speech: {dims: 64}}\n")
    assert error_of(file).endswith("parts.speech.dims = 64: unknown key; nearest valid key: parts.speech.dim")


@pytest.mark.parametrize(
    "typed, meant",
    [
        ("lr=1e-3", "train.lr"),
        ("max_duration=100", "train.micro_batch_seconds"),
        ("train.gradient_clip=1", "train.grad_clip"),
        ("batch_tokens=5", "data.max_tokens"),
        ("save_total_limit=2", "train.keep_last"),
    ],
)
def test_names_of_other_toolkits_are_refused_and_translated(typed, meant):
    assert error_of(None, typed).endswith(f"unknown key; here it is called {meant}")


def test_every_alias_of_a_common_key_leads_to_a_key_that_exists():
    keys = set(all_keys(TrainingStageConfig))
    missing = [meant for meant in ALIASES.values() if meant.startswith("train.") and meant not in keys]
    assert not missing


@pytest.mark.parametrize(
    "override, expected",
    [
        ("encoder.dim=wide", "override encoder.dim=wide: expected int, found str"),
        ("encoder.dim=1.5", "override encoder.dim=1.5: expected int, found float"),
        ("encoder.dim=null", "override encoder.dim=null: expected int, found null"),
        ("encoder.dropout=much", "override encoder.dropout=much: expected float or null, found str"),
        ("data.scale=x", "override data.scale=x: expected int or float, found str"),
        ("data.window=square", "override data.window=square: expected one of povey, hann, found str"),
        ("train.lr=0.1", "override train.lr=0.1: expected a mapping of names to float, found float"),
        ("train.lr.encoder=fast", "override train.lr.encoder=fast: expected float, found str"),
        ("data.folders=a", "override data.folders=a: expected a list of str, found str"),
        ("data.groups={a: b}", "expected a list of str, found str"),
        ("encoder=5", "expected a section with the keys dim, num_heads, dropout, found int"),
        ("data.lang=no", 'override data.lang=False: expected str, found bool; put it in quotes: "False"'),
    ],
)
def test_wrong_type_names_the_expected_type(override, expected):
    assert expected in error_of(None, override)


def test_wrong_type_in_a_file_names_the_file(tmp_path):
    file = write(tmp_path, "a.yaml", "train:\n  max_steps: many\n")
    assert error_of(file) == f"{file}: train.max_steps = many: expected int, found str"


def test_refusal_of_post_init_names_file_and_section(tmp_path):
    file = write(tmp_path, "a.yaml", "encoder: {dim: 100}\n")
    message = error_of(file, "encoder.num_heads=3")
    assert str(file) in message and "override" in message
    assert message.endswith("section encoder: dim (100) must be divisible by num_heads (3)")


def test_missing_value_says_how_to_give_it(tmp_path):
    file = write(tmp_path, "a.yaml", "stage: toy\nrun_dir: runs/x\n")
    with pytest.raises(ConfigError) as caught:
        load_config(ToyConfig, file)
    wanted = f"{file}: data.train is not set; give it in the file or as data.train=VALUE (str)"
    assert str(caught.value) == wanted


def test_optional_section_appears_when_one_of_its_keys_is_set_and_goes_with_null(tmp_path):
    assert load_config(ToyConfig, given=GIVEN).config.lora is None
    assert load_config(ToyConfig, overrides=["lora.r=4"], given=GIVEN).config.lora == LoraConfig(r=4)
    file = write(tmp_path, "a.yaml", "lora: {r: 4}\n")
    assert load_config(ToyConfig, file, overrides=["lora=null"], given=GIVEN).config.lora is None


def test_forms_that_schema_authors_may_use_arrive_typed():
    overrides = [
        "data.groups={a: [x, y]}",
        "data.weights.b=1",
        "data.noise=some/folder",
        "data.window=hann",
        "parts.speech.dim=64",
        "options.anything.deep=[1, {k: v}]",
        "data.scale=2.5",
        "data.lang='no'",
    ]
    cfg = load_config(ToyConfig, overrides=overrides, given=GIVEN).config
    assert cfg.data.groups == {"a": ["x", "y"]} and cfg.data.weights == {"b": 1.0}
    assert cfg.data.noise == Path("some/folder") and cfg.data.window is Window.hann
    assert cfg.parts == {"speech": EncoderConfig(dim=64)} and cfg.data.scale == 2.5 and cfg.data.lang == "no"
    assert cfg.options == {"anything": {"deep": [1, {"k": "v"}]}}


def test_hydra_prefixes_are_accepted():
    assert load_config(ToyConfig, overrides=["++seed=5", "+encoder.dim=64"], given=GIVEN).config.seed == 5


@pytest.mark.parametrize("text", ["seed", "=5", "a b=5", "data.folders=[1", ".seed=1"])
def test_malformed_overrides_are_refused_by_name(text):
    assert error_of(None, text).startswith(f"override {text}: ")


def test_references_between_keys_resolve_and_broken_ones_are_named(tmp_path):
    file = write(tmp_path, "a.yaml", "encoder: {dim: 64}\nparts: {speech: {dim: '${encoder.dim}'}}\n")
    assert load_config(ToyConfig, file, given=GIVEN).config.parts["speech"].dim == 64
    broken = write(tmp_path, "b.yaml", "data: {lang: '${langauge}'}\n")
    assert f"{broken}" in error_of(broken) and "data.lang = ${langauge}" in error_of(broken)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("seed: [1\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "duplicate key"),
        ("- 1\n", "expected keys and values"),
        ("base: nowhere.yaml\n", "there is no file"),
        ("base: [a, b]\n", "expected one file name"),
    ],
)
def test_unreadable_files_are_one_line_errors(tmp_path, text, reason):
    file = write(tmp_path, "a.yaml", text)
    message = error_of(file)
    assert message.startswith(str(file)) and reason in message


def test_a_base_may_not_have_a_base(tmp_path):
    write(tmp_path, "c.yaml", "seed: 1\n")
    write(tmp_path, "b.yaml", "base: c.yaml\n")
    file = write(tmp_path, "a.yaml", "base: b.yaml\n")
    assert "a base cannot have a base of its own" in error_of(file)


def test_missing_file_is_named(tmp_path):
    assert error_of(tmp_path / "none.yaml").endswith("none.yaml: no such config file")
