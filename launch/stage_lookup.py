"""From what a user types to a stage and its config: `sft` or `my.module:Class`, a YAML's path or its packaged name."""

import importlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from .. import configs
from ..stages import STAGES
from ..stages.runtime.config import ConfigError, Loaded, StageConfig, TrainingStageConfig, load_config, read_sources

PACKAGED = Path(configs.__file__).parent


def load_stage(name: str) -> type:
    """Import the stage class of a name in STAGES, or of `module:Class` for a user's own stage.

    A user's module must be importable: PYTHONPATH=FOLDER, or installed. The current folder is not searched, since a
    checkout's top-level `kernels` or `data` would hide packages of the same name.
    """
    target = STAGES.get(name, name)
    module_name, colon, class_name = target.partition(":")
    if not colon:
        near = get_close_matches(name, STAGES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(STAGES)}, or module:Class for your own"
        raise ValueError(f"no stage is called {name}; {hint}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise ValueError(f"stage {name}: no module {error.name}; put its folder on PYTHONPATH") from error
    stage = getattr(module, class_name, None)
    schema = getattr(stage, "Config", None)
    wanted = StageConfig if hasattr(stage, "run") else TrainingStageConfig
    if not (isinstance(stage, type) and isinstance(schema, type) and issubclass(schema, wanted)):
        raise ValueError(f"stage {name}: {target} has no Config that extends {wanted.__name__}")
    return stage


def find_config(name: str | Path, *, folder: str, beside: Path | None = None) -> Path:
    """Return the YAML that `name` means: a path (from the folder `beside` first), or a name in the packaged configs.

    `folder` ("stages" or "pipelines") is where packaged configs are looked for; from anywhere, `demo` and
    `configs/pipelines/demo.yaml` both mean the packaged pipeline.
    """
    path = Path(name)
    places = [path] if beside is None else [beside / path, path]
    for place in places:
        for candidate in (place, place.with_name(f"{place.name}.yaml")):
            if candidate.is_file():
                return candidate
    wanted = path.with_name(path.name.removesuffix(".yaml") + ".yaml").parts
    wanted = wanted[1:] if wanted[0] == "configs" else wanted
    packaged = sorted((PACKAGED / folder).rglob("*.yaml"))
    found = [file for file in packaged if file.relative_to(PACKAGED).parts[-len(wanted) :] == wanted]
    if len(found) == 1:
        return found[0]
    known = {str(file.relative_to(PACKAGED / folder).with_suffix("")): file for file in found or packaged}
    if found:
        raise FileNotFoundError(f"{name}: several packaged configs have this name: {', '.join(known)}")
    near = get_close_matches(
        str(path.with_suffix("")), [*known, *(key.rpartition("/")[2] for key in known)], n=1, cutoff=0.5
    )
    hint = f"nearest packaged config: {near[0]}" if near else f"packaged: {', '.join(known) or 'none'}"
    raise FileNotFoundError(f"{name}: no such file, nor a packaged config of this name; {hint}")


def load_stage_config(
    name: str,
    config: str | Path | None,
    *,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> tuple[type, Loaded]:
    """Return (stage class, its loaded config) for `seedling run NAME --config CONFIG overrides...`.

    The YAML may say `stage:`; if it names another stage than the command does, that is an error and not a guess.
    """
    stage = load_stage(name)
    file = None if config is None else find_config(config, folder="stages")
    for source in [] if file is None else read_sources(file):
        said = source.values.get("stage", name)
        if said != name:
            raise ConfigError(
                f"{source.name}: stage = {said}: the command says {name}; run `seedling run {said}` instead"
            )
    loaded = load_config(stage.Config, file, overrides=overrides, given={"stage": name, **(given or {})})
    unknown = [key for key in loaded.config.inputs if key not in stage.consumes]
    if unknown:
        near = get_close_matches(unknown[0], stage.consumes, n=1)
        hint = f"nearest: inputs.{near[0]}" if near else f"it takes {', '.join(stage.consumes) or 'none'}"
        origin = loaded.origin(f"inputs.{unknown[0]}")
        value = loaded.config.inputs[unknown[0]]
        raise ConfigError(f"{origin}: inputs.{unknown[0]} = {value}: stage {name} has no such input; {hint}")
    return stage, loaded
