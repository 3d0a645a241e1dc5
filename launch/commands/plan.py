"""The command `plan`: what a run will need, said without a GPU; and beside what a run has measured, with `--run`."""

import argparse
import json
from pathlib import Path
from typing import Any

GB = 1e9


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the parser of `plan`."""
    text = "memory by part for each ZeRO stage, steps, operations, hours, communication; no GPU needed"
    parser = commands.add_parser("plan", help=text, description=text)
    parser.add_argument("stage", help="a training stage such as sft, or module:Class of your own")
    parser.add_argument("--config", metavar="F", help="a YAML file, or the name of a packaged one")
    parser.add_argument(
        "--ranks", default="1,8,64,256", metavar="R,R,...", help="processes, one a GPU (default %(default)s)"
    )
    parser.add_argument(
        "--gpu",
        default="h200",
        help="h200, h100, a100, or GB,TFLOP/s,GB/s,GB/s[,TFLOP/s]: memory, bf16, link in a node of 8, network for each "
        "GPU, fp32",
    )
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the GPU's peak that training reaches (0.4)")
    parser.add_argument("--run", metavar="RUN", help="a run of this config, to print what it measured")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values that win over the YAML")
    parser.set_defaults(action=plan)


def plan(arguments: argparse.Namespace) -> int:
    """Print the plan; 1 where the config fits on none of the numbers of ranks."""
    from ...stages.runtime.gpus import parse_gpu
    from ..fitting import Fitting
    from ..plan import left_out, plan_run, settings
    from ..stage_lookup import load_stage_config

    gpu, ranks = parse_gpu(arguments.gpu), parse_ranks(arguments.ranks)
    if not 0 < arguments.mfu <= 1:
        raise ValueError(f"--mfu is {arguments.mfu}; it is a share of the GPU's peak, above 0 and at most 1")
    stage_class, loaded = load_stage_config(arguments.stage, arguments.config, overrides=arguments.overrides)
    if hasattr(stage_class, "run"):
        raise ValueError(f"stage {arguments.stage} does not train: there are no steps to plan")
    run = plan_run(stage_class(), loaded.config)
    print_work(run)
    known = settings(run, ranks)
    print(f"\nmemory of a rank at its peak, GB of 1e9 bytes; {gpu}")
    print_memory(known, gpu)
    print(f"\nan optimizer step of {run.train.micro_batches} micro-batches, {arguments.mfu:.0%} of the peak")
    print_pace(run, known, gpu, mfu=arguments.mfu)
    for remark in left_out(run):
        print(remark)
    fitting, some = Fitting(run, gpu), False
    for R in ranks:
        try:
            fit = fitting.nearest(R)
        except ValueError as error:
            said = f"cannot run: {error}"
        else:
            said, some = verdict(fit, R), some or (fit is not None and fits_as_it_is(fit, R))
        print(f"{R} ranks, ZeRO {run.train.effective_zero_stage}: {said}")
    if arguments.run:
        print_measured(run, Path(arguments.run))
    return 0 if some else 1


def fits_as_it_is(fit: Any, ranks: int) -> bool:
    """Whether at most the size of a step is changed, so that the ranks can share its micro-batches."""
    return fit.ranks == ranks and fit.changes.keys() <= {"train.global_batch_seconds"}


def verdict(fit: Any, ranks: int) -> str:
    """Say whether the run fits on so many ranks, and else with what it does."""
    if fit is None:
        return "too large; no ZeRO stage, micro-batch or number of ranks helps: take another GPU or a smaller model"
    what = "fits" if fits_as_it_is(fit, ranks) else "too large; fits"
    where = "" if fit.ranks == ranks else f" on {fit.ranks} ranks"
    return f"{what}{where}{f' with {fit}' if fit.changes else ''}"


def parse_ranks(text: str) -> list[int]:
    """Return the numbers of a list such as 8,64."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--ranks is {text!r}; give numbers of processes, as 8,64,256")
    return [int(part) for part in parts]


def print_work(run: Any) -> None:
    """Print parameters, data and operations."""
    from ...stages.runtime.parameters import format_table

    print(format_table(run.groups))
    print(f"an epoch: {run.epoch.steps:,} steps, {run.epoch.micro_batches:,} micro-batches, {run.amount}")
    print(
        f"the run: {run.steps:,} steps of {run.train.micro_batches} micro-batches, "
        f"{run.steps / run.epoch.steps:.3g} epochs"
    )
    print(f"largest micro-batch: {run.largest}, {run.targets:,} targets")
    trace = run.trace_under(run.train.effective_zero_stage)
    flops = trace.flops
    print(
        f"  operations: forward {flops.forward:.3g}, backward {flops.backward:.3g}, recomputed {flops.recomputed:.3g}; "
        f"a step {run.step_flops:.3g}, the run {run.step_flops * run.steps:.3g}"
    )
    print(f"  activations: {trace.activations / GB:.3g} GB at most, {trace.saved / GB:.3g} GB between passes")
    if run.generation:
        print(f"  keys and values of its hypotheses: {run.generation / GB:.3g} GB")


def print_memory(known: list[Any], gpu: Any) -> None:
    """Print a row for each setting."""
    parts = ("weights", "masters", "gradients", "moments", "buffers", "activations")
    print(f"{'ranks':>6}{'ZeRO':>6}" + "".join(f"{part:>12}" for part in parts) + f"{'total':>9}  {'peak in':<16}fits")
    for at in known:
        memory = at.memory
        row = "".join(f"{getattr(memory, part) / GB:>12.2f}" for part in parts)
        verdict = "yes" if at.fits(gpu) else "no"
        print(f"{at.ranks:>6}{at.zero_stage:>6}{row}{memory.total / GB:>9.2f}  {memory.moment:<16}{verdict}")


def print_pace(run: Any, known: list[Any], gpu: Any, *, mfu: float) -> None:
    """Print seconds and bytes of a step, and the hours of the run, for each setting."""
    from ..plan import pace

    head = f"{'ranks':>6}{'ZeRO':>6}{'a rank has':>12}{'arithmetic s':>14}{'sent GB':>10}{'alone s':>10}"
    print(f"{head}{'efficiency':>14}{'hours':>20}")
    for at in known:
        speed = pace(run, at, gpu, mfu=mfu)
        least, most = speed.efficiency
        slow, fast = (seconds * run.steps / 3600 for seconds in speed.seconds)
        step = f"{speed.arithmetic:>14.3g}{at.traffic.sent / GB:>10.3g}{speed.between:>10.3g}"
        ends = f"{f'{least:.0%} to {most:.0%}':>14}{f'{fast:.3g} to {slow:.3g}':>20}"
        print(f"{at.ranks:>6}{at.zero_stage:>6}{at.accumulation:>12}{step}{ends}")
    uneven = sorted({at.ranks for at in known if run.train.micro_batches % at.ranks})
    if uneven:
        print(
            f"{', '.join(map(str, uneven))} ranks do not divide {run.train.micro_batches} micro-batches: counted as if "
            "train.global_batch_seconds were raised until they do"
        )


def print_measured(run: Any, folder: Path) -> None:
    """Print the peak that a run has logged beside the one that is planned for it."""
    from ..plan import setting

    file = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    seen = [line for line in lines if "train/mem_growth_gb" in line]
    if not seen:
        raise ValueError(
            f"{file}: no line has train/mem_growth_gb; the run has logged no step yet, or is of an older version"
        )
    ranks = seen[-1]["train/ranks"]  # a run may go on with others: each has its own peak
    measured = max(line["train/mem_growth_gb"] for line in seen if line["train/ranks"] == ranks)
    planned = setting(run, zero_stage=run.train.zero_stage, ranks=int(ranks)).memory.total / GB
    print(
        f"{folder}: on {ranks:g} ranks planned {planned:.2f} GB, measured {measured:.2f} GB, "
        f"{planned / measured - 1:+.1%}"
    )
