"""What a run says: a progress bar, metrics.jsonl, ledger.jsonl and W&B, all from rank 0.

    metrics.jsonl   one line a log step: {"step", "train/loss", "train/lr/encoder", ..., "valid/dev/wer", ...}
    ledger.jsonl    one line a step: {"step", "epoch", "utterances": [[shard, row], ...]}, what all ranks consumed

Both are cut back to the checkpoint's step on resume, so they read as if the run had never stopped. In W&B the x-axis is
`global_step`, logged as a value: W&B's own step cannot go back after a resume.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from .train_config import WandbConfig

log = logging.getLogger(__name__)


class _Lines:
    """A file of JSON lines with a `step` each, in their order, cut back to `keep_to_step` when opened."""

    def __init__(self, path: Path, *, keep_to_step: int):
        with path.open("a+b") as file:
            file.truncate(_end_of_step(file, keep_to_step))
            os.fsync(file.fileno())
        self.path, self.file = path, path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        except OSError as error:
            raise ValueError(
                f"{self.path}: {error.strerror}; make room and start again to go on from the last checkpoint"
            ) from error

    def sync(self) -> None:
        """Force what was written to disk: a power cut must not take lines of steps that a checkpoint has."""
        os.fsync(self.file.fileno())


def _end_of_step(file: BinaryIO, step: int) -> int:
    """Return the offset behind the last line of a step up to `step`, by bisection: a ledger may have 30 GB."""
    low, high = 0, file.seek(0, os.SEEK_END)  # lines that begin before low stay, those that begin from high on go
    while low < high:
        middle = (low + high) // 2
        file.seek(max(middle - 1, 0))
        if middle:
            file.readline()  # to the first line that begins at `middle` or behind it
        if file.tell() < high and _is_up_to(file.readline(), step):
            low = file.tell()
        else:
            high = middle
    return low


def _is_up_to(line: bytes, step: int) -> bool:
    """Whether a line is whole, and of a step up to `step`; a kill cuts the last one short."""
    try:
        return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except ValueError:
        return False


class RunLog:
    """The log of one run from `step` on. On other ranks than 0 every call is silent."""

    def __init__(self, run_dir: Path, *, cfg: WandbConfig, is_main: bool, step: int, total_steps: int, config: dict):
        self.is_main = is_main
        self.wandb = None
        if not is_main:
            return
        self.metrics_file = _Lines(run_dir / "metrics.jsonl", keep_to_step=step)
        self.ledger_file = _Lines(run_dir / "ledger.jsonl", keep_to_step=step)
        self.wandb = start_wandb(run_dir, cfg, config)
        self.total_steps, self.first_step, self.start = total_steps, step, time.monotonic()
        # A bar redraws its line; a file or a pipe gets a line a log step instead.
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            desc=run_dir.name,
            mininterval=1.0,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def say(self, message: str) -> None:
        """Print a line above the progress bar."""
        if self.is_main:
            tqdm.write(message)

    def advance(self, step: int, *, epoch: int, utterances: list) -> None:
        """One optimizer step is done: note what it consumed and move the bar."""
        if self.is_main:
            self.ledger_file.write({"step": step, "epoch": epoch, "utterances": utterances})
            self.bar.update(1)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Write named values of a step to metrics.jsonl and W&B, and the loss and the speed into the bar."""
        if not self.is_main:
            return
        self.metrics_file.write({"step": step, **values})
        if self.wandb:
            self.wandb.log({"global_step": step, **values})
        if "train/loss" in values:
            state = f"loss {values['train/loss']:.4g}, {speed(values)}"
            self.bar.set_postfix_str(state)
            if self.bar.disable:
                self.say(f"step {step}/{self.total_steps}, {state}, {self.time_left(step)} left")

    def time_left(self, step: int) -> str:
        """At the pace since the start or the resume, as h:mm:ss."""
        pace = (time.monotonic() - self.start) / max(1, step - self.first_step)
        return str(timedelta(seconds=round(pace * (self.total_steps - step))))

    def sync(self) -> None:
        """Force the files to disk; to be called before a checkpoint counts as written."""
        if self.is_main:
            self.metrics_file.sync()
            self.ledger_file.sync()

    def close(self) -> None:
        if self.is_main:
            self.bar.close()
            self.metrics_file.file.close()
            self.ledger_file.file.close()
            if self.wandb:
                self.wandb.finish()


def speed(values: dict[str, float]) -> str:
    """Say how fast a run is: in audio, or in tokens where there is none."""
    if "train/audio_hours_per_s" in values:
        return f"{values['train/audio_hours_per_s'] * 3600:.0f} s audio/s"
    return f"{values['train/tokens_per_s']:.0f} tokens/s"


def start_wandb(run_dir: Path, cfg: WandbConfig, config: dict) -> Any:
    """Start or continue this run folder's W&B run; None when disabled. No server in time: a warning, then offline."""
    mode = cfg.mode
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    if mode == "disabled":
        return None
    import wandb  # takes seconds to import

    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8), encoding="utf-8")
    settings = {
        "dir": str(run_dir),
        "project": cfg.project,
        "name": cfg.name or run_dir.name,
        "group": cfg.group or None,
        "id": id_file.read_text(encoding="utf-8").strip(),
        "config": config,
    }
    run = _online(wandb, settings, cfg.init_timeout_seconds) if mode == "online" else None
    if run is None:
        if mode == "online":  # the attempt may still hold the old id
            settings["id"] = secrets.token_hex(8)
            id_file.write_text(settings["id"], encoding="utf-8")
        run = wandb.init(mode="offline", settings=wandb.Settings(silent=True), **settings)
    run.define_metric("*", step_metric="global_step")
    return run


def _online(wandb: Any, settings: dict, timeout: float) -> Any:
    """Return an online run, or None and a warning. W&B retries for minutes where nothing answers, hence the thread."""
    result: list[Any] = []

    def connect() -> None:
        try:
            quiet = wandb.Settings(silent=True, init_timeout=timeout)
            result.append(wandb.init(mode="online", resume="allow", settings=quiet, **settings))
        except Exception as error:  # whatever W&B raises, a run must not die of its log
            result.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout + 5)
    if result and not isinstance(result[0], Exception):
        return result[0]
    reason = result[0] if result else f"no answer within {timeout:.0f} s"
    log.warning(
        f"W&B is not reachable ({reason}); logging offline, upload later with `wandb sync {settings['dir']}/wandb/*`"
    )
    return None
