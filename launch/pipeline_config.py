"""What a pipeline's YAML says, turned into the commands that its steps run.

    name: demo
    run_dir: runs/demo
    steps:
      - {name: corpus, command: demo-corpus, set: {hours: 2}}
      - {name: shards, command: prepare, args: ["${corpus}/train.jsonl"]}
      - {name: sft, stage: sft, config: sft_demo, inputs: {llm: "${llm}"}, set: {data.train: "${shards}"}}
      - {name: transcripts, command: transcribe, args: ["${sft}", "${corpus}/audio/*.flac"], set: {limit: 5}}

`${NAME}` is what the earlier step NAME produced: the artifact of a stage, the output folder of a command. `${run_dir}`
and `${oc.env:VARIABLE}` work too. `set` holds overrides of a stage's config, or options of a command. Everything is
resolved and checked before the first step starts: a typing error in the last step is found at once, not after hours.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from ..stages.runtime.config import ConfigError, Source, merge, parse_override, read_sources
from .commands.contextualize import load_contexts_config
from .stage_lookup import find_config, load_stage_config

C = TypeVar("C")
# Commands that a pipeline may run, and whether `--out RUN/NAME` tells them where to write.
COMMANDS = {
    "demo-corpus": True,
    "prepare": True,
    "contextualize": True,
    "index": False,
    "check-data": False,
    "transcribe": False,
}


@dataclass
class StepConfig:
    """One step: a stage with its config, or a command with its arguments."""

    name: str
    stage: str | None = None
    command: str | None = None
    config: str | None = None
    inputs: dict[str, str] = field(default_factory=dict)
    args: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    nproc: int | None = None

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise ValueError(f"step {self.name}: a name has letters, digits, _ and - only, since it is a folder too")
        if (self.stage is None) == (self.command is None):
            raise ValueError(f"step {self.name}: set either stage or command")
        if self.command is not None:
            if self.command not in COMMANDS:
                raise ValueError(f"step {self.name}: command = {self.command}: choose one of {', '.join(COMMANDS)}")
            if self.config or self.inputs or self.nproc:
                raise ValueError(
                    f"step {self.name}: config, inputs and nproc belong to stages; a command takes args, set"
                )
        elif self.args:
            raise ValueError(f"step {self.name}: args belong to commands; a stage takes config, inputs, set")


@dataclass
class PipelineConfig:
    """Steps in the order in which they run; `nproc` ranks per stage where a step does not say otherwise."""

    name: str
    run_dir: str
    steps: list[StepConfig]
    nproc: int = 1

    def __post_init__(self):
        names = [step.name for step in self.steps]
        twice = [name for name in names if names.count(name) > 1]
        if not names or twice:
            raise ValueError(f"steps: {f'{twice[0]} appears twice' if twice else 'a pipeline needs at least one step'}")
        reserved = {"name", "run_dir", "steps", "nproc"} & {*names}
        if reserved:
            raise ValueError(
                f"steps: {reserved.pop()} is a key of the pipeline itself; choose another name for that step"
            )


@dataclass
class Step:
    """A step ready to run: `arguments` follow `seedling`; `reads` is all that decides whether it must run again.

    `nproc` is set where the step itself says how many processes it has; it then stays on one machine.
    """

    name: str
    kind: str
    arguments: list[str]
    output: Path | None
    reads: dict[str, Any]
    nproc: int | None = None

    @property
    def is_spread(self) -> bool:
        """Whether it runs on as many machines and processes as its pipeline is given."""
        return "stage" in self.reads and self.nproc is None


@dataclass
class Pipeline:
    """A loaded pipeline; `said` is what its user typed after `seedling`, for messages that say how to go on."""

    name: str
    said: str
    run_dir: Path
    steps: list[Step]
    nproc: int = 1


def load_pipeline(name: str, *, overrides: Sequence[str] = ()) -> Pipeline:
    """Load the pipeline of a path or packaged name; overrides are `STEP.key=value`, `run_dir=...` or `nproc=N`."""
    file = find_config(name, folder="pipelines")
    cfg, per_step = read_steps(PipelineConfig, file, overrides=overrides)
    return resolve_steps(cfg, file=file, overrides=per_step, said=shlex.join(["pipeline", name, *overrides]))


def read_steps(schema: type[C], file: Path, *, overrides: Sequence[str]) -> tuple[C, list[str]]:
    """Read a file whose schema holds steps and has a name, a run_dir and nproc; return the overrides for its steps."""
    own, per_step = _split_overrides(overrides)
    # References are ours to resolve, step by step: OmegaConf would look for them among the pipeline's own keys.
    sources = [Source(source.name, _map_texts(source.values, _escaped)) for source in [*read_sources(file), *own]]
    return merge(schema, sources).config, per_step


def resolve_steps(cfg: PipelineConfig, *, file: Path, overrides: Sequence[str], said: str) -> Pipeline:
    """Turn configured steps into the commands that they run."""
    _apply(overrides, cfg)
    run_dir = Path(cfg.run_dir)
    known = {"run_dir": str(run_dir)}
    steps = []
    for step_cfg in cfg.steps:
        step = _resolve(step_cfg, cfg, file=file, known=known)
        steps.append(step)
        if step.output is not None:
            known[step.name] = str(step.output)
    return Pipeline(cfg.name, said, run_dir, steps, cfg.nproc)


def _split_overrides(overrides: Sequence[str]) -> tuple[list[Source], list[str]]:
    own = [text for text in overrides if text.lstrip("+").partition("=")[0] in ("name", "run_dir", "nproc")]
    return [parse_override(text) for text in own], [text for text in overrides if text not in own]


def _apply(overrides: Sequence[str], cfg: PipelineConfig) -> None:
    """Add each `STEP.key=value` to the `set` of its step (`STEP.nproc=N` to the step itself)."""
    steps = {step.name: step for step in cfg.steps}
    for text in overrides:
        parse_override(text)
        key, _, value = text.lstrip("+").partition("=")
        name, _, rest = key.strip().partition(".")
        if name not in steps or not rest:
            near = get_close_matches(name, steps, n=1)
            hint = f"nearest step: {near[0]}" if near and near[0] != name else f"steps: {', '.join(steps)}"
            raise ConfigError(f"override {text}: expected STEP.key=value, run_dir=... or nproc=N; {hint}")
        parsed = parse_override(f"value={value}").values["value"]
        if rest == "nproc":
            steps[name].nproc = parsed
        else:
            steps[name].set[rest] = parsed


def _resolve(cfg: StepConfig, pipeline: PipelineConfig, *, file: Path, known: dict[str, str]) -> Step:
    def fill(text: str) -> str:
        return _fill(text, known, where=f"{file}: step {cfg.name}")

    folder = Path(pipeline.run_dir) / cfg.name
    options, arguments = _map_texts(cfg.set, fill), [fill(argument) for argument in cfg.args]
    if cfg.command is not None:
        writes = COMMANDS[cfg.command]
        if cfg.command == "contextualize":
            flags = _contextualize_settings(options, where=f"{file}: step {cfg.name}")
        else:
            flags = [part for key, value in options.items() for part in _flag(key, value)]
        out = ["--out", str(folder)] if writes else []
        reads = {"command": cfg.command, "arguments": arguments, "options": options}
        return Step(cfg.name, cfg.command, [cfg.command, *arguments, *out, *flags], folder if writes else None, reads)
    assert cfg.stage is not None, "StepConfig has a stage or a command"
    overrides = {**{f"inputs.{key}": fill(value) for key, value in cfg.inputs.items()}, **options}
    texts = [f"{key}={yaml_argument(value)}" for key, value in overrides.items()]
    texts.insert(0, f"run_dir={yaml_argument(str(folder))}")
    config = None if cfg.config is None else find_config(fill(cfg.config), folder="stages", beside=file.parent)
    try:
        _, loaded = load_stage_config(cfg.stage, config, overrides=texts)
    except ValueError as error:
        raise ConfigError(f"{file}: step {cfg.name}: {error}") from error
    arguments = ["run", cfg.stage, *(["--config", str(config)] if config else []), *texts]
    reads = {"stage": cfg.stage, "config": {**loaded.values, "run_dir": None}}
    return Step(cfg.name, cfg.stage, arguments, folder / "artifact", reads, nproc=cfg.nproc)


def _contextualize_settings(options: Mapping[str, Any], *, where: str) -> list[str]:
    """Return the settings of this command as it takes them, `key=value`; checked now, as those of a stage are."""
    settings = {key: value for key, value in options.items() if key != "config"}
    config = options.get("config")
    texts = [f"{key}={yaml_argument(value)}" for key, value in settings.items()]
    try:
        load_contexts_config(config, overrides=texts)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    return [*(["--config", str(config)] if config else []), *texts]


def _flag(key: str, value: Any) -> list[str]:
    """Return a command's option as arguments: {jobs: 2} is `--jobs 2`, {force: true} is `--force`."""
    name = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return [name] if value else []
    return [name, str(value)]


def yaml_argument(value: Any) -> str:
    """Return a value as it may be typed after `key=`: bare where YAML reads it back as it is, else as JSON."""
    if isinstance(value, str) and value and "${" not in value:
        try:
            if parse_override(f"value={value}").values["value"] == value:
                return value
        except ConfigError:
            pass
    return json.dumps(value, ensure_ascii=False)


def _map_texts(values: Any, change) -> Any:
    if isinstance(values, Mapping):
        return {key: _map_texts(value, change) for key, value in values.items()}
    if isinstance(values, list):
        return [_map_texts(value, change) for value in values]
    return change(values) if isinstance(values, str) else values


def _escaped(text: str) -> str:
    return text.replace("${", "\\${")


def _fill(text: str, known: Mapping[str, str], *, where: str) -> str:
    """Replace every `${NAME}` in a text."""

    def value_of(match: re.Match) -> str:
        name = match[1].strip()
        if name.startswith("oc.env:"):
            variable = name.removeprefix("oc.env:")
            if variable not in os.environ:
                raise ConfigError(f"{where}: {match[0]}: the environment variable {variable} is not set")
            return os.environ[variable]
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"nearest: ${{{near[0]}}}" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{where}: {match[0]} is no earlier step with an output; {hint}")
        return known[name]

    return re.sub(r"\$\{([^}]*)\}", value_of, text)
