"""Seeded faults, one after the other, in tiny runs: each run must end as the one that nothing happened to.

Between two starts of a run the number of ranks and the ZeRO stage may change. What is checked: every start ends by
itself or is ended by a signal of ours; it fails as its fault should; the next one goes on from the newest whole
checkpoint, which is the last one written unless the fault took that; and the finished run has the weights, the ledger
and the log lines of the undisturbed run.
"""

import json
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from faulty_stage import IN_A_CHECKPOINT, IN_A_STEP, ROW_BYTES
from forked_jobs import ForkedJob
from toy_jobs import largest_difference, load_weights, read_lines

from seedling.stages.runtime.checkpoint import damage, list_checkpoints
from seedling.stages.runtime.signals import EXIT_INTERRUPTED
from seedling.stages.runtime.watchdog import EXIT_HUNG

# To files of a run that has ended, before it is started again.
BETWEEN_STARTS = ("truncated", "flipped", "missing", "no_manifest", "half_ledger_line")
SHARD = "short_shard"
STEPS, SAVE_EVERY, UTTERANCES = 34, 3, 120
TRAIN = {"epochs": 2, "save_every": SAVE_EVERY, "dry_run": False, "max_nonfinite_steps": 0, "max_bad_fraction": 0.0}
GRACE_SECONDS = 60.0  # for the other ranks, once one has failed
# What the output of a start must say of its fault.
SAID = {
    "nan": "skipped, not finite: loss of",
    "no_room": "could not be written",
    "write_error": "could not be written",
    "hang": "no progress for",
    "crash": "fallen off the bus",
    SHARD: "utterances were unusable",
}


@dataclass
class Report:
    faults: dict[str, int] = field(default_factory=dict)
    runs: int = 0
    starts: int = 0
    largest_difference: float = 0.0
    most_steps_lost: int = 0

    def count(self, kind: str) -> None:
        self.faults[kind] = self.faults.get(kind, 0) + 1

    @property
    def total(self) -> int:
        return sum(self.faults.values())


def drill(root: Path, *, seed: int, count: int, patience: float = 600.0, say=lambda line: None) -> Report:
    """Let at least `count` faults happen; AssertionError names the run, its fault and what it wrote."""
    draws, report = random.Random(seed), Report()
    root.mkdir(parents=True, exist_ok=True)
    _write_shard(root)
    straight = _Start(root, {"name": "straight", "train": TRAIN}, ranks=1)
    began = time.monotonic()
    assert straight.end(patience) == [0], _output(root)
    hang_timeout = max(5.0, 2 * (time.monotonic() - began))  # on a busy machine a start is no hang
    while report.total < count:
        _disturbed_run(root, draws, report, patience=patience, hang_timeout=hang_timeout)
        report.runs += 1
        say(f"{report.total} faults in {report.starts} starts of {report.runs} runs")
    return report


class _Start:
    """One start of a run, and what a launcher does: once a rank has failed, the others are given time, then ended."""

    def __init__(self, root: Path, settings: dict, *, ranks: int):
        shutil.rmtree(root / "logs", ignore_errors=True)
        for log in root.glob("rank*.log"):
            log.unlink()
        (root / "fired").unlink(missing_ok=True)
        self.job = ForkedJob(root, settings, ranks=ranks, run="faulty_stage:main")

    def end(self, patience: float) -> list[int | None]:
        deadline, failed_at = time.monotonic() + patience, None
        while any(process.exitcode is None for process in self.job.ranks):
            time.sleep(0.05)
            if failed_at is None and any(process.exitcode for process in self.job.ranks):
                failed_at = time.monotonic()
                deadline = min(deadline, failed_at + GRACE_SECONDS)
            left = [process.pid for process in self.job.ranks if process.exitcode is None]
            if time.monotonic() > deadline or (failed_at is not None and all(map(_is_suspended, left))):
                break
        codes = [process.exitcode for process in self.job.ranks]
        self.job.kill()
        return codes


def _is_suspended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _disturbed_run(root: Path, draws: random.Random, report: Report, *, patience: float, hang_timeout: float) -> None:
    run = root / "run"
    shutil.rmtree(run, ignore_errors=True)
    sharded = draws.random() < 0.7  # stage 0 and the others do not go on from one another
    expected_step, at_least = 0, 0
    while True:
        ranks = draws.choice((1, 1, 2))
        stage = draws.choice((1, 2, 3)) if sharded else 0
        fault = _draw_fault(draws, ranks=ranks, step=expected_step)
        train = {**TRAIN, "zero_stage": stage, "hang_timeout": hang_timeout if fault["kind"] in ("stop", "hang") else 0}
        if fault["kind"] == SHARD:
            _write_shard(root, rows=fault["at"])
        injected = {"fault": fault} if fault["kind"] != SHARD else {}
        start = _Start(root, {"name": "run", "train": train, **injected}, ranks=ranks)
        codes = start.end(patience)
        report.starts += 1
        told = f"{fault} on {ranks} ranks, ZeRO {stage}, exit codes {codes}\n{_output(root)}"
        if expected_step:
            resumed = f"step_{expected_step:06d}: step {expected_step + 1} of"
            assert resumed in (root / "rank0.log").read_text(), f"no resume: {told}"
        _write_shard(root)
        if codes == [0] * ranks:
            assert not (root / "fired").exists(), f"the fault passed unnoticed: {told}"
            break
        fired = (root / "fired").exists() or fault["kind"] == SHARD
        assert fired, f"failed without a fault: {told}"
        report.count(fault["kind"])
        _check_end(fault, codes, told, run)
        at_least = _least_checkpoint(fault, run, before=expected_step)
        kind = draws.choice(BETWEEN_STARTS) if draws.random() < 0.4 else None
        if kind and _damage(run, kind, draws):
            report.count(kind)
            at_least -= 0 if kind == "half_ledger_line" else SAVE_EVERY
        whole = [path for path in list_checkpoints(run / "checkpoints") if damage(path) is None]
        before = _trained(run)
        expected_step = int(whole[0].name[5:]) if whole else 0
        assert expected_step >= at_least, f"checkpoint {expected_step}, should be {at_least} or later: {told}"
        report.most_steps_lost = max(report.most_steps_lost, before - expected_step)
    _check_run(root, report)


def _draw_fault(draws: random.Random, *, ranks: int, step: int) -> dict:
    kind = draws.choice((*IN_A_STEP, *IN_A_CHECKPOINT, SHARD))
    if kind == "stop" and ranks == 1:
        kind = "hang"  # alone it would wait to be continued, as it should
    at = step + draws.randint(1, 8) if kind in IN_A_STEP else draws.randint(1, 40)
    at = draws.randint(UTTERANCES // 2, UTTERANCES - 1) if kind == SHARD else at
    return {"kind": kind, "rank": draws.randrange(ranks), "at": at}


def _check_end(fault: dict, codes: list, told: str, run: Path) -> None:
    kind, mine = fault["kind"], codes[fault["rank"]]
    if kind in SAID:
        assert SAID[kind] in told, f"the output does not say why: {told}"
    if kind == "terminate":
        assert codes == [EXIT_INTERRUPTED] * len(codes), told
    elif kind in ("kill", "kill_in_save"):
        assert mine == -9, told
    elif kind == "stop":
        others = [code for rank, code in enumerate(codes) if rank != fault["rank"]]
        assert mine is None and others == [EXIT_HUNG], told
    elif kind == "hang":
        assert mine == EXIT_HUNG, told
    else:
        assert all(codes), told
    if kind in ("stop", "hang"):
        assert any("File " in file.read_text() for file in (run / "logs").glob("hang_rank_*.txt")), f"no stacks: {told}"
    if kind in ("no_room", "write_error"):
        assert not list((run / "checkpoints").glob(".*.partial")), f"a part of a checkpoint is left: {told}"


def _least_checkpoint(fault: dict, run: Path, *, before: int) -> int:
    """Return the step of a checkpoint that must be there and whole after a fault."""
    last = _trained(run) // SAVE_EVERY * SAVE_EVERY
    return max(before, last - (SAVE_EVERY if fault["kind"] in IN_A_CHECKPOINT or last == _trained(run) else 0))


def _trained(run: Path) -> int:
    ledger = run / "ledger.jsonl"
    return ledger.read_text().count("\n") if ledger.exists() else 0


def _damage(run: Path, kind: str, draws: random.Random) -> bool:
    """Do to a file of the newest checkpoint, or to the ledger, what power cuts and disks do; False if there is none."""
    if kind == "half_ledger_line":
        ledger = run / "ledger.jsonl"
        if not ledger.exists():
            return False
        with ledger.open("a") as file:
            file.write('{"step": 99, "epo')
        return True
    checkpoints = [path for path in list_checkpoints(run / "checkpoints") if damage(path) is None]
    if len(checkpoints) < 2:  # with one left it would begin anew, rightly, and the drill would take for ever
        return False
    files = sorted(path for path in checkpoints[0].rglob("*") if path.is_file())
    manifest = checkpoints[0] / "manifest.json"
    file = manifest if kind == "no_manifest" else draws.choice([path for path in files if path != manifest])
    content = file.read_bytes()
    if kind in ("missing", "no_manifest"):
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[: draws.randrange(len(content))])
    else:
        at = draws.randrange(len(content))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << draws.randrange(8)]) + content[at + 1 :])
    return True


def _check_run(root: Path, report: Report) -> None:
    run, straight = root / "run", root / "straight"
    ledger = read_lines(run / "ledger.jsonl")
    assert ledger == read_lines(straight / "ledger.jsonl") and len(ledger) == STEPS
    steps = [[line["step"] for line in read_lines(folder / "metrics.jsonl")] for folder in (run, straight)]
    assert steps[0] == steps[1]
    difference = largest_difference(load_weights(run), load_weights(straight))
    report.largest_difference = max(report.largest_difference, difference)
    assert difference <= 1e-6, f"weights differ by {difference}"


def _write_shard(root: Path, rows: int = UTTERANCES) -> None:
    (root / "shard.bin").write_bytes(b"\0" * ROW_BYTES * rows)


def _output(root: Path) -> str:
    return "\n".join(f"{log.name}: {log.read_text()[-4000:]}" for log in sorted(root.glob("rank*.log")))


def show(report: Report) -> str:
    torch_version = torch.__version__
    kinds = json.dumps(dict(sorted(report.faults.items())))
    return (
        f"{report.total} faults in {report.starts} starts of {report.runs} runs (torch {torch_version}): {kinds}; "
        f"at most {report.most_steps_lost} steps trained again after one, weights differ by at most "
        f"{report.largest_difference:.1g}"
    )
