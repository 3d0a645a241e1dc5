"""Slurm: a readable sbatch script for each job, one task a machine, which starts that machine's ranks.

Before the time is up Slurm signals the script, which hands the signal to srun and so to every machine's `seedling`; the
ranks write a checkpoint and end with 75, and the script puts the job back into the queue under its own number. So jobs
that wait for it (a pipeline's next step) go on waiting.
"""

import shlex
import subprocess
import sys
from pathlib import Path

from ..errors import USER_ERROR
from ..variables import shell_lines
from .cluster import ClusterConfig, SlurmConfig
from .jobs import Job
from .restarts import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS

MEET = """
# Where the ranks meet. Jobs that share a machine must not do so at one port.
port=$((20000 + SLURM_JOB_ID % 20000))
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
"""
BODY = """
command=(
@COMMAND@
)

# @STOP_BEFORE@ s before the time is up: every machine's ranks write a checkpoint and end.
# Once only: a second signal would have the ranks not wait for their checkpoint.
time_is_up=""
trap 'kill -USR1 "${srun:-}" 2>/dev/null; trap "" USR1; time_is_up=yes' USR1

# One task a machine. Machines that wait for a failed one end by themselves, so srun need not end them first.
srun @SRUN@ bash -c '@EXEC@' _ "${command[@]}" &
srun=$!
early=$((128 + $(kill -l USR1))) # what a wait returns when the trap ends it while srun goes on
code=$early
while [ "$code" -eq "$early" ]; do
  wait "$srun"
  code=$?
done

# Done, or a mistake that would only be made again.
if [ "$code" -eq 0 ] || [ "$code" -eq @USER_ERROR@ ]; then exit "$code"; fi

if [ -n "$time_is_up" ]; then
  echo "seedling: the time is up (exit code $code): requeued, to go on from the last checkpoint"
else
  crashes=@LOGS@/slurm_$SLURM_JOB_ID.crashes
  read -r count reached 2>/dev/null <"$crashes"
  newest=$(find @CHECKPOINTS@ -maxdepth 1 2>/dev/null | grep -Eo '/step_[0-9]+$' | tr -d /step_ | sort -n | tail -n 1)
  newest=$((10#${newest:-0}))
  # Crashes in a row: a checkpoint of a later step than any before the last crash begins anew.
  if [ "$newest" -gt "${reached:-0}" ]; then count=0 reached=$newest; fi
  count=$((${count:-0} + 1))
  if [ "$count" -gt @MAX_RESTARTS@ ]; then
    echo "seedling: exit code $code, and no restart is left of @MAX_RESTARTS@"
    exit "$code"
  fi
  echo "$count ${reached:-0}" >"$crashes"
  pause=$((@FIRST_PAUSE@ << (count < 10 ? count - 1 : 9)))
  echo "seedling: exit code $code: requeued, restart $count of @MAX_RESTARTS@"
  sleep "$((pause < @LONGEST_PAUSE@ ? pause : @LONGEST_PAUSE@))"
fi
scontrol requeue "$SLURM_JOB_ID"
exit "$code"
"""


def script_of(job: Job) -> Path:
    """Return where a job's script is written."""
    return job.run_dir / "launch" / f"{job.name}.sbatch"


def render(job: Job, cluster: ClusterConfig, *, max_restarts: int) -> str:
    """Return a job's script."""
    slurm = cluster.slurm
    where = f"{job.nodes} x {job.nproc} processes" if job.places else "1 machine"
    lines = ["#!/bin/bash", f"# {job.name}: {where}. Written by `seedling launch`, which writes it anew each time."]
    lines += [f"#SBATCH {option}" for option in _options(job, cluster)]
    # The user's lines first: `source activate` and modules name variables that may not be set.
    lines += ["", *slurm.setup, "set -uo pipefail", *shell_lines(job.environment)]
    command = [sys.executable, "-m", "seedling.launch.cli", *job.arguments]
    shown = ["  " + shlex.join(command)]
    if job.places:
        shown.append(f'  --nproc {job.nproc} --nnodes "$SLURM_NNODES" --master_addr "$first" --master_port "$port"')
    values = {
        "COMMAND": "\n".join(shown),
        "EXEC": 'exec "$@" --node_rank "$SLURM_NODEID"' if job.places else 'exec "$@"',
        "SRUN": " ".join(["--ntasks-per-node=1", "--kill-on-bad-exit=0", "--wait=0", *_cpus(job, cluster)]),
        "STOP_BEFORE": str(slurm.stop_before_seconds),
        "USER_ERROR": str(USER_ERROR),
        "LOGS": shlex.quote(str(job.logs)),
        "CHECKPOINTS": shlex.join(map(str, job.checkpoints)),
        "MAX_RESTARTS": str(max_restarts),
        "FIRST_PAUSE": str(FIRST_PAUSE_SECONDS),
        "LONGEST_PAUSE": str(LONGEST_PAUSE_SECONDS),
    }
    body = BODY
    for name, value in values.items():
        body = body.replace(f"@{name}@", value)
    return "\n".join(lines) + "\n" + (MEET if job.places else "") + body


def submit_command(job: Job, *, after: str) -> list[str]:
    """Return the command that submits a job's script, to start once job number `after` has ended well."""
    wait = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *wait, str(script_of(job))]


def submit(jobs: list[Job], cluster: ClusterConfig, *, max_restarts: int) -> dict[str, str]:
    """Write and submit all jobs; return {job: number in Slurm}."""
    numbers: dict[str, str] = {}
    for job in jobs:
        script = script_of(job)
        script.parent.mkdir(parents=True, exist_ok=True)
        job.logs.mkdir(parents=True, exist_ok=True)
        script.write_text(render(job, cluster, max_restarts=max_restarts), encoding="utf-8")
        command = submit_command(job, after=numbers[job.after] if job.after else "")
        try:
            ended = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise ValueError(f"no sbatch on PATH; run this where Slurm is. The script is {script}") from None
        if ended.returncode:
            raise ValueError(f"sbatch refused {script}: {ended.stderr.strip()}")
        numbers[job.name] = ended.stdout.strip().partition(";")[0]
    return numbers


def _options(job: Job, cluster: ClusterConfig) -> list[str]:
    slurm: SlurmConfig = cluster.slurm
    gres = slurm.gres or (f"gpu:{job.nproc}" if job.gpus else "")
    valued = {
        "account": slurm.account,
        "partition": slurm.partition,
        "qos": slurm.qos,
        "gres": gres if job.gpus else "",
        "mem": slurm.memory,
    }
    return [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        *_cpus(job, cluster),
        *(f"--{name}={value}" for name, value in valued.items() if value),
        f"--time={slurm.time}",
        f"--signal=B:USR1@{slurm.stop_before_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={job.logs}/slurm_{job.name}_%j.log",
        *slurm.options,
    ]


def _cpus(job: Job, cluster: ClusterConfig) -> list[str]:
    # Said to srun again: since 22.05 it does not inherit it.
    return [f"--cpus-per-task={cluster.cpus}"] if cluster.cpus else []
