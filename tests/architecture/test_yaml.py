"""Every shipped YAML loads against the schema of its stage, or as a pipeline or a study whose every step resolves."""

import re
from pathlib import Path

import pytest

from seedling.launch.pipeline_config import load_pipeline
from seedling.launch.scaling import load_ladder
from seedling.launch.stage_lookup import load_stage_config
from seedling.stages.runtime.config import ConfigError, read_sources

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


def named(file: Path) -> str:
    return str(file.relative_to(CONFIGS))


def test_there_are_configs():
    assert len([file for file in FILES if file.is_relative_to(CONFIGS / "stages")]) >= 5
    assert (CONFIGS / "pipelines" / "demo.yaml") in FILES


@pytest.mark.parametrize("file", [file for file in FILES if "stages" in file.parts], ids=named)
def test_a_stage_config_fits_its_schema(file):
    """Paths of inputs and data are the user's: what is required and not set is filled in with a stand-in."""
    said = [source.values["stage"] for source in read_sources(file) if "stage" in source.values]
    assert said, f"{file} does not say `stage: NAME`"
    overrides: list[str] = []
    while True:
        try:
            load_stage_config(said[-1], file, overrides=overrides)
            return
        except ConfigError as error:
            unset = re.search(r": (\S+) is not set; .*\((a path|str|a list of str)\)$", str(error))
            stand_in = unset and (f"{unset[1]}=[stand-in]" if unset[2].startswith("a list") else f"{unset[1]}=stand-in")
            if stand_in is None or stand_in in overrides:
                raise
            overrides.append(stand_in)


@pytest.mark.parametrize("file", [file for file in FILES if "pipelines" in file.parts], ids=named)
def test_a_pipeline_resolves_every_step(file, monkeypatch, tmp_path):
    # From another folder: a shipped pipeline may not depend on where it is started.
    monkeypatch.chdir(tmp_path)
    for variable in re.findall(r"\$\{oc\.env:(\w+)\}", file.read_text(encoding="utf-8")):
        monkeypatch.setenv(variable, "/some/folder")
    assert load_pipeline(str(file)).steps


@pytest.mark.parametrize("file", [file for file in FILES if "scaling" in file.parts], ids=named)
def test_a_scaling_study_resolves_every_step(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_ladder(str(file))[1].steps


@pytest.mark.parametrize("file", FILES, ids=named)
def test_a_config_has_no_absolute_path(file):
    assert not re.search(r"[\s\"'\[]/\w+", file.read_text(encoding="utf-8"))
