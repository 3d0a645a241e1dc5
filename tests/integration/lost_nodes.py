"""A job on two machines (two_nodes.py) of which one is lost, again and again, at steps drawn from a seed.

A machine is lost in turns in two ways. It dies: every process in it is killed at once, its launcher too, and what a
machine starts at boot starts it again. Or its cable is pulled, so that neither side hears from the other: no process
ends but by the job's own watchdog, and the cable is back once both launchers have seen a crash. All else, until the
run has ended, is the launchers' business. It must end with the ledger and the weights of a run that lost nothing.
"""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import tiny_runs
from two_nodes import INTERFACE, Node

RANKS = 2  # a machine
SAVE_EVERY = 3  # steps
# Pauses between restarts double, which ten losses within minutes would turn into an hour of waiting.
LAUNCHER = (
    "import sys; from seedling.launch.launchers import restarts;"
    "restarts.LONGEST_PAUSE_SECONDS = restarts.FIRST_PAUSE_SECONDS;"
    "from seedling.launch.cli import main; sys.exit(main())"
)
CRASHED = "crashed with exit code"


@dataclass
class Losses:
    """What happened: for each loss the machine, the way, the step at which, and how many steps were trained again."""

    lost: list[tuple[str, str, int]] = field(default_factory=list)
    steps_again: list[int] = field(default_factory=list)
    restarts: int = 0
    seconds: float = 0.0


class TwoMachineJob:
    """`seedling launch` of a stage's config on both machines, each started by itself, as without ssh."""

    def __init__(self, folder: Path, config: Path, nodes: tuple[Node, Node], run_dir: Path, *overrides: str):
        self.folder, self.nodes, self.run_dir = folder, nodes, run_dir
        self.config, self.overrides = config, overrides
        (folder / "hosts").write_text("".join(f"{node.address} slots={RANKS}\n" for node in nodes))
        self.launchers: list[subprocess.Popen | None] = [None, None]

    def start(self, number: int) -> None:
        arguments = ["launch", str(self.config), "--on", "hostfile", "--hostfile", str(self.folder / "hosts")]
        arguments += ["--max-restarts", "100", "--no_ssh", "--node_rank", str(number), f"run_dir={self.run_dir}"]
        arguments += ["cluster.gpus=false", f"cluster.interface={INTERFACE}"]
        arguments += [f"train.save_every={SAVE_EVERY}", *self.overrides]
        command = self.nodes[number].command(sys.executable, "-c", LAUNCHER, *arguments)
        with self.log(number).open("ab") as out:
            self.launchers[number] = subprocess.Popen(command, env=tiny_runs.ENVIRONMENT, stdout=out, stderr=out)

    def log(self, number: int) -> Path:
        return self.folder / f"{self.run_dir.name}_machine{number}.log"

    def crashes(self, number: int) -> int:
        return self.log(number).read_text().count(CRASHED)

    def resumed(self) -> list[int]:
        """Return after which step each start that found a checkpoint went on."""
        return [int(step) - 1 for step in re.findall(r"resuming from .*: step (\d+) of", self.log(0).read_text())]

    def steps(self) -> list[int]:
        """Return the steps in the ledger; a line that is being written is not one yet."""
        ledger = self.run_dir / "ledger.jsonl"
        whole = ledger.read_text().rpartition("\n")[0].splitlines() if ledger.exists() else []
        return [json.loads(line)["step"] for line in whole]

    def wait(self, until: Callable[[], bool], what: str, *, patience: float) -> None:
        deadline = time.monotonic() + patience
        while not until():
            ended = [one.poll() for one in self.launchers if one is not None]
            assert time.monotonic() < deadline and not any(ended), f"no {what}: {self.said()}"
            time.sleep(0.02)

    def end(self, *, patience: float) -> None:
        self.wait(lambda: all(one and one.poll() == 0 for one in self.launchers), "end", patience=patience)

    def kill(self, number: int) -> None:
        """End all that runs on a machine."""
        launcher = self.launchers[number]
        while pids := _pids(self.nodes[number]):
            subprocess.run(["kill", "-9", *pids], stderr=subprocess.DEVNULL)
            time.sleep(0.1)
        if launcher is not None:
            launcher.wait()

    def cable(self, state: str) -> None:
        subprocess.run(["ip", "-n", self.nodes[1].name, "link", "set", INTERFACE, state], check=True)

    def said(self) -> str:
        logs = [*sorted(self.folder.glob("*.log")), *sorted(self.run_dir.glob("logs/*.log"))]
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in logs)


def lose_nodes(
    folder: Path,
    config: Path,
    nodes: tuple[Node, Node],
    *,
    losses: int,
    seed: int,
    hang_timeout: float = 0.0,
    patience: float = 1800.0,
    say: Callable[[str], None] = lambda line: None,
) -> Losses:
    """Train `config` undisturbed, then with `losses` losses; AssertionError shows what both machines wrote.

    Which machine is lost is drawn, and so is after how many further steps. `hang_timeout` is in seconds; by default it
    is as long as the undisturbed run takes to its first step, and at least 30: on a busy machine a start is no hang.
    """
    draws, told, began = random.Random(seed), Losses(), time.monotonic()
    straight = TwoMachineJob(folder, config, nodes, folder / "straight")
    disturbed = TwoMachineJob(folder, config, nodes, folder / "run")
    try:
        for number in (0, 1):
            straight.start(number)
        straight.wait(lambda: bool(straight.steps()), "first step", patience=patience)
        hang_timeout = hang_timeout or max(30.0, time.monotonic() - began)
        disturbed.overrides = (f"train.hang_timeout={hang_timeout:.0f}",)
        straight.end(patience=patience)
        say(f"the undisturbed run has ended: {len(straight.steps())} steps")
        for number in (0, 1):
            disturbed.start(number)
        for loss in range(losses):
            steps, machine = draws.randint(1, 8), draws.randrange(2)
            _lose(disturbed, told, machine=machine, steps=steps, dies=loss % 2 == 0, patience=patience)
            say(f"loss {loss + 1}: machine %s %s at step %s, trained again: {told.steps_again[-1]}" % told.lost[-1])
        disturbed.end(patience=patience)
        told.restarts = sum(disturbed.crashes(number) for number in (0, 1))
    finally:
        disturbed.cable("up")
        for number in (0, 1):
            straight.kill(number)
            disturbed.kill(number)
    steps = disturbed.steps()
    assert steps == list(range(1, len(steps) + 1)) and steps == straight.steps(), disturbed.said()
    ledgers = [tiny_runs.read_lines(job.run_dir / "ledger.jsonl") for job in (disturbed, straight)]
    assert ledgers[0] == ledgers[1], "the ledgers differ"
    differing = tiny_runs.differing(tiny_runs.weights(disturbed.run_dir), tiny_runs.weights(straight.run_dir))
    assert not differing, f"weights differ: {differing}"
    told.seconds = time.monotonic() - began
    return told


def tiny_sft(folder: Path, *, steps: int) -> Path:
    """Write a corpus, an LLM and the config of an sft run on them, of four micro-batches a step; return the config."""
    shards = tiny_runs.make_shards(folder / "corpus", tiny_runs.sentences(48, seed=1))
    train = {**tiny_runs.SFT["train"], "max_steps": steps, "global_batch_seconds": 16}
    inputs = {"llm": str(tiny_runs.make_llm(folder / "llm"))}
    values = {**tiny_runs.SFT, "stage": "sft", "inputs": inputs, "data": {"train": [str(shards)]}, "train": train}
    return tiny_runs.write_yaml(folder / "sft.yaml", values)


def _lose(job: TwoMachineJob, told: Losses, *, machine: int, steps: int, dies: bool, patience: float) -> None:
    """Lose a machine once `steps` more steps are trained, and wait until the job goes on from a checkpoint."""
    target = max(len(job.steps()) + steps, SAVE_EVERY + 1)
    job.wait(lambda: len(job.steps()) >= target, f"step {target}", patience=patience)
    assert not (job.run_dir / "artifact").exists(), "the run ended before it lost a machine"
    crashes, resumed = [job.crashes(number) for number in (0, 1)], len(job.resumed())
    if dies:
        job.kill(machine)
        job.start(machine)
    else:
        job.cable("down")
    see = (1 - machine,) if dies else (0, 1)
    job.wait(lambda: all(job.crashes(n) > crashes[n] for n in see), f"crash on {see}", patience=patience)
    at = len(job.steps())
    if not dies:
        job.cable("up")
    job.wait(lambda: len(job.resumed()) > resumed, "resumed run", patience=patience)
    told.lost.append((job.nodes[machine].name[0], "died" if dies else "lost its cable", at))
    told.steps_again.append(at - job.resumed()[-1])


def _pids(node: Node) -> list[str]:
    return subprocess.run(["ip", "netns", "pids", node.name], capture_output=True, text=True).stdout.split()
