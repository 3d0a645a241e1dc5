"""Ranks on other machines, over ssh: what they are given, and how a signal reaches them.

DeepSpeed's launcher starts them through pdsh, which hands on neither signals nor most of the environment. So where
variables matter they are named in a file that DeepSpeed reads, and the ranks are signalled by what they have noted of
themselves in RUN/logs. Nothing of ours but the ranks runs there, so whether they do is asked from here (`RollCall`).
"""

import shlex
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .placement import hosts_of
from .ranks import RankEnd, Start

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
    started = []
    for host, ranks in _by_host(hostfile, running).items():
        pids = [str(rank.pid) for rank in ranks]
        kill = shlex.join(["kill", f"-{signal.Signals(signum).name.removeprefix('SIG')}", *pids])
        started.append(subprocess.Popen(["ssh", "-o", "BatchMode=yes", host, kill], stderr=subprocess.DEVNULL))
    for process in started:
        process.wait()


class RollCall:
    """Asks machines whether the processes of their ranks are there, by one ssh for each, and does not wait for it."""

    def __init__(self, hostfile: str):
        self.hostfile = hostfile
        self.asked: list[tuple[subprocess.Popen, list[RankEnd]]] = []
        self.absent: set[Start] = set()

    def call(self, running: Sequence[RankEnd]) -> list[RankEnd]:
        """Return those of `running`, which have not noted an end, that were absent in the last two answers; ask anew.

        Twice, as a rank that ends notes it first, and the note may take a while to be seen from here. A machine that
        does not answer until the next call has said nothing.
        """
        before, self.absent = self.absent, self._answers()
        for host, ranks in _by_host(self.hostfile, running).items():
            pids = " ".join(str(rank.pid) for rank in ranks)
            look = f"for pid in {pids}; do kill -0 $pid 2>/dev/null || echo absent:$pid; done"
            there = shlex.join(["sh", "-c", look])
            command = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host, there]
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self.asked.append((process, ranks))
        return [rank for rank in running if rank.start in before & self.absent]

    def _answers(self) -> set[Start]:
        """Return the ranks that the answers to the last call name."""
        absent: set[Start] = set()
        for process, ranks in self.asked:
            if process.poll() is None:
                process.kill()
                process.wait()
            assert process.stdout is not None
            with process.stdout as answer:
                said = answer.read().split() if process.returncode == 0 else []
            absent |= {rank.start for rank in ranks if f"absent:{rank.pid}" in said}
        self.asked = []
        return absent


def _by_host(hostfile: str, ranks: Iterable[RankEnd]) -> dict[str, list[RankEnd]]:
    """Return {host: those of the ranks that run there}."""
    hosts = [host for host, slots in hosts_of(hostfile).items() for _ in range(slots)]
    found: dict[str, list[RankEnd]] = {}
    for rank in ranks:
        if rank.rank < len(hosts):
            found.setdefault(hosts[rank.rank], []).append(rank)
    return found
