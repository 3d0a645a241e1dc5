"""Config: a dataclass is the schema, YAML holds what differs from its defaults, overrides come last.

Order: defaults < the `base:` YAML (one level, beside the file that names it) < the YAML < overrides `key.sub=value`.
The result is plain dataclasses; nothing downstream knows OmegaConf. Every leaf remembers where its value came from.

What a schema may use: int, float, str, bool, Path, Enum, `X | None`, unions of scalars (`int | str`), list[...] and
dict[str, ...] as deep as you like, dataclasses, `Dataclass | None`, lists and dicts of dataclasses, `Any`. A field
without a default must be set by the user. Not possible in OmegaConf: Literal (use str and check it in `__post_init__`),
unions of containers, sets. Tuples arrive as lists of any length, so annotate lists. A `__post_init__` that raises
ValueError is reported with the file and the section.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from .schema import advice, hint_at, section_of, type_name, walk
from .train_config import TrainConfig

C = TypeVar("C")


@dataclass(kw_only=True)
class StageConfig:
    """What every stage's config has; a stage adds its own sections."""

    stage: str  # name in STAGES, or module:Class; filled in by `seedling run STAGE`
    run_dir: str  # checkpoints/, artifact/ and logs of this run
    inputs: dict[str, str] = field(default_factory=dict)  # name in the stage's `consumes` -> artifact folder
    seed: int = 1


@dataclass(kw_only=True)
class TrainingStageConfig(StageConfig):
    """What every stage with gradients has. A stage that computes has no `train`, where nothing would take effect."""

    train: TrainConfig = field(default_factory=TrainConfig)


class ConfigError(ValueError):
    """The user's config is wrong: one line that names file, key, value and the way out."""


class Source(NamedTuple):
    """Values from one place. `name` is what errors and `seedling show` call it: base F, F, override."""

    name: str
    values: dict[str, Any]

    def where(self, key: str, value: Any) -> str:
        """Name a value the way its user wrote it: `a.yaml: train.lr = 1` or `override train.lr=1`."""
        while self.name == "override" and isinstance(value, dict) and len(value) == 1:
            ((inner, value),) = value.items()
            key = f"{key}.{inner}"
        shown = "null" if value is None else str(value)
        return f"override {key}={shown}" if self.name == "override" else f"{self.name}: {key} = {shown}"


@dataclass
class Loaded(Generic[C]):
    """A config, its values as plain containers, and the origin of every leaf."""

    config: C
    values: dict[str, Any]
    origins: dict[str, str]

    def origin(self, key: str) -> str:
        """Return where the value of a dotted key was set: default, base F, F or override."""
        while key and key not in self.origins:
            key = key.rpartition(".")[0]
        return self.origins.get(key, "default")

    def to_yaml(self) -> str:
        """Return the resolved config as YAML, each value with its origin as a trailing comment."""
        return "\n".join(_yaml_lines(self.values, self)) + "\n"


def load_config(
    schema: type[C],
    file: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> Loaded[C]:
    """Load `file` (with its `base:`) and `overrides` into `schema`.

    `given` holds values that the calling command itself fixes ({"stage": "sft"}); they win over the file, not over
    overrides, and their origin is "command". Raises ConfigError with one line for anything that the user wrote wrongly.
    """
    sources = [] if file is None else read_sources(Path(file))
    if given:
        sources.append(Source("command", dict(given)))
    sources += [parse_override(text) for text in overrides]
    return merge(schema, sources)


def read_sources(file: Path) -> list[Source]:
    """Read a YAML file and the file that its `base:` names, as [base, file]."""
    values = read_yaml(file)
    base = values.pop("base", None)
    if base is None:
        return [Source(str(file), values)]
    if not isinstance(base, str):
        raise ConfigError(f"{file}: base = {base}: expected one file name")
    base_file = file.parent / base
    if not base_file.is_file():
        raise ConfigError(f"{file}: base = {base}: there is no file {base_file}")
    base_values = read_yaml(base_file)
    if "base" in base_values:
        raise ConfigError(f"{base_file}: base = {base_values['base']}: a base cannot have a base of its own ({file})")
    return [Source(f"base {base_file}", base_values), Source(str(file), values)]


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, references `${...}` unresolved."""
    if not file.is_file():
        raise ConfigError(f"{file}: no such config file")
    try:
        values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected keys and values, found a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def parse_override(text: str) -> Source:
    """Return `key.sub=value` as a Source; the value is read as YAML. Hydra's `+` and `++` in front are accepted."""
    key, equals, value = text.lstrip("+").partition("=")
    key = key.strip()
    if not equals or not re.fullmatch(r"[^\s.]+(\.[^\s.]+)*", key):
        raise ConfigError(f"override {text}: expected key.sub=value")
    try:
        parsed = _plain(OmegaConf.from_dotlist([f"value={value}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {text}: the value is not valid YAML: {_one_line(error)}") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    assert isinstance(parsed, dict), "a key has at least one part"
    return Source("override", parsed)


def _plain(tree: DictConfig) -> dict[str, Any]:
    """Return a tree's plain values, references `${...}` as they were typed."""
    values = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def merge(schema: type[C], sources: Sequence[Source]) -> Loaded[C]:
    """Merge sources, later ones winning, into an instance of `schema`; the checks and messages of `load_config`."""
    tree: DictConfig = OmegaConf.structured(schema)
    origins: dict[str, str] = {}
    for source in sources:
        for key, value, problem in walk(schema, source.values):
            if problem == "unknown":
                raise ConfigError(f"{source.where(key, value)}: unknown key; {advice(schema, key)}")
            if problem == "type":
                raise _wrong_type(schema, source, key, value)
            for known in [known for known in origins if known.startswith((f"{key}.", f"{key}["))]:
                del origins[known]
            origins[key] = source.name
        try:
            merged = OmegaConf.merge(tree, OmegaConf.create(source.values))
        except OmegaConfBaseException as error:
            key = str(error.full_key or next(iter(source.values), ""))
            raise _wrong_type(schema, source, key, _value_at(source.values, key)) from error
        assert isinstance(merged, DictConfig)
        tree = merged
    names = ", ".join(dict.fromkeys(source.name for source in sources)) or "defaults"
    config = _to_object(schema, tree, names)
    values = OmegaConf.to_container(tree, resolve=True, enum_to_str=True)
    return Loaded(config, _without_paths(values), origins)


def _to_object(schema: type[C], tree: DictConfig, names: str) -> C:
    """Build the dataclasses; a missing value, a broken reference or a `__post_init__` that refuses is a ConfigError."""
    try:
        config = OmegaConf.to_object(tree)
    except MissingMandatoryValue as error:
        key = _required_leaf(schema, str(error.full_key))
        wanted = type_name(hint_at(schema, key))
        raise ConfigError(f"{names}: {key} is not set; give it in the file or as {key}=VALUE ({wanted})") from error
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        reference = OmegaConf.to_container(tree, resolve=False)
        value = _value_at(reference, key)
        raise ConfigError(f"{names}: {key} = {value}: {_one_line(error)}") from error
    except ValueError as error:
        section = _refusing_section(schema, tree)
        raise ConfigError(f"{names}: {f'section {section}: ' if section else ''}{_one_line(error)}") from error
    assert isinstance(config, schema)
    return config


def _required_leaf(schema: type, key: str) -> str:
    """Follow a missing section to the first key in it that has no default: that is what the user can set."""
    section = section_of(hint_at(schema, key))
    for part in fields(section) if section is not None else ():
        if part.default is MISSING and part.default_factory is MISSING:
            return _required_leaf(schema, f"{key}.{part.name}")
    return key


def _refusing_section(schema: type, tree: DictConfig, prefix: str = "") -> str:
    """Return the dotted name of the innermost section whose own `__post_init__` raises ValueError ("" for the root)."""
    for key in tree:
        node = tree._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and section_of(hint_at(schema, f"{prefix}{key}")):
            try:
                OmegaConf.to_object(node)
            except ValueError:
                return _refusing_section(schema, node, f"{prefix}{key}.") or f"{prefix}{key}"
    return prefix.rstrip(".")


def _wrong_type(schema: type, source: Source, key: str, value: Any) -> ConfigError:
    wanted = type_name(hint_at(schema, key))
    found = "null" if value is None else type(value).__name__
    remedy = f'; put it in quotes: "{value}"' if isinstance(value, bool) and wanted in ("str", "a path") else ""
    return ConfigError(f"{source.where(key, value)}: expected {wanted}, found {found}{remedy}")


def _value_at(values: Any, key: str) -> Any:
    """Return the value at a dotted key with [i] for list items; None where the path ends early."""
    for part in key.replace("[", ".").replace("]", "").split("."):
        if isinstance(values, Mapping):
            values = values.get(part)
        elif (
            isinstance(values, Sequence) and not isinstance(values, str) and part.isdigit() and int(part) < len(values)
        ):
            values = values[int(part)]
        else:
            break
    return values


def _one_line(error: Exception) -> str:
    """The first line of OmegaConf's message holds the fact, the rest internal names; YAML's lines belong together."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) if isinstance(error, yaml.YAMLError) else (lines[0] if lines else type(error).__name__)


def _without_paths(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _without_paths(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_without_paths(value) for value in values]
    return str(values) if isinstance(values, Path) else values


def _yaml_lines(values: Mapping[str, Any], loaded: Loaded, path: str = "", indent: str = "") -> list[str]:
    lines = []
    for key, value in values.items():
        here = f"{path}{key}"
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{key}:")
            lines += _yaml_lines(value, loaded, f"{here}.", indent + "  ")
        else:
            lines.append(f"{f'{indent}{key}: {yaml_scalar(value)}':<48}  # {loaded.origin(here)}")
    return lines


def yaml_scalar(value: Any) -> str:
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
