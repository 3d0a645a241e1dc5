"""Commands about one stage: show its config, check that it can run, run it."""

import argparse
from pathlib import Path
from typing import Any

from ..placement import Placement, add_placement, placement_of

SHOWN = 5  # bad utterances of a micro-batch


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parsers of this family."""
    for name, action, text in (
        ("show", show, "print the resolved config, each value with where it was set"),
        ("check", check, "build on meta, check inputs, shapes, plan and batches; train nothing"),
        ("run", run, "run a stage to its artifact, going on from the last checkpoint"),
    ):
        parser = commands.add_parser(name, help=text, description=text)
        parser.add_argument("stage", help="a stage such as sft, or module:Class of your own")
        parser.add_argument("--config", metavar="F", help="a YAML file, or the name of a packaged one")
        if name == "run":
            add_placement(parser)
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the YAML")
        parser.set_defaults(action=action)


def show(arguments: argparse.Namespace) -> None:
    """Print the resolved config."""
    from ..stage_lookup import load_stage_config

    _, loaded = load_stage_config(arguments.stage, arguments.config, overrides=arguments.overrides)
    print(loaded.to_yaml(), end="")


def run(arguments: argparse.Namespace) -> int:
    """Run a stage in this process, or on several ranks through DeepSpeed's launcher."""
    return run_on(arguments.stage, arguments.config, overrides=arguments.overrides, placement=placement_of(arguments))


def run_on(stage: str, config: str | None, *, overrides: list[str], placement: Placement) -> int:
    """Run a stage's ranks where `placement` says; return the exit code. Config errors show before ranks start."""
    from ..job import run_job
    from ..process import launch_ranks
    from ..stage_lookup import load_stage_config

    if placement.in_this_process:
        run_job(stage, config, overrides=overrides)
        return 0
    stage_class, loaded = load_stage_config(stage, config, overrides=overrides)
    if not hasattr(stage_class, "run"):
        loaded.config.train.accumulation_steps(placement.size)
    run_dir = Path(loaded.config.run_dir)
    arguments = [stage, *(["--config", config] if config else []), *overrides]
    if placement.hostfile:  # shells on the way would change quotes and brackets
        resolved = run_dir / "launch" / "config.yaml"
        resolved.parent.mkdir(parents=True, exist_ok=True)
        resolved.write_text(loaded.to_yaml(), encoding="utf-8")
        arguments = [stage, "--config", str(resolved.resolve())]
    return launch_ranks(arguments, placement=placement, run_dir=run_dir)


def check(arguments: argparse.Namespace) -> None:
    """Print what a run would do: inputs, parameters by group, shapes, data; read the dearest micro-batches."""
    from ...stages.runtime.artifacts import load_inputs
    from ..stage_lookup import load_stage_config

    stage_class, loaded = load_stage_config(arguments.stage, arguments.config, overrides=arguments.overrides)
    stage, cfg = stage_class(), loaded.config
    inputs = load_inputs(stage.consumes, cfg.inputs, stage=cfg.stage)
    print(f"stage {cfg.stage} writes {stage.produces} to {cfg.run_dir}/artifact")
    for name, artifact in inputs.items():
        print(f"input {name}: {artifact.path} ({artifact.kind})")
    if hasattr(stage, "run"):
        print("no training in this stage: nothing more to check")
        return
    model = check_model(stage, cfg, inputs)
    check_shapes(stage, model, check_plan(stage, cfg))
    check_validation(stage, cfg)


def check_model(stage: Any, cfg: Any, inputs: dict) -> Any:
    """Build the model without memory for its weights, print its parameters by group, and return it."""
    import torch

    from ...stages.runtime.parameters import format_table, freeze_others, optimizer_groups, parameter_table

    with torch.device("meta"):
        model = stage.build(cfg, inputs)
    groups = freeze_others(model, stage.trainable)
    optimizer_groups(groups, cfg.train)
    print(format_table(parameter_table(model, groups, cfg.train.lr)))
    return model


def check_plan(stage: Any, cfg: Any) -> Any:
    """Plan the first epoch, read its dearest micro-batch, print both, and return the latter."""
    planned = stage.batches(cfg, "train")
    summary, batch = check_set("an epoch", planned, stage)
    train = cfg.train
    steps = train.max_steps or summary.steps * train.epochs
    length = f"{steps:,} steps, {steps / summary.steps:.1f} epochs" if train.max_steps else f"{train.epochs} epochs"
    M = train.micro_batches
    shares = ", ".join(str(R) for R in range(1, M + 1) if M % R == 0)
    print(f"the run: {length}; {M} micro-batches a step, to be shared by {shares} processes")
    return batch


def check_validation(stage: Any, cfg: Any) -> None:
    """Open every validation set, read its dearest micro-batch, and print both."""
    from ...stages.runtime.stage import validation_sets

    sets = validation_sets(stage, cfg)
    for name, planned in sets.items():
        check_set(f"validation set {name}", planned, stage)
    if not sets:
        print("no validation set: the run will say nothing of how well it does on other data")


def check_set(title: str, planned: Any, stage: Any) -> tuple[Any, Any]:
    """Print what a pass over planned batches holds and its dearest micro-batch; return its summary and that batch."""
    from ...stages.runtime.stage import LATE

    summary = planned.plan.summary(0)
    print(f"{title}: {summary.steps:,} steps, {summary.micro_batches:,} micro-batches")
    print(f"  of {planned.plan.amount(summary)}")
    if summary.num_refused:
        first = summary.refused[0]
        print(f"  refused by the limits: {summary.num_refused:,}, the first {first.key}: {first.reason}")
    batch = planned.dataset[summary.largest._replace(index=LATE)]
    print(f"  dearest micro-batch: {batch.amount}, normaliser {stage.count(batch):,}, {len(batch.bad)} bad")
    for bad in batch.bad[:SHOWN]:
        print(f"    {bad}")
    return summary, batch


def check_shapes(stage: Any, model: Any, batch: Any) -> None:
    """Take the loss of a batch with weights that have a shape and no values; a shape that does not fit raises."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )

    from ...stages.runtime.stage import give_shapes

    give_shapes(stage, model)  # only what meets a weight loses its values: lengths and token ids stay what they are
    try:
        stage.loss(model, batch)
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        print(f"shapes: all fit as far as {error.func}, which needs values")
    else:
        print("shapes: all fit, from the dearest micro-batch to the loss")
