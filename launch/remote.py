"""Ranks on other machines, over ssh: what they are given, and how a signal reaches them.

DeepSpeed's launcher starts them through pdsh, which hands on neither signals nor most of the environment. So where
variables matter they are named in a file that DeepSpeed reads, and the ranks are signalled by what they have noted of
themselves in RUN/logs.
"""

import shlex
import signal
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from .placement import hosts_of
from .ranks import RankEnd

# What a rank's behaviour depends on. Credentials stay out: the file can be read by whoever can read the run.
FORWARDED = ("PYTHON", "OMP_", "TOKENIZERS_", "GLOO_", "NCCL_", "TORCH_", "CUDA_", "HF_HUB_OFFLINE", "SEEDLING_")


def check_forwarded(names: Mapping[str, str]) -> None:
    """Refuse a cluster's variable that would not reach the other machines."""
    lost = [name for name in names if not name.startswith(FORWARDED)]
    if lost:
        raise ValueError(
            f"cluster.environment.{lost[0]} does not go over ssh, where only {', '.join(FORWARDED)} do; set it in the "
            "login shell of those machines"
        )


def environment_for(logs: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of DeepSpeed's launcher, which names the file of what the other machines get."""
    file = (logs / "environment").resolve()
    sent = {name: value for name, value in environment.items() if name.startswith(FORWARDED) and "\n" not in value}
    # DeepSpeed puts the current folder in front; in a checkout that would hide packages of the same names as ours.
    sent.setdefault("PYTHONPATH", "")
    file.write_text("".join(f"{name}={value}\n" for name, value in sent.items()), encoding="utf-8")
    return {**environment, "DS_ENV_FILE": str(file)}


def signal_ranks(hostfile: str, running: Iterable[RankEnd], *, signum: int) -> None:
    """Send a signal to ranks that run, by one ssh for each machine."""
    hosts = [host for host, slots in hosts_of(hostfile).items() for _ in range(slots)]
    pids_of: dict[str, list[str]] = {}
    for rank in running:
        if rank.rank < len(hosts):
            pids_of.setdefault(hosts[rank.rank], []).append(str(rank.pid))
    started = []
    for host, pids in pids_of.items():
        kill = shlex.join(["kill", f"-{signal.Signals(signum).name.removeprefix('SIG')}", *pids])
        started.append(subprocess.Popen(["ssh", "-o", "BatchMode=yes", host, kill], stderr=subprocess.DEVNULL))
    for process in started:
        process.wait()
