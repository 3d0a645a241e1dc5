"""The command `doctor`: what would go wrong with a run on these machines, and what to do about it."""

import argparse
from typing import Any


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parser of `doctor`."""
    text = "versions, GPUs, links, clocks, limits, disk and data of every rank; 1 where a run would fail"
    parser = commands.add_parser("doctor", help=text, description=f"{text}. Start it as the run is started.")
    parser.add_argument("stage", nargs="?", help="a stage such as sft, or module:Class of your own")
    parser.add_argument("--config", metavar="F", help="a YAML file, or the name of a packaged one")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the YAML")
    parser.set_defaults(action=doctor)


def doctor(arguments: argparse.Namespace) -> int:
    """Gather facts on every rank that this process is one of; rank 0 prints the findings."""
    from ...stages.runtime.world import init_world, leave_world
    from ..doctor import Needs, diagnose, fails, format_findings
    from ..rank_facts import gather_facts

    cfg, planned, needs = None, None, Needs()
    if arguments.stage:
        cfg, planned, needs = needs_of(arguments.stage, arguments.config, overrides=arguments.overrides)
    world = init_world()
    findings = diagnose(gather_facts(world, run_dir=cfg.run_dir if cfg else ".", planned=planned), needs)
    if world.is_main:
        print(format_findings(findings))
    leave_world()
    return int(fails(findings))


def needs_of(name: str, config: str | None, *, overrides: list[str]) -> tuple[Any, Any, Any]:
    """Return a stage's config, its planned batches (None where it trains nothing), and what it needs of a rank."""
    import torch

    from ...stages.runtime.artifacts import load_inputs
    from ...stages.runtime.zero_memory import model_sizes
    from ..doctor import Needs
    from ..stage_lookup import load_stage_config

    stage_class, loaded = load_stage_config(name, config, overrides=overrides)
    stage, cfg = stage_class(), loaded.config
    if hasattr(stage, "run"):
        return cfg, None, Needs()
    inputs = load_inputs(stage.consumes, cfg.inputs, stage=cfg.stage)
    with torch.device("meta"):
        model = stage.build(cfg, inputs)
    sizes, planned = model_sizes(stage, model, cfg.train), stage.batches(cfg, "train")
    # A checkpoint has weights and what ZeRO holds in 32 bits of all that learns; the artifact all weights.
    checkpoint, artifact = 16 * sizes.trainable, 4 * (sizes.trainable + sizes.frozen)
    needs = Needs(
        workers=cfg.train.num_workers,
        batch_bytes=int(4 * 16000 * cfg.train.micro_batch_seconds),
        shards=len(planned.plan.corpus.shards),
        disk_bytes=(cfg.train.keep_last + 1) * checkpoint + artifact,
    )
    return cfg, planned, needs
