"""What became of every module and block: quantization.json for programs, quantization.md for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .sensitivity import Sensitivity
from .storage import Storage


@dataclass
class ModuleReport:
    """What became of a module. `error` is |(w~ - w) X|^2 / |w X|^2 on the calibration inputs, before refinement."""

    name: str
    bits: int
    group_size: int
    weights: int
    bits_per_weight: float
    tokens: int
    error: float | None
    seconds: float
    fallback: str = ""


@dataclass
class BlockReport:
    """`refinement` has the fields of blockwise.RefineReport, whose errors are over the variance of the targets."""

    name: str
    modules: list[ModuleReport] = field(default_factory=list)
    refinement: dict[str, Any] | None = None


def read_report(values: dict[str, Any]) -> BlockReport:
    """Return a report that was kept as JSON."""
    return BlockReport(**{**values, "modules": [ModuleReport(**one) for one in values["modules"]]})


def write_reports(
    folder: Path, blocks: Sequence[BlockReport], *, storage: Storage, sensitivity: Sequence[Sensitivity] = ()
) -> None:
    """Write both files into `folder`."""
    said = {
        "bits_per_weight": storage.bits_per_weight,
        "ratio_to_16_bits": storage.ratio,
        "blocks": [asdict(block) for block in blocks],
        "sensitivity": [asdict(one) for one in sensitivity],
    }
    (folder / "quantization.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    (folder / "quantization.md").write_text(as_markdown(blocks, storage=storage), encoding="utf-8")


def summary_metrics(blocks: Sequence[BlockReport], *, storage: Storage) -> dict[str, float]:
    """Return what the manifest says: bits per weight of what is packed, model size, errors, fallbacks."""
    modules = [one for block in blocks for one in block.modules]
    errors = [one.error for one in modules if one.error is not None]
    return {
        "bits_per_weight": storage.bits_per_weight,
        "packed_weights": storage.weights,
        "ratio_to_16_bits": storage.ratio,  # how many times as large it were with 16 bits for packed weights
        "worst_error": max(errors, default=0.0),
        "mean_error": sum(errors) / max(len(errors), 1),
        "fallbacks": sum(1 for one in modules if one.fallback),
    }


def worst_module(blocks: Sequence[BlockReport]) -> ModuleReport | None:
    """Return the module with the largest relative output error."""
    judged = [one for block in blocks for one in block.modules if one.error is not None]
    return max(judged, key=lambda one: one.error or 0.0, default=None)


def size_in_words(storage: Storage) -> str:
    """Say what packed weights take. The comparison is to 16 bits, in whatever precision the input was stored."""
    return (
        f"{storage.bits_per_weight:.3f} bits per packed weight; the model is {storage.ratio:.2f} times as small as "
        "with 16 bits a packed weight"
    )


def as_markdown(blocks: Sequence[BlockReport], *, storage: Storage) -> str:
    lines = [
        f"{size_in_words(storage)}.",
        "",
        "`error` is |(w~ - w) X|^2 / |w X|^2 on the calibration inputs, before refinement.",
        "",
        "| module | bits | group | bits per weight | tokens | error | seconds | fallback |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in (one for block in blocks for one in block.modules):
        error = "-" if one.error is None else f"{one.error:.5f}"
        lines.append(
            f"| {one.name} | {one.bits} | {one.group_size} | {one.bits_per_weight:.3f} | {one.tokens:,} | {error} | "
            f"{one.seconds:.2f} | {one.fallback} |"
        )
    refined = [block for block in blocks if block.refinement]
    if refined:
        lines += ["", "| block | held-out loss over variance, before refinement | after | kept |", "|---|---|---|---|"]
        for block in refined:
            said = block.refinement or {}
            lines.append(f"| {block.name} | {said['before']:.5f} | {said['after']:.5f} | {said['kept']} |")
    return "\n".join(lines) + "\n"
