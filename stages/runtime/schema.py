"""What a config schema (a tree of dataclasses) can say about itself: its keys, their types, the nearest valid key.

OmegaConf checks values, but its messages name neither the file nor the way out. This walk finds unknown keys first and
in the order in which the user wrote them, so that an error can say which key was probably meant.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, make_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

# Names that users of other speech toolkits type, and the key that does the same here. They are not accepted in silence:
# the same word means different units elsewhere (max_duration counts one GPU, ours counts a micro-batch), so the error
# teaches.
ALIASES = {
    "lr": "train.lr",
    "learning_rate": "train.lr",
    "max_duration": "train.micro_batch_seconds",
    "batch_duration": "train.micro_batch_seconds",
    "batch_size": "train.micro_batch_seconds",
    "micro_batch_size": "train.micro_batch_seconds",
    "train_micro_batch_size_per_gpu": "train.micro_batch_seconds",
    "global_batch_size": "train.global_batch_seconds",
    "train_batch_size": "train.global_batch_seconds",
    "gradient_accumulation_steps": "train.global_batch_seconds",
    "accum_grad": "train.global_batch_seconds",
    "batch_tokens": "max_tokens",
    "quadratic_duration": "quadratic_seconds",
    "shuffle_buffer_size": "window_utterances",
    "gradient_clip": "train.grad_clip",
    "gradient_clip_val": "train.grad_clip",
    "max_grad_norm": "train.grad_clip",
    "warmup": "train.warmup_steps",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "num_train_epochs": "train.epochs",
    "max_epochs": "train.epochs",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_last",
    "eval_steps": "train.eval_every",
    "logging_steps": "train.log_every",
    "bf16": "train.precision",
    "dtype": "train.precision",
    "ds_config": "train.deepspeed_extra",
    "deepspeed": "train.deepspeed_extra",
    "zero_optimization": "train.zero_stage",
    "report_to": "train.wandb.mode",
    "resume_from_checkpoint": "train.resume",
    "output_dir": "run_dir",
    "exp_dir": "run_dir",
    "encoder_projector_ds_rate": "converter.stride",
    "freeze_encoder": "encoder_training",
    "freeze_llm": "llm_training",
}


def section_of(hint: Any) -> type | None:
    """Return the dataclass behind a type hint (`X` or `X | None`), or None where the hint is not a section of keys."""
    if isinstance(hint, type) and is_dataclass(hint):
        return hint
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if typing.get_origin(hint) in (typing.Union, types.UnionType) and len(parts) == 1:
        return section_of(parts[0])
    return None


def accepts_none(hint: Any) -> bool:
    """Whether `null` is a legal value."""
    return hint is Any or type(None) in typing.get_args(hint)


def container_of(hint: Any) -> tuple[type | None, Any]:
    """Return (dict or list, type of its items), looking through `| None`; (None, Any) for anything else."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        return container_of(parts[0]) if len(parts) == 1 else (None, Any)
    origin, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is dict:
        return dict, arguments[1] if arguments else Any
    if origin in (list, tuple):
        return list, arguments[0] if arguments else Any
    return None, Any


def keys_of(section: type) -> dict[str, Any]:
    """Return {key: type hint} of a dataclass, in the order of its fields; string annotations are resolved."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in fields(section) if field.init}


def all_optional(section: type, *, name: str) -> type:
    """Return a dataclass with the keys of `section`, all null by default: values that change what is set elsewhere."""
    return make_dataclass(name, [(key, hint | None, None) for key, hint in keys_of(section).items()])


def given_values(section: Any) -> dict[str, Any]:
    """Return the keys of an instance that are set."""
    return {key: value for key in keys_of(type(section)) if (value := getattr(section, key)) is not None}


def all_keys(section: type, *, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key of a schema, sections before the keys inside them."""
    for key, hint in keys_of(section).items():
        yield prefix + key
        inner = section_of(hint)
        if inner is not None:
            yield from all_keys(inner, prefix=f"{prefix}{key}.")


def hint_at(section: type, path: str) -> Any:
    """Return the type hint at a dotted key (`train.lr.encoder`, `steps[1].name`); Any where the schema is open."""
    hint: Any = section
    for part in path.replace("[", ".[").split("."):
        inner = section_of(hint)
        if inner is not None:
            hint = keys_of(inner).get(part, Any)
        else:
            hint = container_of(hint)[1]
    return hint


def type_name(hint: Any) -> str:
    """Say in words what a key expects: `int`, `float or null`, `a list of str`, `a mapping of names to float`."""
    section = section_of(hint)
    if section is not None:
        return f"a section with the keys {', '.join(keys_of(section))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if part is type(None) else type_name(part) for part in typing.get_args(hint))
    container, item = container_of(hint)
    if container is dict:
        return "a mapping of names to " + ("values" if item is Any else type_name(item))
    if container is list:
        return "a list of " + ("values" if item is Any else type_name(item))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    if hint is Path:
        return "a path"
    return getattr(hint, "__name__", "any value")


def advice(schema: type, path: str) -> str:
    """Say which key was probably meant by the unknown dotted key `path`.

    A known name of another toolkit comes first, then the same name in another section, then the nearest spelling among
    the neighbours, then among all keys; where nothing is near, the keys of that section are listed.
    """
    keys = list(all_keys(schema))
    parent, _, name = path.rpartition(".")
    meant = ALIASES.get(name)
    if meant is not None:
        for key in keys:
            if key == meant or key.endswith(f".{meant}"):
                return f"here it is called {key}"
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"nearest valid key: {elsewhere[0]}"
    section = section_of(hint_at(schema, parent)) if parent else schema
    neighbours = keys_of(section) if section is not None else {}
    prefix = f"{parent}." if parent else ""
    for key in neighbours:
        # lr_encoder where lr is a mapping: the name belongs behind a dot.
        if name.startswith(f"{key}_") and container_of(neighbours[key])[0] is dict:
            return f"nearest valid key: {prefix}{key}.{name.removeprefix(f'{key}_')}"
    near = difflib.get_close_matches(name, neighbours, n=1, cutoff=0.6)
    if near:
        return f"nearest valid key: {prefix}{near[0]}"
    names = {key.rpartition(".")[2]: key for key in reversed(keys)}
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    if near:
        return f"nearest valid key: {names[near[0]]}"
    return f"valid keys{f' of {parent}' if parent else ''}: {', '.join(neighbours)}"


def walk(section: type, values: Mapping, *, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield (dotted key, value, problem) for every leaf that `values` sets; `problem` is empty where the shape fits.

    Only the shape is judged here (unknown keys, a value where a section belongs): whether a number is one is
    OmegaConf's.
    """
    hints = keys_of(section)
    for key, value in values.items():
        path = f"{prefix}{key}"
        if key not in hints:
            yield path, value, "unknown"
        else:
            yield from _walk_value(hints[key], value, path)


def _walk_value(hint: Any, value: Any, path: str) -> Iterator[tuple[str, Any, str]]:
    section, (container, item) = section_of(hint), container_of(hint)
    reference = isinstance(value, str) and "${" in value
    if reference or (value is None and accepts_none(hint)):
        yield path, value, ""
    elif section is not None or container is dict:
        if not isinstance(value, Mapping):
            yield path, value, "type"
        elif section is not None:
            yield from walk(section, value, prefix=f"{path}.")
        elif not value:
            yield path, {}, ""
        else:
            for key, inner in value.items():
                yield from _walk_value(item, inner, f"{path}.{key}")
    elif container is list and isinstance(value, list) and section_of(item) is not None:
        broken = [leaf for i, inner in enumerate(value) for leaf in _walk_value(item, inner, f"{path}[{i}]") if leaf[2]]
        yield from broken or [(path, value, "")]
    elif isinstance(value, bool) and hint in (str, Path):
        # YAML reads a bare `no`, `on` or `yes` as a boolean; as text it would silently become "False" (lang: no).
        yield path, value, "type"
    else:
        yield path, value, ""
