"""Jobs of real processes that train toy stages, to be killed, signalled and compared."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from seedling.stages.runtime.rendezvous import RANK_VARIABLES, free_port

TOY = Path(__file__).with_name("toy_stage.py")


class Job:
    """Processes that train the toy runs {name: settings} under `root`; rank r's output is in `output(r)`.

    `toy` is the script of a stage, which can import toy_stage.
    """

    def __init__(self, root: Path, runs: dict, *, ranks: int = 1, toy: Path = TOY):
        root.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.root, self.ranks = root, []
        self.logs = [root / f"rank{r}.log" for r in range(ranks)]
        for r, log in enumerate(self.logs):
            values = (str(r), str(r), str(ranks), "127.0.0.1", str(port))
            environment = {
                **os.environ,
                **dict(zip(RANK_VARIABLES, values)),
                "PYTHONSAFEPATH": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(TOY.parent)])),
                "OMP_NUM_THREADS": "1",
            }
            command = [sys.executable, str(toy), str(root), json.dumps(runs)]
            with log.open("w") as f:
                self.ranks.append(subprocess.Popen(command, env=environment, stdout=f, stderr=subprocess.STDOUT))

    def output(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()

    def wait_for_step(self, name: str, step: int, *, timeout: float = 900) -> None:
        """Return once run `name` has trained `step` steps."""
        ledger, deadline = self.root / name / "ledger.jsonl", time.time() + timeout
        while True:
            ended = self.ranks[0].poll() is not None  # asked first: by the next line it may have trained to its end
            if ledger.exists() and ledger.read_text().count("\n") >= step:
                return
            assert time.time() < deadline and not ended, self.output()[-3000:]
            time.sleep(0.005)

    def kill(self) -> None:
        for process in self.ranks:
            process.kill()
        self.wait()

    def wait(self, *, timeout: float = 900) -> list[int]:
        """Return the ranks' exit codes."""
        try:
            return [process.wait(timeout=timeout) for process in self.ranks]
        finally:
            for process in self.ranks:
                process.kill()

    def finish(self) -> "Job":
        assert self.wait() == [0] * len(self.ranks), "\n".join(self.output(r)[-3000:] for r in range(len(self.ranks)))
        return self


def load_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / "artifact" / "model.pt")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
