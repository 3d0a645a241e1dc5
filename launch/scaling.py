"""The scaling study: encoders of several sizes trained on one plan, and the line through loss against log2 of size.

Seed-ASR's law (section 3.6.1, figure 7) is ssl_loss = -0.16 log2(N) + 6.31, N the encoder's parameters. A YAML names
the sizes; each becomes a step of a pipeline (and one more for its layer probe), so that finished sizes are skipped and
an interrupted one goes on, as in any pipeline:

    name: scaling_demo
    run_dir: runs/scaling_demo
    steps: [...]                                        # what comes before: data, as in a pipeline
    pretrain: {config: pretrain_demo, set: {...}}       # encoder_pretrain; every size shares it
    probe: {config: probe_demo, set: {...}}             # layer_probe of each; may be left out
    sizes:
      - {name: small, set: {encoder.dim: 64}}           # at least three
"""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..data.scoring.figure import Mark, svg_figure
from ..data.scoring.linear_fit import FEWEST_POINTS, LinearFit, fit_line
from ..data.whole_file import whole_file, write_json
from ..model.conformer import ConformerConfig, ConformerEncoder
from ..stages.runtime.artifacts import Artifact, load_artifact
from .commands.artifacts import parameters_by_part
from .pipeline_config import Pipeline, PipelineConfig, StepConfig, read_steps, resolve_steps
from .stage_lookup import find_config

PAPER = {"loss": (-0.16, 6.31), "wer": (-0.25, 10.36)}  # slope and intercept; the WER is after sft, in percent
# Of the probe's chosen layer. Its loss, nats a byte, still tells small encoders apart whose error rates are all near 1.
PROBE = {"wer": "wer", "cer": "cer", "probe_loss": "loss"}
TITLES = {
    "loss": ("masked prediction loss", "nats a frame"),
    "wer": ("WER of the layer probe", "WER"),
    "cer": ("CER of the layer probe", "CER"),
    "probe_loss": ("CTC loss of the layer probe", "nats a byte"),
}
# What a size may set: all else would change what is learnt, or from what.
OF_A_SIZE = ("encoder", "train.lr", "train.precision", "train.zero_stage")


@dataclass
class LadderStage:
    """A stage that every size runs: its config and overrides."""

    config: str | None = None
    set: dict[str, Any] = field(default_factory=dict)


@dataclass
class SizeConfig:
    """One encoder of the ladder: overrides of encoder_pretrain's config."""

    name: str
    set: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        wrong = [key for key in self.set if not any(f"{key}.".startswith(f"{name}.") for name in OF_A_SIZE)]
        if wrong:
            raise ValueError(
                f"size {self.name} sets {wrong[0]}; a size may set {', '.join(OF_A_SIZE)} only, so that all learn the "
                "same from the same plan: set it for all in pretrain.set"
            )


@dataclass
class ScalingConfig:
    name: str
    run_dir: str
    pretrain: LadderStage
    sizes: list[SizeConfig]
    probe: LadderStage | None = None
    steps: list[StepConfig] = field(default_factory=list)
    valid: str = "dev"  # the set in pretrain's data.valid whose loss is fitted
    nproc: int = 1

    def __post_init__(self):
        if len(self.sizes) < FEWEST_POINTS:
            raise ValueError(
                f"sizes has {len(self.sizes)}; a line with an interval needs at least {FEWEST_POINTS} sizes"
            )

    def pipeline(self) -> PipelineConfig:
        """Return the steps before, then pretraining and probe of each size."""
        steps = list(self.steps)
        for size in self.sizes:
            settings = {**self.pretrain.set, **size.set}
            name = f"pretrain_{size.name}"
            steps.append(StepConfig(name, stage="encoder_pretrain", config=self.pretrain.config, set=settings))
            if self.probe is not None:
                inputs = {"encoder": f"${{{name}}}"}
                probe = StepConfig(f"probe_{size.name}", stage="layer_probe", config=self.probe.config, inputs=inputs)
                probe.set = dict(self.probe.set)
                steps.append(probe)
        return PipelineConfig(self.name, self.run_dir, steps, self.nproc)


class Point(NamedTuple):
    """One size, measured: `values` are the loss and, with a probe, its errors (as fractions) and its loss."""

    size: str
    parameters: int
    values: dict[str, float]

    @property
    def log2(self) -> float:
        return math.log2(self.parameters)


def load_ladder(name: str, *, overrides: Sequence[str] = ()) -> tuple[ScalingConfig, Pipeline]:
    """Load the scaling study of a path or packaged name, everything checked; overrides as for a pipeline's steps."""
    file = find_config(name, folder="scaling")
    cfg, per_step = read_steps(ScalingConfig, file, overrides=overrides)
    said = shlex.join(["scaling", name, *overrides])
    pipeline = resolve_steps(cfg.pipeline(), file=file, overrides=per_step, said=said)
    first = next(step for step in pipeline.steps if step.kind == "encoder_pretrain")
    valid = first.reads["config"]["data"]["valid"]
    if cfg.valid not in valid:
        raise ValueError(
            f"{file}: valid = {cfg.valid}: pretrain has {', '.join(valid) or 'no set'} in data.valid; set "
            f"pretrain.set data.valid.{cfg.valid}, whose loss is fitted"
        )
    sizes = {_encoder_parameters(step.reads["config"]["encoder"]) for step in pipeline.steps if step.kind == first.kind}
    if len(sizes) < FEWEST_POINTS:
        raise ValueError(
            f"{file}: its sizes have {len(sizes)} different numbers of parameters "
            f"({', '.join(map(str, sorted(sizes)))}); a line needs at least {FEWEST_POINTS}: change encoder.dim or "
            "encoder.num_layers"
        )
    return cfg, pipeline


def _encoder_parameters(encoder: dict) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in ConformerEncoder(ConformerConfig(**encoder)).parameters())


def measure(cfg: ScalingConfig, pipeline: Pipeline) -> list[Point]:
    """Read what the finished sizes say. ValueError where they were not trained on the same plan for as many steps."""
    outputs = {step.name: step.output for step in pipeline.steps}
    points, seen = [], {}
    for size in cfg.sizes:
        pretrained = load_artifact(outputs[f"pretrain_{size.name}"], kind="speech_encoder", verify=False)
        values = {"loss": pretrained.metrics[f"valid/{cfg.valid}/loss"]}
        if cfg.probe is not None:
            probe = load_artifact(outputs[f"probe_{size.name}"], kind="layer_probe", verify=False)
            values |= {name: probe.metrics[metric] for name, metric in PROBE.items()}
        points.append(Point(size.name, parameters_by_part(pretrained.path)["encoder"], values))
        seen[size.name] = _trained_on(pretrained)
    names = list(seen)
    other = next((name for name in names if seen[name] != seen[names[0]]), None)
    if other is not None:
        raise ValueError(
            f"sizes {names[0]} and {other} were not trained alike: {seen[names[0]]} and {seen[other]}; give all sizes "
            "the same data, seed, batches and steps"
        )
    return points


def _trained_on(pretrained: Artifact) -> str:
    return f"{pretrained.facts['steps']} steps on data {pretrained.facts['data_fingerprint'][:16]}"


def write_study(cfg: ScalingConfig, pipeline: Pipeline) -> dict[str, LinearFit]:
    """Write RUN/scaling.json, RUN/scaling_loss.svg and, with a probe, one figure for each of its measures."""
    points = measure(cfg, pipeline)
    fits = {name: fit_line([p.log2 for p in points], [p.values[name] for p in points]) for name in points[0].values}
    report = {
        "name": cfg.name,
        "points": [{"size": p.size, "parameters": p.parameters, "log2": p.log2, **p.values} for p in points],
        "fits": {name: _described(fit) for name, fit in fits.items()},
        "paper": {name: {"slope": slope, "intercept": intercept} for name, (slope, intercept) in PAPER.items()},
    }
    write_json(pipeline.run_dir / "scaling.json", report)
    for name, fit in fits.items():
        with whole_file(pipeline.run_dir / f"scaling_{name}.svg") as handle:
            handle.write(scaling_figure(points, name, fit).encode())
    return fits


def _described(fit: LinearFit) -> dict[str, Any]:
    return {
        "slope": fit.slope,
        "slope_interval": fit.slope_interval,
        "intercept": fit.intercept,
        "intercept_interval": fit.intercept_interval,
        "residual_deviation": fit.residual_deviation,
        "confidence": fit.confidence,
        "points": fit.points,
    }


def scaling_figure(points: Sequence[Point], name: str, fit: LinearFit) -> str:
    """Return the SVG of a measure against size: points, line, the line's interval, and the paper's line of the loss."""
    low, high = min(p.log2 for p in points), max(p.log2 for p in points)
    grid = [low + (high - low) * i / 40 for i in range(41)]
    ends = [low, high]
    sign = "-" if fit.intercept < 0 else "+"
    line = f"{fit.slope:.3g} log2(N) {sign} {abs(fit.intercept):.3g}"
    marks = [
        Mark("measured", [p.log2 for p in points], [p.values[name] for p in points], "dots", colour=0),
        Mark(f"fit: {line}", ends, [fit.at(x) for x in ends], colour=0),
        Mark(
            f"{fit.confidence:.0%} interval of the line",
            grid,
            [fit.at(x) + fit.half_width(x) for x in grid],
            "band",
            lows=[fit.at(x) - fit.half_width(x) for x in grid],
            colour=0,
        ),
    ]
    if name == "loss":
        slope, intercept = PAPER[name]
        paper = [slope * x + intercept for x in ends]
        marks.append(Mark(f"Seed-ASR: {slope} log2(N) + {intercept}", ends, paper, "dashed", colour=1))
    title, unit = TITLES[name]
    return svg_figure(
        marks,
        title=f"{title} by encoder size",
        x_label="parameters of the encoder (log scale)",
        y_label=unit,
        percent=name in ("wer", "cer"),
        x_ticks={p.log2: short_count(p.parameters) for p in points},
    )


def short_count(number: int) -> str:
    """Write a parameter count: 1.8B, 75M, 310k."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def print_study(fits: dict[str, LinearFit], run_dir: Path) -> None:
    """Print each fitted line with its intervals."""
    for name, fit in fits.items():
        slope, intercept = fit.slope_interval, fit.intercept_interval
        print(
            f"{name} = {fit.slope:.4g} * log2(N) + {fit.intercept:.4g}   slope {slope[0]:.4g} to {slope[1]:.4g}, "
            f"intercept {intercept[0]:.4g} to {intercept[1]:.4g} ({fit.confidence:.0%}, {fit.points} sizes)"
        )
    print(f"Seed-ASR: loss = {PAPER['loss'][0]} * log2(N) + {PAPER['loss'][1]}")
    print(f"{run_dir / 'scaling.json'} and scaling_*.svg beside it")
