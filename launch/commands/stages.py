"""Commands about one stage: show its config, check that it can run, run it."""

import argparse
from typing import Any


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parsers of this family."""
    for name, action, text in (
        ("show", show, "print the resolved config, each value with where it was set"),
        ("check", check, "build on meta, check inputs, plan and batches; train nothing"),
        ("run", run, "run a stage to its artifact, going on from the last checkpoint"),
    ):
        parser = commands.add_parser(name, help=text, description=text)
        parser.add_argument("stage", help="a stage such as sft, or module:Class of your own")
        parser.add_argument("--config", metavar="F", help="a YAML file, or the name of a packaged one")
        if name == "run":
            parser.add_argument("--nproc", type=int, default=1, help="processes on this machine (default 1)")
        parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the YAML")
        parser.set_defaults(action=action)


def show(arguments: argparse.Namespace) -> None:
    """Print the resolved config."""
    from ..stage_lookup import load_stage_config

    _, loaded = load_stage_config(arguments.stage, arguments.config, overrides=arguments.overrides)
    print(loaded.to_yaml(), end="")


def run(arguments: argparse.Namespace) -> int:
    """Run a stage in this process, or on several ranks through DeepSpeed's launcher."""
    return run_on(arguments.stage, arguments.config, overrides=arguments.overrides, nproc=arguments.nproc)


def run_on(stage: str, config: str | None, *, overrides: list[str], nproc: int) -> int:
    """Run a stage on `nproc` ranks of this machine and return the exit code. Config errors show before ranks start."""
    from ..job import run_job
    from ..process import launch_ranks
    from ..stage_lookup import load_stage_config

    if nproc < 1:
        raise ValueError(f"--nproc is {nproc}; give the number of processes, 1 or more")
    if nproc == 1:
        run_job(stage, config, overrides=overrides)
        return 0
    stage_class, loaded = load_stage_config(stage, config, overrides=overrides)
    if not hasattr(stage_class, "run"):
        loaded.config.train.accumulation_steps(nproc)
    return launch_ranks([stage, *(["--config", config] if config else []), *overrides], nproc=nproc)


def check(arguments: argparse.Namespace) -> None:
    """Print what a run would do: its inputs, parameters by group, steps and padding; read the dearest micro-batch."""
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
    check_model(stage, cfg, inputs)
    check_plan(stage, cfg)


def check_model(stage: Any, cfg: Any, inputs: dict) -> None:
    """Build the model without memory for its weights and print its parameters by group."""
    import torch

    from ...stages.runtime.parameters import format_table, freeze_others, optimizer_groups, parameter_table

    with torch.device("meta"):
        model = stage.build(cfg, inputs)
    groups = freeze_others(model, stage.trainable)
    optimizer_groups(groups, cfg.train)
    print(format_table(parameter_table(model, groups, cfg.train.lr)))


def check_plan(stage: Any, cfg: Any) -> None:
    """Plan the first epoch, read its dearest micro-batch, and print both."""
    planned = stage.batches(cfg, "train")
    summary = planned.plan.summary(0)
    print(f"an epoch: {summary.steps:,} steps, {summary.micro_batches:,} micro-batches")
    print(
        f"  of {summary.utterances:,} utterances, {summary.seconds / 3600:.2f} h, "
        f"padding {100 * summary.padding_fraction:.1f} %"
    )
    if summary.num_refused:
        first = summary.refused[0]
        print(f"refused by the limits: {summary.num_refused:,} utterances, the first {first.key}: {first.reason}")
    batch = planned.dataset[summary.largest]
    print(
        f"dearest micro-batch: {len(batch)} utterances, {batch.seconds:.1f} s, padding {100 * batch.padding:.1f} %, "
        f"normaliser {stage.count(batch):,}, {len(batch.bad)} bad"
    )
    train = cfg.train
    steps = train.max_steps or summary.steps * train.epochs
    length = f"{steps:,} steps, {steps / summary.steps:.1f} epochs" if train.max_steps else f"{train.epochs} epochs"
    M = train.micro_batches
    shares = ", ".join(str(R) for R in range(1, M + 1) if M % R == 0)
    print(f"the run: {length}; {M} micro-batches a step, to be shared by {shares} processes")
