"""Ranks that start in milliseconds: forked from a process that has imported torch and DeepSpeed once.

A rank as its own Python takes ten seconds of CPU to import them, and a test of faults wants hundreds of ranks.
"""

import json
import multiprocessing
import os
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

from seedling.stages.runtime.rendezvous import RANK_VARIABLES, free_port

_CONTEXT = multiprocessing.get_context("forkserver")


def _start_server() -> None:
    """Start the process to fork from. Before Python 3.13 it finds modules by PYTHONPATH alone, and says nothing."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])
    try:
        _CONTEXT.set_forkserver_preload(["warm_imports"])
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _rank(run: str, arguments: tuple, variables: dict[str, str], log: str) -> None:
    """Become a rank: its variables, its log, then `run`, the name of a function as `module:function`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1), os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.update(variables)
    module, function = run.split(":")
    getattr(__import__(module), function)(*arguments)


class ForkedJob:
    """Ranks that call `run(*arguments)`, by default the toy stage's main on {name: settings} under `root`."""

    def __init__(self, root: Path, runs: dict, *, ranks: int = 1, run: str = "toy_stage:main"):
        root.mkdir(parents=True, exist_ok=True)
        _start_server()
        port = free_port()
        self.root = root
        self.logs = [root / f"rank{r}.log" for r in range(ranks)]
        self.ranks = []
        for r, log in enumerate(self.logs):
            values = (str(r), str(r), str(ranks), "127.0.0.1", str(port))
            arguments = (run, (str(root), json.dumps(runs)), dict(zip(RANK_VARIABLES, values)), str(log))
            process = _CONTEXT.Process(target=_rank, args=arguments)
            process.start()
            self.ranks.append(process)

    def output(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()

    def wait(self, *, timeout: float = 900) -> list[int | None]:
        """Return the ranks' exit codes; what is not at its end in time is killed."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.ranks]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
            process.join()

    def finish(self) -> "ForkedJob":
        codes = self.wait()
        assert codes == [0] * len(codes), f"exit codes {codes}\n" + "\n".join(
            self.output(r)[-3000:] for r in range(len(codes))
        )
        return self
