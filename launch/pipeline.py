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
from .fingerprint import audio_fingerprint, fingerprint, paths_in
from .pipeline_config import Pipeline, Step
from .process import child_environment, run_child

STOPPED = 75  # EX_TEMPFAIL, as a stage that was asked to stop: start again to go on
RATES = {"wer", "cer", "mer", "rate", "fraction", "recall", "precision", "f1"}


@dataclass
class Outcome:
    """How a step ended; `code` is its exit code, `metrics` come from its artifact's manifest."""

    code: int
    seconds: float
    skipped: bool
    metrics: dict[str, Any]


def run_pipeline(pipeline: Pipeline, *, start: str | None = None) -> int:
    """Run all steps, forced to run anew from step `start` on; return 0 or the exit code of the step that failed."""
    names = [step.name for step in pipeline.steps]
    if start is not None and start not in names:
        raise ValueError(f"--from {start}: no such step; steps: {', '.join(names)}")
    forced_from = len(names) if start is None else names.index(start)
    outcomes: dict[str, Outcome] = {}
    for number, step in enumerate(pipeline.steps):
        print(f"\n== {pipeline.name} {number + 1}/{len(names)}: {step.name} ({step.kind})", flush=True)
        outcome = run_step(step, run_dir=pipeline.run_dir, forced=number >= forced_from)
        if outcome.code:
            print_table(pipeline, outcomes)
            print(
                f"seedling: pipeline {pipeline.name} stopped at step {step.name} (exit code {outcome.code}); to go on: "
                f"seedling {pipeline.said} (finished steps are skipped, {step.name} continues where it was)",
                file=sys.stderr,
            )
            return outcome.code
        outcomes[step.name] = outcome
        write_summary(pipeline, outcomes)
        report = step.output / "report.html" if step.output is not None else None
        if report is not None and report.is_file():
            shutil.copyfile(report, pipeline.run_dir / "report.html")
    print_table(pipeline, outcomes)
    return 0


def run_step(step: Step, *, run_dir: Path, forced: bool) -> Outcome:
    """Run one step in a process of its own, or skip it."""
    stamp_file = run_dir / ".pipeline" / f"{step.name}.json"
    stamp = _read_json(stamp_file)
    reads = digest(step)
    unchanged = stamp.get("reads") == reads and not forced
    if unchanged and step.output is not None and stamp.get("made") == fingerprint(step.output):
        print(f"unchanged since {stamp['finished']}: skipped", flush=True)
        return Outcome(0, stamp["seconds"], True, metrics_of(step))
    if stamp and not unchanged:
        _keep_aside(run_dir / step.name)
    _write_json(stamp_file, {"reads": reads})
    print("$ seedling", *step.arguments, flush=True)
    began = time.monotonic()
    command = [sys.executable, "-m", "seedling.launch.cli", *step.arguments]
    ended = run_child(command, environment=child_environment())
    seconds = round(time.monotonic() - began, 1)
    if ended.code or ended.asked:
        return Outcome(ended.code or STOPPED, seconds, False, {})
    made = None if step.output is None else fingerprint(step.output)
    if made == "absent":
        print(f"seedling: step {step.name} ended without its output {step.output}", file=sys.stderr)
        return Outcome(1, seconds, False, {})
    finished = time.strftime("%Y-%m-%d %H:%M:%S")
    _write_json(stamp_file, {"reads": reads, "made": made, "seconds": seconds, "finished": finished})
    return Outcome(0, seconds, False, metrics_of(step))


def digest(step: Step) -> str:
    """Hash all that decides what a step produces: the version, its config or options, and what those name on disk."""
    files = {path: fingerprint(path) for path in sorted(set(paths_in(step.reads)))}
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
    """Write RUN/summary.json: {"stages": {NAME: {metric: value, "seconds": s}}}, rates as fractions."""
    stages = {name: {**outcome.metrics, "seconds": outcome.seconds} for name, outcome in outcomes.items()}
    _write_json(pipeline.run_dir / "summary.json", {"pipeline": pipeline.name, "stages": stages})


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
