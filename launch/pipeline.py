"""Run a pipeline: every step is its own process, and is skipped where what it reads and what it made are unchanged.

A stamp per step (RUN/.pipeline/NAME.json) holds a hash of what the step read (resolved config, manifests of its inputs,
fingerprints of its data) and of what it produced. The same hash and an unchanged output: skipped. The same hash but not
finished: started again in the same folder, where a stage resumes from its last checkpoint. Another hash: started anew,
and what was there is kept beside it as NAME.1, since a changed word in a config must not cost anyone a week of
training.
"""

import hashlib
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..stages.runtime.signals import EXIT_INTERRUPTED
from .fingerprint import audio_fingerprint, corpora_on_servers, fingerprint, paths_in
from .pipeline_config import Pipeline, Step
from .placement import LOOPBACK, Placement
from .process import child_environment, run_child

BEGIN_SECONDS = 600
RATES = {"wer", "cer", "mer", "rate", "fraction", "recall", "precision", "f1"}


@dataclass
class Outcome:
    """How a step ended; `code` is its exit code, `metrics` come from its artifact's manifest."""

    code: int
    seconds: float
    skipped: bool
    metrics: dict[str, Any]


def run_pipeline(
    pipeline: Pipeline, *, start: str | None = None, only: str | None = None, placement: Placement | None = None
) -> int:
    """Run all steps, or one, forced to run anew from step `start` on; return 0 or the exit code of the one that failed.

    Stages run where `placement` says. On several machines that are started without one another only one step at a time
    can run: the others could not know that the first machine's step has failed.
    """
    placement = placement or Placement(nproc=pipeline.nproc)
    names = [step.name for step in pipeline.steps]
    for option, name in (("--from", start), ("--only", only)):
        if name is not None and name not in names:
            raise ValueError(f"{option} {name}: no such step; steps: {', '.join(names)}")
    if placement.nnodes > 1 and only is None:
        raise ValueError(f"--nnodes {placement.nnodes}: machines run a pipeline a step at a time; add --only STEP")
    forced_from = len(names) if start is None else names.index(start)
    outcomes: dict[str, Outcome] = {}
    for number, step in enumerate(pipeline.steps):
        if only not in (None, step.name):
            continue
        print(f"\n== {pipeline.name} {number + 1}/{len(names)}: {step.name} ({step.kind})", flush=True)
        outcome = run_step(step, run_dir=pipeline.run_dir, forced=number >= forced_from, placement=placement)
        if outcome.code:
            print_table(pipeline, outcomes)
            print(
                f"seedling: pipeline {pipeline.name} stopped at step {step.name} (exit code {outcome.code}); to go on: "
                f"seedling {pipeline.said} (finished steps are skipped, {step.name} continues where it was)",
                file=sys.stderr,
            )
            return outcome.code
        outcomes[step.name] = outcome
        if placement.is_first:
            write_summary(pipeline, outcomes)
            report = step.output / "report.html" if step.output is not None else None
            if report is not None and report.is_file():
                shutil.copyfile(report, pipeline.run_dir / "report.html")
    print_table(pipeline, outcomes)
    return 0


def run_step(step: Step, *, run_dir: Path, forced: bool, placement: Placement) -> Outcome:
    """Run one step in a process of its own, or skip it. The first machine alone writes the stamp."""
    stamp_file = run_dir / ".pipeline" / f"{step.name}.json"
    if not placement.is_first:
        if not step.is_spread:
            raise ValueError(f"step {step.name} runs on one machine: start it with --nnodes 1")
        _await_first_machine(step, stamp_file)
    stamp = _read_json(stamp_file)
    reads = digest(step)
    unchanged = stamp.get("reads") == reads and not forced
    if unchanged and step.output is not None and stamp.get("made") == fingerprint(step.output):
        print(f"unchanged since {stamp['finished']}: skipped", flush=True)
        return Outcome(0, stamp["seconds"], True, metrics_of(step))
    if placement.is_first:
        if stamp and not unchanged:
            _keep_aside(run_dir / step.name)
        _write_json(stamp_file, {"reads": reads})
    arguments = [*step.arguments, *placement_of_step(step, placement)]
    print("$ seedling", *arguments, flush=True)
    began = time.monotonic()
    ended = run_child([sys.executable, "-m", "seedling.launch.cli", *arguments], environment=child_environment())
    seconds = round(time.monotonic() - began, 1)
    if ended.code or ended.asked:
        return Outcome(ended.code or EXIT_INTERRUPTED, seconds, False, {})
    if placement.is_first:
        made = None if step.output is None else fingerprint(step.output)
        if made == "absent":
            print(f"seedling: step {step.name} ended without its output {step.output}", file=sys.stderr)
            return Outcome(1, seconds, False, {})
        finished = time.strftime("%Y-%m-%d %H:%M:%S")
        _write_json(stamp_file, {"reads": reads, "made": made, "seconds": seconds, "finished": finished})
    return Outcome(0, seconds, False, metrics_of(step))


def placement_of_step(step: Step, placement: Placement) -> list[str]:
    """Return the options that place a step: the pipeline's, or its own number of processes on this machine."""
    if "stage" not in step.reads:
        return []
    if step.nproc is None:
        return placement.options()
    # Where the pipeline's ranks are always children, so are these.
    return Placement(nproc=step.nproc, master_addr=placement.master_addr and LOOPBACK).options()


def _await_first_machine(step: Step, stamp_file: Path) -> None:
    """Wait until machine 0 has begun this very step: it may first move the folder of another run aside."""
    deadline = time.monotonic() + BEGIN_SECONDS
    while _read_json(stamp_file).get("reads") != digest(step):
        if time.monotonic() > deadline:
            raise ValueError(
                f"step {step.name}: machine 0 has not begun it in {BEGIN_SECONDS} s ({stamp_file}); start the same "
                "command there, with the same overrides, and see that all machines share this folder"
            )
        time.sleep(1)


def digest(step: Step) -> str:
    """Hash all that decides what a step produces: the version, its config or options, and what those name.

    Raises HostError where it reads from a server that does not answer now; nothing has been moved or begun then.
    """
    files = {path: fingerprint(path) for path in sorted(set(paths_in(step.reads)))}
    files |= corpora_on_servers(step.reads)
    if step.kind == "prepare":
        files |= {f"audio of {path}": audio_fingerprint(path) for path in files}
    text = json.dumps([__version__, step.reads, files], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def metrics_of(step: Step) -> dict[str, Any]:
    """Return the metrics in a stage's manifest, or the totals of a corpus or of contexts; {} for other outputs."""
    if step.output is None:
        return {}
    metrics = _read_json(step.output / "manifest.json").get("metrics")
    if metrics is None:
        corpus = _read_json(step.output / "corpus.json")
        metrics = {"utterances": corpus["utterances"], "hours": corpus["seconds"] / 3600} if corpus else {}
        metrics |= _read_json(step.output / "contexts.json").get("counts", {})
    on_valid = [value for key, value in metrics.items() if key.startswith("valid/") and key.endswith("/wer")]
    if len(on_valid) == 1:  # the one word error rate of a training stage, under the name that every stage uses
        metrics = {"wer": on_valid[0], **metrics}
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


def write_summary(pipeline: Pipeline, outcomes: dict[str, Outcome]) -> None:
    """Write RUN/summary.json: {"stages": {NAME: {metric: value, "seconds": s}}}, rates as fractions.

    Steps that another call ran (--only) are kept.
    """
    file = pipeline.run_dir / "summary.json"
    stages = _read_json(file).get("stages", {})
    stages |= {name: {**outcome.metrics, "seconds": outcome.seconds} for name, outcome in outcomes.items()}
    stages = {step.name: stages[step.name] for step in pipeline.steps if step.name in stages}
    _write_json(file, {"pipeline": pipeline.name, "stages": stages})


def print_table(pipeline: Pipeline, outcomes: dict[str, Outcome]) -> None:
    """Print a line per finished step: name, seconds, metrics (rates in percent), and whether it was skipped."""
    if not outcomes:
        return
    width = max(len(name) for name in outcomes)
    print(f"\n{'step':<{width}}  {'seconds':>8}  metrics")
    for name, outcome in outcomes.items():
        metrics = "  ".join(f"{key} {shown(key, value)}" for key, value in outcome.metrics.items())
        note = "  (unchanged, skipped)" if outcome.skipped else ""
        print(f"{name:<{width}}  {outcome.seconds:>8.1f}  {metrics}{note}")
    total = sum(outcome.seconds for outcome in outcomes.values() if not outcome.skipped)
    print(f"{'this run':<{width}}  {total:>8.1f}  {pipeline.run_dir / 'summary.json'}", flush=True)


def shown(name: str, value: float) -> str:
    """Return a metric as a reader wants it: rates (`wer`, `wer_low`, `ctc_wer`) in percent, others in four digits."""
    if not RATES.isdisjoint(name.replace("/", "_").split("_")):
        return f"{100 * value:.2f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _keep_aside(folder: Path) -> None:
    if not folder.exists():
        return
    number = 1
    while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(kept)
    print(f"starting anew; what was there is kept in {kept}", flush=True)


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write_json(path: Path, values: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
